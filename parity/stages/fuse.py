"""Stage 13: an adapter fused into its base, against the adapter kept apart."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import numpy as np

from parity.judge.compare import compare, compare_exact
from parity.record import Metric, Verdict
from parity.stages.context import Comparison, Context
from parity.stages.pair import Pair
from parity.stages.round_trip import RoundTrip
from parity.trace import Array, Trace

WHY = "fused weights are rounded once more"
REQUANTIZED = "requantization loss"


class Fuse:
    """What a fused model gives, against the adapter that is loaded beside its base."""

    number: ClassVar[int] = 13
    name: ClassVar[str] = "fuse"
    question: ClassVar[str] = "Does a fused model do what the adapter does when it is kept apart?"

    def run(self, context: Context) -> Comparison:
        """Each path against itself, and the fused models across paths where nothing is quantized."""
        pair, result = context.pair("fuse", RoundTrip().inputs(context)), Comparison()
        for side, trace in (("subject", pair.subject), ("reference", pair.reference)):
            result.metrics.append(_kept(side, trace.arrays))
            if "dequantized" in trace.arrays:
                result.findings.append(_loss(side, trace.arrays))
            else:
                result.metrics.append(_fused(side, trace, pair))
        if not any("dequantized" in trace.arrays for trace in (pair.subject, pair.reference)):
            ours, theirs = (trace.arrays["fused"] for trace in (pair.subject, pair.reference))
            metric = compare("fused", ours, theirs, pair.noise)
            result.metrics.append(metric.model_copy(update={"name": "logits after fusing, both"}))
        return result


def _kept(side: str, arrays: dict[str, Array]) -> Metric:
    """Whether fusing loses less than the adapter gives, and is not nearer to the base."""
    lost, moved = _off(arrays, "fused", "apart"), _off(arrays, "fused", "base")
    effect = _off(arrays, "apart", "base")
    note = f"fused it is {lost:.3g} off from the adapter kept apart, which moves the logits by {effect:.3g}"
    kept = np.array([bool(lost < min(moved, effect))])
    metric = compare_exact(f"the adapter is in the weights, {side}", kept, np.array([True]), note)
    if metric.verdict is Verdict.DIVERGE:
        note += f", and {moved:.3g} off from the base: the adapter is lost or another one"
        if "dequantized" in arrays:
            note += ", or quantizing again costs as much"
    return metric.model_copy(update={"note": note})


def _fused(side: str, trace: Trace, pair: Pair) -> Metric:
    """Within what rounding explains: a fused weight is another sum than two products."""
    noise = replace(replace(pair, exact=False).noise, why_floor=WHY)
    metric = compare("fused", trace.arrays["fused"], trace.arrays["apart"], noise)
    return metric.model_copy(update={"name": f"logits after fusing, {side}"})


def _loss(side: str, arrays: dict[str, Array]) -> str:
    """What quantizing again costs, with the same fuse without it beside it."""
    effect = _off(arrays, "apart", "base")
    lost, left = _off(arrays, "fused", "apart"), _off(arrays, "dequantized", "apart")
    return (
        f"{REQUANTIZED} of the {side}: fused onto the quantized base the logits are {lost:.3g} off, "
        f"{lost / effect:.3g} of what the adapter moves them by; fused without quantizing again {left:.3g}"
    )


def _off(arrays: dict[str, Array], one: str, other: str) -> float:
    return float(np.abs(arrays[one].astype(np.float64) - arrays[other]).max())
