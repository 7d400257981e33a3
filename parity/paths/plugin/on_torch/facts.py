"""Settings of a watched training on torch, by what it does with losses that are made small or large."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from parity.errors import Unsupported
from parity.paths.hf.live import IGNORED, given
from parity.paths.hf.observed import calls
from parity.paths.measured import (
    HALF,
    Calls,
    clip_of,
    combination,
    micro_batches,
    unknown,
    weighting_of,
)
from parity.paths.plugin.facts import LOUD, QUIET
from parity.paths.plugin.on_torch.watch import TorchWatch
from parity.recipe import Recipe

if TYPE_CHECKING:
    from parity.paths.plugin.on_torch.trainer import TorchTrainerPath


def training_facts(path: TorchTrainerPath, recipe: Recipe) -> dict[str, Any]:
    """Clip, accumulation, checkpointing and autocast of the real training."""
    seen = Calls()
    quiet = _one_update(path, recipe, QUIET, lambda: calls(seen))
    loud = _one_update(path, recipe, LOUD, contextlib.nullcontext)
    slack = 0.1 if recipe.model.dtype in HALF else 0.01
    step, long = quiet.steps[0], loud.steps[0]
    full = {name: value * (LOUD / QUIET) for name, value in step.given.items()}
    mode, limit = clip_of(full, long.given, slack)
    batches = path.drawn(recipe, step.forwards)
    tokens = [int((targets != IGNORED).sum()) for _, _, targets in batches]
    weighting: Any = "only one a step"
    if len(step.forwards) > 1:
        try:
            alone = [path.one_gradient(recipe, None, batch) for batch in batches]
        except Unsupported as error:
            weighting = unknown(error)
        else:
            small = {name: value / QUIET for name, value in step.given.items()}
            shares, residual = combination(small, [found["gradient"] for found in alone])
            weighting = weighting_of(shares, tokens, slack)[1]
            if residual > slack:
                weighting = unknown("an update is no sum of the gradients of its micro-batches")
    digits = 2 if recipe.model.dtype in HALF else 5
    return {
        "clip.mode": mode,
        "clip.value": None if limit is None else float(f"{limit:.{digits}g}"),
        "accumulation.steps": len(step.forwards),
        "accumulation.weighting": weighting,
        **seen.facts(),
    }


def _one_update(
    path: TorchTrainerPath,
    recipe: Recipe,
    gain: float,
    around: Callable[[], contextlib.AbstractContextManager[Any]],
) -> TorchWatch:
    """A step on unlike micro-batches, or on its own where none can be handed over."""
    once = recipe.override({"train.steps": 1, "lora.dropout": 0.0})
    unlike = list(given(micro_batches(2 * recipe.train.accumulation)) or ())
    for batches in (itertools.cycle(path.handed(once, unlike)), None):
        watch = TorchWatch(stop_after=1, skip=True, gain=gain, gradients=True)
        try:
            with around():
                return path.watched(once, watch, batches)
        except Unsupported:
            if batches is None:
                raise
    raise AssertionError
