"""Stage 02: logits of the base model on the same ids."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from parity.errors import MissingCapture
from parity.judge.compare import compare, compare_exact, compare_group
from parity.judge.noise import HEADROOM, distance
from parity.names import each
from parity.record import MODULE, Verdict
from parity.stages.context import Comparison, Context
from parity.stages.pair import Extent, Pair
from parity.stages.routing import without_ties
from parity.trace import Trace

LONG = 160
"""Positions of the random rows: beyond the sliding windows of the tiny models."""


class Logits:
    """Fixture text and seeded random ids at long positions."""

    number: ClassVar[int] = 2
    name: ClassVar[str] = "logits"
    question: ClassVar[str] = "Does the base model compute the same logits?"

    def run(self, context: Context) -> Comparison:
        """Compares logits; on divergence names the first bad module."""
        inputs = self.inputs(context)
        pair = context.pair("logits", inputs)
        result = Comparison()
        ours, theirs = (np.array([str(t.scalars["dtype"])]) for t in (pair.subject, pair.reference))
        result.metrics.append(compare_exact("logits dtype", ours, theirs, note=str(ours[0])))
        for index, what in enumerate(("training text", "random ids at long positions")):
            name = f"logits.{index}"
            metric = compare(
                name, pair.subject.arrays[name], pair.reference.arrays[name], pair.noise
            )
            result.metrics.append(metric.model_copy(update={"name": f"logits, {what}"}))
        if any(m.verdict is Verdict.DIVERGE for m in result.metrics[1:]):
            if (ties := without_ties(context, inputs, result.metrics[1:])) is not None:
                result.metrics[1:], words = ties
                result.findings += words
            elif context.extent is Extent.RECORD:
                result.findings += first_bad_module(context, inputs, result)
        result.findings += top_tokens(pair)
        return result

    def inputs(self, context: Context) -> Trace:
        """`ids.0` (1, n) a training row, `ids.1` (2, LONG) seeded random ids."""
        texts = Trace(scalars={"texts": [], "conversations": []})
        tokens = context.given("tokenization", texts)
        row = next(each(tokens.arrays, "row"))
        random = context.rng(self.number).integers(1, context.vocabulary, (2, LONG))
        return Trace({"ids.0": row[None, :], "ids.1": random.astype(np.int32)}, {"modules": False})


def top_tokens(pair: Pair) -> list[str]:
    """Says at how many positions the two sides would choose different tokens."""
    differ = total = 0
    for a, b in zip(
        each(pair.subject.arrays, "logits"), each(pair.reference.arrays, "logits"), strict=True
    ):
        if a.shape == b.shape:
            differ += int((a.argmax(-1) != b.argmax(-1)).sum())
            total += int(np.prod(a.shape[:-1]))
    return [f"the most likely token differs at {differ} of {total} positions"] if differ else []


def first_bad_module(context: Context, inputs: Trace, result: Comparison) -> list[str]:
    """The first module in the order of calls whose output differs beyond the floor."""
    try:
        pair = context.pair("logits", Trace(inputs.arrays, {"modules": True}))
    except MissingCapture as error:
        return [f"the first bad module was not looked for: {error}"]
    order = [n for n in pair.subject.scalars["order"] if n in set(pair.reference.scalars["order"])]
    if not order:
        return ["no module has the same name on both sides: no first bad module can be named"]
    index = next(i for i, m in enumerate(result.metrics[1:]) if m.verdict is Verdict.DIVERGE)
    a, b = (t.group(f"module.{index}") for t in (pair.subject, pair.reference))
    noise = pair.noise_of(f"module.{index}")
    metrics = {
        name: compare_group(name, {name: a[name]}, {name: b[name]}, noise)
        for name in order
        if a[name].shape == b[name].shape
    }
    result.series |= {f"{MODULE}{name}": [m.value, m.tolerance] for name, m in metrics.items()}
    for name, metric in metrics.items():
        if metric.verdict is Verdict.DIVERGE:
            if a[name].ndim == 3:
                off = np.abs(a[name] - b[name]).max(axis=(0, 2)) > metric.tolerance
                result.facts["first position off"] = int(off.argmax())
            return [
                f"first bad module: {name}, greatest |Δ| {metric.value:.3g} where rounding explains "
                f"{metric.floor:.2g}" + _growth(a[name], b[name])
            ]
    return [
        f"none of {len(order)} common modules differs beyond its floor: the difference is after them"
    ]


def _growth(a: np.ndarray, b: np.ndarray) -> str:
    """Errors of position encodings grow with the position; the first position has none."""
    if a.ndim < 3 or a.shape[1] < 8:
        return ""
    by_position = np.abs(a.astype(np.float64) - b).reshape(a.shape[0], a.shape[1], -1).max((0, 2))
    quarter = len(by_position) // 4
    early, late = distance(by_position[:1], np.zeros(1)), float(by_position[-quarter:].max())
    return "; the error grows with the position" if late > HEADROOM * max(early, 1e-12) else ""
