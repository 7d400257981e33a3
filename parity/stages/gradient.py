"""Stage 05: one gradient at the same adapter and batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import numpy as np

from parity.judge.compare import compare, compare_exact, compare_group
from parity.judge.noise import HEADROOM, distance
from parity.names import is_factor
from parity.record import Metric
from parity.stages import experts
from parity.stages.context import Comparison, Context
from parity.stages.inputs import common_rows
from parity.stages.pair import Pair
from parity.trace import Array, Trace

LENGTHS = [9, 21, 30, 14]
MOVED = 0.02
"""Standard deviation of B, and of the relative change of any other tensor."""
WIDTH = 33


class Gradient:
    """Loss, norm and every tensor, with B = 0 and with B ≠ 0."""

    number: ClassVar[int] = 5
    name: ClassVar[str] = "gradient"
    question: ClassVar[str] = "Does the same batch give the same gradient?"

    def run(self, context: Context) -> Comparison:
        """Compares before any clip: the clip belongs to the optimizer step."""
        result = Comparison(facts={"vocabulary": context.vocabulary})
        for pair, what in self.pairs(context):
            a, b = pair.subject, pair.reference
            result.metrics += loss_and_norm(pair, what)
            counts = np.array([a.scalars["tokens"]]), np.array([b.scalars["tokens"]])
            result.metrics.append(compare_exact(f"supervised tokens, {what}", *counts))
            tensors = a.group("gradient"), b.group("gradient")
            noise = pair.noise_of("gradient")
            result.metrics.append(compare_group(f"gradient, {what}", *tensors, noise))
            result.metrics += experts.metrics(*tensors, what)
            result.findings += experts.findings(*tensors, what)
            floors = {name: noise.floor(name, value) for name, value in tensors[1].items()}
            facts = scale_facts(*tensors, floors, what)
            result.findings += proportional(facts, what)
            result.facts |= facts
            result.facts |= reduction_facts(a, b, what)
            if context.decided(result):
                break
        if any(recipe.lora.dropout for recipe in context.recipes.values()):
            result.findings.append("without dropout: its masks are no part of this stage")
        for side, trace in (("subject", pair.subject), ("reference", pair.reference)):
            if own := trace.scalars.get("own_dropout", 0.0):
                result.findings.append(
                    f"without the dropout of {own:g} that the {side}'s model has of its own in training"
                )
        return result

    def pairs(self, context: Context) -> Iterator[tuple[Pair, str]]:
        """Both gradients of one batch, at B = 0 and at B ≠ 0."""
        for rows, what in self.inputs(context):
            yield context.pair("gradient", rows), what

    def inputs(self, context: Context) -> Iterator[tuple[Trace, str]]:
        """The batch with either adapter."""
        init = context.given("lora_init").group("adapter")
        rng = context.rng(self.number)
        rows = common_rows(rng, context.vocabulary, LENGTHS, WIDTH)
        low_rank = any(map(is_factor, init))
        names = ("B = 0", "B ≠ 0") if low_rank else ("weights as loaded", "weights moved")
        for what, adapter in zip(names, (init, filled(init, rng)), strict=True):
            yield rows.with_group("adapter", adapter), what


def loss_and_norm(pair: Pair, what: str) -> Iterator[Metric]:
    """Both scalars of one gradient, named for the adapter that it is of."""
    for key, name in (("loss", "loss"), ("norm", "global norm")):
        metric = compare(key, pair.subject.arrays[key], pair.reference.arrays[key], pair.noise)
        yield metric.model_copy(update={"name": f"{name}, {what}"})


def reduction_facts(subject: Trace, reference: Trace, what: str) -> dict[str, float]:
    """Norms on both sides, the ratio of the losses, the share of positions that is supervised."""
    facts = {
        f"norm {side}, {what}": float(trace.arrays["norm"])
        for side, trace in (("subject", subject), ("reference", reference))
    }
    if loss := float(reference.arrays["loss"]):
        facts[f"loss ratio, {what}"] = float(subject.arrays["loss"]) / loss
    positions = len(LENGTHS) * (WIDTH - 1)
    facts["share of positions supervised"] = float(reference.scalars["tokens"]) / positions
    return facts


def filled(init: dict[str, Array], rng: np.random.Generator) -> dict[str, Array]:
    """An adapter as after some training: B is no longer zero, and what is no factor has moved."""
    return {name: _trained(name, value, rng) for name, value in init.items()}


def _trained(name: str, value: Array, rng: np.random.Generator) -> Array:
    if name.endswith(".lora_a"):
        return value
    drawn = rng.normal(0, MOVED, value.shape)
    return np.asarray(drawn if name.endswith(".lora_b") else value * (1 + drawn), value.dtype)


def proportional(facts: dict[str, float], what: str) -> list[str]:
    """Says so when one gradient is a multiple of the other: same direction, other scale."""
    ratio = facts.get(f"gradient ratio, {what}")
    if ratio is None:
        return []
    return [f"{what}: the subject's gradient is the reference's times {ratio:.4g}"]


def scale_facts(
    subject: dict[str, Array], reference: dict[str, Array], floors: dict[str, float], what: str
) -> dict[str, float]:
    """Relative distance, the factor between parallel gradients, the bound of a clipped one (< 0: the reference's).

    Args:
        subject: Gradients by name.
        reference: Those of the other side.
        floors: What rounding explains of each.
        what: Of which adapter, for the names of the facts.
    """
    if subject.keys() != reference.keys() or not subject:
        return {}
    if any(subject[k].shape != v.shape for k, v in reference.items()):
        return {}
    ours, theirs = (
        {k: v.astype(np.float64) for k, v in side.items()} for side in (subject, reference)
    )
    a, b = (np.concatenate([side[k].ravel() for k in theirs]) for side in (ours, theirs))
    if not a.any() or not b.any():
        return {}
    length = float(np.linalg.norm(b))
    facts = {f"distance of gradient, {what}": float(np.linalg.norm(a - b)) / length}
    ratio = float(a @ b) / length**2

    def explained(factor: float) -> bool:
        """Whether a factor leaves no tensor beyond its rounding."""
        return all(
            distance(ours[k], factor * v) <= HEADROOM * max(1.0, abs(factor)) * floors[k]
            for k, v in theirs.items()
        )

    if explained(1.0):
        return facts  # nothing is to be explained
    if explained(ratio):
        return facts | {f"gradient ratio, {what}": ratio}
    bounds = float(np.abs(a).max()), float(np.abs(b).max())
    low, least = min(bounds), HEADROOM * max(floors.values())
    if max(bounds) > low + least and all(
        distance(ours[k].clip(-low, low), v.clip(-low, low)) <= HEADROOM * floors[k]
        for k, v in theirs.items()
    ):
        facts[f"gradient bound, {what}"] = low if low == bounds[0] else -low
    return facts
