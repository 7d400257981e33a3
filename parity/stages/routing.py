"""Ties of a router: where rounding decides which experts a token goes to, two stacks may decide otherwise.

A router chooses the k experts of the highest score. Where the score of the last one chosen and of the first
one that is not are nearer than rounding, neither choice is wrong, and all that follows differs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from parity import resources
from parity.errors import NO_ANSWER, MissingCapture, UsageError
from parity.judge.compare import compare
from parity.judge.noise import HEADROOM, Noise
from parity.names import each
from parity.record import Metric, Verdict
from parity.stages.context import Context
from parity.stages.pair import Pair
from parity.trace import Array, Trace

ROUTERS = (".gate", ".router")
"""How the modules that score experts are called, in models of either framework."""
CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_top_k")
"""What configurations call k."""


@dataclass
class Ties:
    """Ties in one batch of token ids.

    Attributes:
        reached: Positions (B, T) whose logits a tie may have changed: its own and later ones.
        found: Router to its ties and the least distance of scores there.
    """

    reached: Array
    found: dict[str, tuple[int, float]] = field(default_factory=dict)


def without_ties(
    context: Context, inputs: Trace, metrics: Sequence[Metric]
) -> tuple[list[Metric], list[str]] | None:
    """The metrics of logits judged at positions that no tie reaches, and what was left out.

    Only where that is all there is to it: with the reference's output of the blocks in which ties are, the
    subject's logits must agree at every position.

    Args:
        context: The cell.
        inputs: `ids.0`, `ids.1`, ... of the logits.
        metrics: One of each, as they were judged at all positions.

    Returns:
        None where there is no tie, or something else than ties.
    """
    if context.exact or not (k := _chosen(context)):
        return None
    try:
        pair = context.pair("logits", Trace(inputs.arrays, {"modules": True}))
        found = [_ties(pair, index, ids, k) for index, ids in enumerate(each(inputs.arrays, "ids"))]
        if all(ties is not None and not ties.found for ties in found) or None in found:
            return None
        judged = [
            _judged(pair, index, ties.reached, metric)
            for index, (ties, metric) in enumerate(zip(found, metrics, strict=True))
            if ties is not None
        ]
        if any(metric.verdict is Verdict.DIVERGE for metric in judged):
            return None
        words = []
        for index, ties in enumerate(found):
            if ties is not None and ties.found:
                if not _explained(context, pair, index, inputs, ties):
                    return None
                words.append(_words(metrics[index].name, ties))
    except (*NO_ANSWER, MissingCapture, UsageError):
        return None  # a bundle holds no modules
    return judged, words


def _chosen(context: Context) -> int:
    """How many experts a token goes to by the model's configuration; 0 of a model without experts."""
    try:
        folder = Path(resources.model_dir(context.recipes["reference"].model.source))
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError, UsageError):
        return 0
    found = [config.get("text_config", {}).get(name) or config.get(name) for name in CHOSEN]
    return next((value for value in found if isinstance(value, int)), 0)


def _routers(pair: Pair, index: int) -> Iterator[str]:
    """Names of the routers of both sides, in the order of the subject's calls."""
    theirs = pair.reference.group(f"module.{index}")
    for name in pair.subject.scalars["order"]:
        if name.endswith(ROUTERS) and name in theirs:
            yield name


def _ties(pair: Pair, index: int, ids: Array, k: int) -> Ties | None:
    """Ties of one batch; None where scores differ by more than rounding at a position without one."""
    ours, theirs = (t.group(f"module.{index}") for t in (pair.subject, pair.reference))
    noise, ties = pair.noise_of(f"module.{index}"), Ties(np.zeros(ids.shape, bool))
    for name in _routers(pair, index):
        if theirs[name].size != ours[name].size or theirs[name].shape[-1] <= k:
            return None
        flat = ~ties.reached.ravel()
        a, b = (_by_token(side[name])[flat] for side in (ours, theirs))
        metric = compare(name, a, b, _at(noise, name, flat))
        if metric.verdict is Verdict.DIVERGE:
            return None
        descending = np.sort(b.astype(np.float64), axis=-1)[:, ::-1]
        margin = descending[:, k - 1] - descending[:, k]
        near = margin <= 2 * HEADROOM * metric.floor  # either score may be off by that much
        if near.any():
            tied = np.zeros(ids.size, bool)
            tied[np.flatnonzero(flat)[near]] = True
            ties.found[name] = int(near.sum()), float(margin[near].min())
            # A later token attends to an earlier one.
            ties.reached |= np.logical_or.accumulate(tied.reshape(ids.shape), axis=1)
    return ties


def _by_token(values: Array) -> Array:
    """Scores (tokens, experts) of what a router gives, whatever stands before them."""
    return values.reshape(-1, values.shape[-1])


def _at(noise: Noise, name: str, tokens: Array) -> Noise:
    """The noise of one array by token, at some tokens alone: elsewhere the float64 run may choose otherwise."""

    def chosen(arrays: Mapping[str, Array]) -> dict[str, Array]:
        return {name: _by_token(arrays[name])[tokens]} if name in arrays else {}

    changed: dict[str, Any] = {
        f: chosen(getattr(noise, f)) for f in ("referee", "rounded", "perturbed")
    }
    return replace(noise, **changed, repeats={})


def _judged(pair: Pair, index: int, reached: Array, metric: Metric) -> Metric:
    """The metric of a batch's logits at the positions that no tie reaches."""
    if not reached.any():
        return metric
    name, kept = f"logits.{index}", ~reached.ravel()
    a, b = (_by_token(t.arrays[name])[kept] for t in (pair.subject, pair.reference))
    count = f"at {int(kept.sum())} of {kept.size} positions: the others follow a tie of a router"
    judged = compare(name, a, b, _at(pair.noise, name, kept)) if kept.any() else None
    if judged is None:
        update = {
            "verdict": Verdict.INCONCLUSIVE,
            "note": "every position follows a tie of a router",
        }
        return metric.model_copy(update=update)
    note = f"{judged.note}; {count}" if judged.note else count
    return judged.model_copy(update={"name": metric.name, "note": note})


def _explained(context: Context, pair: Pair, index: int, inputs: Trace, ties: Ties) -> bool:
    """Whether the logits agree at all positions with the reference's output of the blocks with ties."""
    theirs = pair.reference.group(f"module.{index}")
    blocks = {router.rpartition(".")[0] for router in ties.found}
    given = {name: theirs[name] for name in blocks if name in theirs}
    if given.keys() != blocks:
        return False
    rows = Trace({"ids.0": inputs.arrays[f"ids.{index}"]}, {"modules": False})
    rows = rows.with_group("replace", given)
    subject, reference = (
        context.capture(side, "logits", context.recipes[side], rows).arrays["logits.0"]
        for side in ("subject", "reference")
    )
    # The float64 run takes the same output, so that it makes the same choices there.
    referee = context.capture("referee", "logits", context.recipes["referee"], rows)
    noise = Noise(False, referee={"logits.0": referee.arrays["logits.0"]}, dtype=pair.dtype)
    return compare("logits.0", subject, reference, noise).verdict.green


def _words(what: str, ties: Ties) -> str:
    count, names = sum(n for n, _ in ties.found.values()), ", ".join(list(ties.found)[:3])
    least = min(margin for _, margin in ties.found.values())
    return (
        f"{what}: {count} ties of routers ({names}{', …' if len(ties.found) > 3 else ''}), where the scores of "
        f"the last expert chosen and the next are as near as {least:.2g} and rounding decides; "
        f"{int(ties.reached.sum())} of {ties.reached.size} positions follow one and were left out; with the "
        "reference's output of these blocks the logits agree at all positions"
    )
