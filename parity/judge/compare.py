"""Distances between arrays, judged bit for bit or under a noise floor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from parity.judge.noise import EPS, HEADROOM, Noise, Sources, distance, greatest, listed
from parity.record import Metric, Verdict
from parity.trace import Array, first_difference

NEARER = "the subject is nearer to float64 than the reference"


def compare_exact(name: str, subject: Array, reference: Array, note: str = "") -> Metric:
    """Compares what has no rounding: ids, sets, counts.

    `value` is the number of elements that differ; arrays of different shape differ wholly.
    """
    if subject.shape != reference.shape:
        total = max(subject.size, reference.size)
        lead = first_difference(subject.ravel(), reference.ravel())
        return Metric(
            name=name,
            verdict=Verdict.DIVERGE,
            value=float(total),
            tolerance=0.0,
            minimum_required_tolerance=float("inf"),
            mismatched=total,
            total=total,
            where=f"{name} [{lead}]",
            note=f"shape {subject.shape} against {reference.shape}",
        )
    unequal = subject != reference
    count = int(np.count_nonzero(unequal))
    index = tuple(int(i) for i in np.argwhere(unequal)[0]) if count else ()
    if subject.size == 0:
        return nothing(name)
    return Metric(
        name=name,
        verdict=Verdict.DIVERGE if count else Verdict.IDENTICAL,
        value=float(count),
        tolerance=0.0,
        minimum_required_tolerance=float(count),
        mismatched=count,
        total=int(subject.size),
        where=f"{name} {_at(index)}" if count else "",
        note=f"{subject[index]} against {reference[index]}" if count else note,
    )


def nothing(name: str) -> Metric:
    """A metric that had nothing to compare: never green."""
    return Metric(
        name=name,
        verdict=Verdict.INCONCLUSIVE,
        value=0.0,
        tolerance=0.0,
        minimum_required_tolerance=0.0,
        note="nothing to compare",
    )


def compare(name: str, subject: Array, reference: Array, noise: Noise) -> Metric:
    """Compares one tensor under the noise floor measured around the reference."""
    return compare_group(name, {name: subject}, {name: reference}, noise)


def compare_group(
    name: str, subject: Mapping[str, Array], reference: Mapping[str, Array], noise: Noise
) -> Metric:
    """Compares tensors of equal names; the metric speaks of the one most over its tolerance.

    Unmatched names and shapes diverge; nothing at all, or non-finite values on both sides, is
    inconclusive.
    """
    if lone := sorted(subject.keys() ^ reference.keys()):
        side = "subject" if lone[0] in subject else "reference"
        return Metric(
            name=name,
            verdict=Verdict.DIVERGE,
            value=float(len(lone)),
            tolerance=0.0,
            minimum_required_tolerance=float("inf"),
            mismatched=len(lone),
            total=len(subject.keys() | reference.keys()),
            where=lone[0],
            note=f"{len(lone)} unmatched names, the first ({lone[0]}) in the {side} only",
        )
    metrics = [_tensor(key, subject[key], reference[key], noise) for key in reference]
    if not metrics or not sum(metric.total for metric in metrics):
        return nothing(name)
    top = max(metrics, key=_excess)
    return top.model_copy(
        update={
            "name": name,
            "mismatched": sum(metric.mismatched for metric in metrics),
            "total": sum(metric.total for metric in metrics),
        }
    )


def _excess(metric: Metric) -> tuple[int, float]:
    """Sorts by verdict, then by how far over its tolerance."""
    order = {Verdict.INCONCLUSIVE: 1, Verdict.DIVERGE: 2}.get(metric.verdict, 0)
    if not np.isfinite(metric.value):
        return order, np.inf
    return order, metric.value / metric.tolerance if metric.tolerance else metric.value


def _tensor(name: str, subject: Array, reference: Array, noise: Noise) -> Metric:
    if subject.shape != reference.shape:
        return compare_exact(name, subject, reference)
    finite = np.isfinite(subject), np.isfinite(reference)
    if not (finite[0].all() and finite[1].all()):
        return _non_finite(name, *finite)
    difference = np.abs(subject.astype(np.float64) - reference.astype(np.float64))
    value = float(difference.max(initial=0.0))
    index = np.unravel_index(int(difference.argmax()), difference.shape) if value else ()
    sources = listed(noise.sources(name, reference))
    floor = greatest(sources)
    tolerance = 0.0 if noise.exact else HEADROOM * floor
    errors = _errors(name, subject, reference, noise)
    nearer = _may_be_nearer(noise, errors) and errors[0] <= errors[1]  # type: ignore[operator]
    relative = 0.0
    if value:
        scale = np.abs(reference.astype(np.float64))
        relative = float((difference / np.where(scale == 0, np.inf, scale)).max(initial=0.0))
    judged = _judged(value, tolerance, value > tolerance and not nearer, noise, sources)
    return Metric(
        name=name,
        value=value,
        tolerance=tolerance,
        minimum_required_tolerance=value,
        floor=floor,
        relative=relative,
        mismatched=int(np.count_nonzero(difference)) if value else 0,
        total=int(reference.size),
        where=f"{name} {_at(index)}".strip() if value else "",
        error_subject=errors[0],
        error_reference=errors[1],
        off=side_off(*errors, floor) if judged["verdict"] is Verdict.DIVERGE else "",
        accepted=NEARER if judged["verdict"] is Verdict.AGREE and value > tolerance else "",
        **judged,
    )


def _errors(
    name: str, subject: Array, reference: Array, noise: Noise
) -> tuple[float | None, float | None]:
    """How far either side is from the float64 referee."""
    referee = noise.referee.get(name)
    if referee is None or referee.shape != reference.shape:
        return None, None
    return distance(subject, referee), distance(reference, referee)


def _may_be_nearer(noise: Noise, errors: tuple[float | None, float | None]) -> bool:
    """Whether being nearer to float64 than the reference excuses a subject.

    Only where the float64 run is the reference's own implementation: else the reference may be off
    for another reason than rounding.
    """
    return not noise.exact and noise.rounded_is_reference and None not in errors


def _judged(
    value: float, tolerance: float, over: bool, noise: Noise, sources: dict[str, float | str]
) -> dict[str, Any]:
    """Verdict, note and the sources of a floor, of each the greatest value.

    What would diverge while the floor lacks its main source is inconclusive: that source might
    explain the difference.
    """
    verdict, note = Verdict.AGREE, ""
    if value == 0 and not over:
        verdict = Verdict.IDENTICAL
    elif over and not noise.exact and (reason := noise.lacking(sources)):
        verdict, note = Verdict.INCONCLUSIVE, f"the floor lacks the {noise.main}: {reason}"
    elif over:
        verdict = Verdict.DIVERGE
    return {
        "verdict": verdict,
        "note": note,
        "sources": sources,
        "why_floor": noise.why_floor,
    }


def side_off(subject: float | None, reference: float | None, floor: float) -> str:
    """Which side the float64 referee finds off; empty without a referee."""
    if subject is None or reference is None:
        return ""
    # A side is off when its error is a multiple of the other's and beyond rounding.
    allowed = HEADROOM * max(min(subject, reference), EPS["float64"])
    off = [side for side, e in (("subject", subject), ("reference", reference)) if e > allowed]
    if off:
        return off[0]
    return "both" if min(subject, reference) > HEADROOM * floor else "neither"


def _non_finite(name: str, subject: Array, reference: Array) -> Metric:
    counts = int((~subject).sum()), int((~reference).sum())
    both = bool(np.array_equal(subject, reference))
    return Metric(
        name=name,
        verdict=Verdict.INCONCLUSIVE if both else Verdict.DIVERGE,
        value=float("nan"),
        tolerance=0.0,
        minimum_required_tolerance=float("inf"),
        mismatched=sum(counts),
        total=int(reference.size),
        where=name,
        note=f"non-finite values: {counts[0]} in the subject, {counts[1]} in the reference",
    )


def compare_series(name: str, subject: Array, reference: Array, noise: Noise) -> Metric:
    """Compares a quantity step for step.

    Rounding piles up along a trajectory: the floor of a step is the greatest seen up to it. A
    truncated series diverges; one that is constant over all steps is inconclusive, for then the
    channel read is hardly the channel meant.
    """
    if len(subject) != len(reference):
        metric = compare_exact(name, subject, reference)
        return metric.model_copy(
            update={"note": f"{len(subject)} steps against {len(reference)}: a series is cut short"}
        )
    if not len(subject):
        return nothing(name)
    if not (np.isfinite(subject).all() and np.isfinite(reference).all()):
        return _non_finite(name, np.isfinite(subject), np.isfinite(reference))
    for side, series in (("subject", subject), ("reference", reference)):
        if len(series) > 1 and np.ptp(series) == 0:
            return nothing(name).model_copy(
                update={
                    "total": len(series),
                    "note": f"constant over all {len(series)} steps in the {side}: {series[0]:.6g}",
                }
            )
    difference = np.abs(subject.astype(np.float64) - reference.astype(np.float64))
    sources = noise.sources(name, reference)
    floors = _along(sources)
    tolerances = np.zeros_like(floors) if noise.exact else HEADROOM * floors
    over = difference > tolerances
    errors = _errors(name, subject, reference, noise)
    if _may_be_nearer(noise, errors):
        referee = noise.referee[name]
        over &= np.abs(subject - referee) > np.abs(reference - referee)
    steps = np.flatnonzero(over)
    # The step furthest over its tolerance, of those that count.
    counted = np.where(over, difference, -1.0) if steps.size else difference
    place = int((counted if noise.exact else counted / np.maximum(floors, 1e-300)).argmax())
    value, tolerance = float(difference[place]), float(tolerances[place])
    judged = _judged(float(difference.max()), tolerance, bool(steps.size), noise, listed(sources))
    diverges = judged["verdict"] is Verdict.DIVERGE
    return Metric(
        name=name,
        value=value,
        tolerance=tolerance,
        minimum_required_tolerance=value,
        floor=float(floors[place]),
        relative=float((difference / np.maximum(np.abs(reference), 1e-30)).max()),
        mismatched=int(np.count_nonzero(difference)),
        total=len(reference),
        where=f"{name} step {int(steps[0]) + 1}" if steps.size else "",
        step=int(steps[0]) + 1 if steps.size else None,
        error_subject=errors[0],
        error_reference=errors[1],
        off=side_off(*errors, float(floors.max())) if diverges else "",
        accepted=NEARER if judged["verdict"] is Verdict.AGREE and value > tolerance else "",
        **judged,
    )


def series_floor(name: str, reference: Array, noise: Noise) -> Array:
    """The noise floor at each step, as `compare_series` takes it: the greatest seen up to that step."""
    return _along(noise.sources(name, reference))


def _along(sources: Sources) -> Array:
    measured = [value for value in sources.values() if not isinstance(value, str)]
    floors: Array = np.maximum.accumulate(np.max(measured, axis=0))
    return floors


def _at(index: tuple[int, ...] | tuple[np.intp, ...]) -> str:
    return f"at ({', '.join(str(int(i)) for i in index)})" if len(index) else ""
