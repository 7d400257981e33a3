"""Stage 04: the adapter before the first step."""

from __future__ import annotations

from importlib.metadata import version
from typing import ClassVar

import numpy as np

from parity.derived import kept
from parity.files import dumps, loads
from parity.judge.compare import compare_exact, compare_group, nothing
from parity.judge.noise import EPS, Noise
from parity.names import inputs_of, is_factor
from parity.record import Metric, Verdict
from parity.stages.context import Comparison, Context
from parity.trace import Array, Trace

ALPHA = 1e-4
"""Chance that a sound adapter of one side is called not uniform, over all tests together."""
NAMED = 4  # tensors that a sentence names


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
        low_rank = any(map(is_factor, {**ours, **theirs}))
        for side, tensors in (("subject", ours), ("reference", theirs)):
            result.metrics += [_zero_b(side, tensors)] if low_rank else []
        if context.exact:
            metric = compare_group("adapter bits", ours, theirs, pair.noise_of("adapter"))
            result.metrics.append(metric)
            if metric.verdict is Verdict.DIVERGE:
                drawn = distributions(a, b)
                result.facts["A is uniform on both sides"] = all(m.verdict.green for m in drawn)
        else:
            result.metrics += distributions(a, b) if low_rank else []
            result.metrics += _not_drawn(ours, theirs, pair.noise_of("adapter"))
        result.findings += _offsets(a, b)
        return result


def _offsets(subject: Trace, reference: Trace) -> list[str]:
    """Weights that the two sides store with a constant between them, and are compared without it."""
    found = []
    for side, trace in (("subject", subject), ("reference", reference)):
        if added := trace.scalars.get("offsets"):
            values = " or ".join(f"{value:g}" for value in sorted(set(added.values())))
            found.append(
                f"mlx-lm stores {len(added)} of these weights as the {side}'s + {values}, such as "
                f"{next(iter(added))}: compared and handed over as mlx-lm stores them"
            )
    return found


def _not_drawn(
    subject: dict[str, Array], reference: dict[str, Array], noise: Noise
) -> list[Metric]:
    """Tensors that come from the checkpoint and not from a generator: magnitudes, weights."""
    ours, theirs = (
        {name: value for name, value in tensors.items() if not is_factor(name)}
        for tensors in (subject, reference)
    )
    return [compare_group("tensors that are not drawn", ours, theirs, noise)] if theirs else []


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


def distributions(subject: Trace, reference: Trace) -> list[Metric]:
    """The distribution of A on both sides, each in the dtype it is stored in."""
    return [
        metric
        for side, trace in (("subject", subject), ("reference", reference))
        for metric in distribution(side, trace.group("adapter"), str(trace.scalars["dtype"]))
    ]


def distribution(side: str, tensors: dict[str, Array], dtype: str = "float32") -> list[Metric]:
    """A against U(-1/sqrt(in), 1/sqrt(in)), PEFT's Kaiming bound and mlx-lm's alike.

    Each tensor, scaled to (-1, 1), and all of them together are held against the uniform distribution
    with the Kolmogorov–Smirnov test (exact p-values: Simard and L'Ecuyer 2011). Of m tensors those are
    named that Holm's procedure (1979) rejects; half of `ALPHA` is for them, half for the pool. Values
    of half precision lie on a grid, which moves a distribution function by a quarter of its step.

    Args:
        side: `subject` or `reference`.
        tensors: Adapter tensors by name; lora_a is (in, r).
        dtype: What they are stored in.
    """
    scaled = {
        name: np.sort(v.ravel().astype(np.float64) * np.sqrt(inputs_of(v)))
        for name, v in tensors.items()
        if name.endswith(".lora_a") and v.size
    }
    if not scaled:
        return [nothing(f"distribution of A, {side}")]
    step = EPS.get(dtype, EPS["float32"])
    grid = step / 4

    def critical(size: int, alpha: float) -> float:
        return _kolmogorov_smirnov("isf", [(alpha, size)])[0] + grid

    size = sum(value.size for value in scaled.values())
    pooled = _distance(np.sort(np.concatenate(list(scaled.values()))))
    distances = {name: _distance(value) for name, value in scaled.items()}
    tested = [(max(0.0, d - grid), scaled[name].size) for name, d in distances.items()]
    p = dict(zip(distances, _kolmogorov_smirnov("sf", tested), strict=True))
    rejected = holm(p, ALPHA / 2)
    worst = min(p, key=lambda name: (p[name], -distances[name]))
    least = critical(scaled[worst].size, ALPHA / 2 / len(p))
    if rejected:
        shown = ", ".join(
            _described(name, tensors[name], distances[name]) for name in rejected[:NAMED]
        )
        more = f" and {len(rejected) - NAMED} more" if len(rejected) > NAMED else ""
        note = (
            f"{len(rejected)} of {len(p)} tensors are not uniform within their bound: {shown}{more}"
        )
    else:
        note = f"least p of {len(p)} tensors {p[worst]:.3g}"
    edges = {name: float(np.abs(value).max()) - 1 for name, value in scaled.items()}
    edge = max(edges, key=lambda name: edges[name])
    beyond = max(0.0, edges[edge])
    each_one = _judged(f"distribution of each A, {side}", distances[worst], least, len(p), note)
    return [
        _judged(
            f"bound of A, {side}",
            beyond,
            max(1e-6, step),
            size,
            f"|A|·√in is {beyond:.2g} over 1 in {edge}" if beyond else "none is over 1",
        ),
        each_one.model_copy(
            update={"mismatched": len(rejected), "where": worst if rejected else ""}
        ),
        _judged(
            f"distribution of A, {side}",
            pooled,
            critical(size, ALPHA / 2),
            size,
            f"all {len(p)} tensors together: Kolmogorov–Smirnov D = {pooled:.4f}",
        ),
    ]


def _kolmogorov_smirnov(function: str, arguments: list[tuple[float, int]]) -> list[float]:
    """The survival function of D, or its inverse, at each (value, number of draws)."""

    def computed() -> str:
        from scipy.stats import kstwo  # nearly a second

        return dumps([float(getattr(kstwo, function)(*pair)) for pair in arguments])

    parts = version("scipy"), function, arguments
    found: list[float] = loads(kept("kolmogorov-smirnov", parts, computed))
    return found


def holm(p: dict[str, float], alpha: float) -> list[str]:
    """Names whose hypothesis Holm's step-down procedure (1979) rejects, the smallest p first."""
    rejected = []
    for rank, name in enumerate(sorted(p, key=lambda name: p[name])):
        if p[name] > alpha / (len(p) - rank):
            break
        rejected.append(name)
    return rejected


def _distance(ordered: Array) -> float:
    """Greatest distance of an empirical distribution function from that of U(-1, 1)."""
    uniform, n = np.clip((ordered + 1) / 2, 0, 1), ordered.size
    above = np.arange(1, n + 1) / n - uniform
    return float(max(above.max(), (uniform - np.arange(n) / n).max()))


def _described(name: str, tensor: Array, distance: float) -> str:
    """A tensor that is not uniform, with its spread: that of a uniform one is 1."""
    if not tensor.any():
        return f"{name} (all zero)"
    spread = float(np.std(tensor.astype(np.float64)) * np.sqrt(3 * inputs_of(tensor)))
    return f"{name} ({spread:.2g} times the spread of a uniform one, D = {distance:.2g})"


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
