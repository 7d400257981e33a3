"""Settings of a watched training, by what it does with gradients that are made short or long."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from parity.paths.measured import clip_of, combination, unknown, weighting_of
from parity.paths.mlx.live import Loss
from parity.paths.mlx.traces import supervised_positions
from parity.paths.plugin.watch import Watch
from parity.trace import Array

QUIET, LOUD = 1e-3, 1e4
"""What gradients are multiplied by: too short for a clip to touch them, or longer than it allows."""


def loop_facts(quiet: Watch, loud: Watch, tokens: Sequence[int], half: bool) -> dict[str, Any]:
    """Clip and accumulation of a loop.

    Args:
        quiet: One update, watched with gradients that are multiplied by `QUIET`.
        loud: The same by `LOUD`.
        tokens: Supervised tokens of each micro-batch of `quiet`.
        half: Whether gradients are in half precision.
    """
    slack = 0.1 if half else 0.01
    step, long = quiet.steps[0], loud.steps[0]
    shares, residual = combination(step.given, [f.gradient for f in step.forwards])
    weighting = weighting_of(shares, tokens, slack)[1]
    if residual > slack:
        weighting = unknown("the optimizer is given no sum of the gradients of the loss")
    elif len(step.forwards) > 1 and len(set(tokens)) == 1 and weighting in ("token", "mean"):
        whole = np.allclose(shares, 1, rtol=slack)
        same = unknown("its micro-batches have equally many tokens: a mean, or by token")
        weighting = "each in full" if whole else same
    full = {name: value * (LOUD / QUIET) for name, value in step.given.items()}
    mode, limit = clip_of(full, long.given, slack)
    return {
        "clip.mode": mode,
        "clip.value": None if limit is None else float(f"{limit:.{2 if half else 5}g}"),
        "accumulation.steps": len(step.forwards),
        "accumulation.weighting": weighting,
    }


def tokens_of(watch: Watch, batches: Sequence[tuple[Array, Array]], loss: Loss) -> list[int]:
    """Supervised tokens of each micro-batch: as the loss counted them, else as it depends on them."""
    forwards = [forward for step in watch.steps for forward in step.forwards]
    if all(forward.rest and forward.rest[0].size == 1 for forward in forwards):
        return [int(forward.rest[0].item()) for forward in forwards]
    return [len(supervised_positions(loss, *batch)) for batch in batches]


def curve(watch: Watch, tokens: Sequence[int]) -> dict[str, list[float]]:
    """Loss, gradient norm and supervised tokens of each update."""
    counts = iter(tokens)
    by_step = [[next(counts) for _ in step.forwards] for step in watch.steps]
    return {
        "loss": [float(np.mean([f.loss for f in step.forwards])) for step in watch.steps],
        "gradient_norm": [step.norm for step in watch.steps],
        "tokens": [sum(counted) for counted in by_step],
    }
