"""Stage 04: the adapter before the first step."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from parity.judge.numerics import compare_exact, compare_group, nothing
from parity.record import Metric, Verdict
from parity.stages.context import Comparison, Context
from parity.trace import Array, Trace

ALPHA = 1e-4
"""Below this p-value of the Kolmogorov–Smirnov test a distribution is not uniform."""


class LoraInit:
    """Names, rank, scale, B = 0 and the distribution or the bits of A."""

    number: ClassVar[int] = 4
    name: ClassVar[str] = "lora_init"
    question: ClassVar[str] = "Does training start from the same adapter?"

    def run(self, context: Context) -> Comparison:
        """Bits within one framework; across frameworks, whose generators differ, distributions."""
        pair = context.pair("lora_init", Trace())
        a, b = pair.subject, pair.reference
        result = Comparison()
        result.metrics.append(
            _sets("trainable tensors", a.scalars["trainable"], b.scalars["trainable"])
        )
        for key in ("rank", "scale", "dropout", "layers", "dtype"):
            ours, theirs = a.scalars[key], b.scalars[key]
            shown = f"{ours}" if key != "layers" else f"{len(ours)} layers"
            a_value, b_value = np.array([str(ours)]), np.array([str(theirs)])
            result.metrics.append(compare_exact(f"LoRA {key}", a_value, b_value, note=shown))
        result.facts = setting_facts(a, b)
        ours, theirs = a.group("adapter"), b.group("adapter")
        for side, tensors in (("subject", ours), ("reference", theirs)):
            result.metrics.append(_zero_b(side, tensors))
        if context.exact:
            metric = compare_group("adapter bits", ours, theirs, pair.noise_of("adapter"))
            result.metrics.append(metric)
            if metric.verdict is Verdict.DIVERGE:
                drawn = [*distribution("subject", ours), *distribution("reference", theirs)]
                result.facts["A is uniform on both sides"] = all(m.verdict.green for m in drawn)
        else:
            for side, tensors in (("subject", ours), ("reference", theirs)):
                result.metrics += distribution(side, tensors)
        return result


def setting_facts(subject: Trace, reference: Trace) -> dict[str, float]:
    """The ratio of the scales, and by how many first layers the subject adapts fewer (+) or more."""
    facts: dict[str, float] = {}
    scales = subject.scalars["scale"], reference.scalars["scale"]
    if all(isinstance(scale, (int, float)) and scale for scale in scales):
        facts["LoRA scale ratio"] = scales[0] / scales[1]
    ours, theirs = (set(trace.scalars["layers"]) for trace in (subject, reference))
    fewer = sorted(ours ^ theirs)
    if fewer and ours & theirs and fewer == list(range(min(ours | theirs), min(ours & theirs))):
        facts["first layers without LoRA"] = len(theirs - ours) - len(ours - theirs)
    return facts


def _sets(name: str, a: list[str], b: list[str]) -> Metric:
    lone = sorted(set(a) ^ set(b))
    metric = compare_exact(name, np.array(sorted(a)), np.array(sorted(b)), note=f"{len(a)} tensors")
    if lone:
        side = "subject" if lone[0] in set(a) else "reference"
        update = {
            "mismatched": len(lone),
            "value": float(len(lone)),
            "minimum_required_tolerance": float(len(lone)),
            "where": lone[0],
            "note": f"{len(a)} against {len(b)} tensors; {lone[0]} in the {side} only",
        }
        metric = metric.model_copy(update=update)
    return metric


def _zero_b(side: str, tensors: dict[str, Array]) -> Metric:
    bs = [v.ravel() for k, v in tensors.items() if k.endswith(".lora_b")]
    if not bs:
        return nothing(f"B = 0, {side}")
    joined = np.concatenate(bs)
    return compare_exact(f"B = 0, {side}", joined, np.zeros_like(joined))


def distribution(side: str, tensors: dict[str, Array]) -> list[Metric]:
    """A against U(-1/sqrt(in), 1/sqrt(in)), PEFT's Kaiming bound and mlx-lm's alike.

    All modules, scaled to (-1, 1), are pooled for one Kolmogorov–Smirnov test (Massey 1951), whose
    critical value at `ALPHA` is the tolerance.
    """
    from scipy.stats import kstest, kstwobign

    scaled = [v.ravel() * np.sqrt(v.shape[0]) for k, v in tensors.items() if k.endswith(".lora_a")]
    if not scaled:
        return [nothing(f"distribution of A, {side}")]
    pooled = np.concatenate(scaled).astype(np.float64)
    test = kstest(pooled, "uniform", args=(-1, 2))
    beyond = max(0.0, float(np.abs(pooled).max()) - 1)
    critical = float(kstwobign.isf(ALPHA) / np.sqrt(pooled.size))
    return [
        _judged(
            f"bound of A, {side}", beyond, 1e-6, pooled.size, f"|A|·√in is {beyond:.2g} over 1"
        ),
        _judged(
            f"distribution of A, {side}",
            float(test.statistic),
            critical,
            pooled.size,
            f"Kolmogorov–Smirnov D = {test.statistic:.4f}, p = {test.pvalue:.3g}",
        ),
    ]


def _judged(name: str, value: float, tolerance: float, total: int, note: str) -> Metric:
    return Metric(
        name=name,
        verdict=Verdict.AGREE if value <= tolerance else Verdict.DIVERGE,
        value=value,
        tolerance=tolerance,
        minimum_required_tolerance=value,
        total=total,
        note=note,
    )
