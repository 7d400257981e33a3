"""Distances between arrays, and what rounding alone explains of them.

The floor of a tensor is the greatest of four measured things: how far the reference itself is
from the float64 referee, how far it moves when its input moves by one ulp, how much a sum over the
vocabulary depends on its order (`stages/noise.py`), and one ulp of the
tensor's own magnitude. The tolerance is `HEADROOM` times the floor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from parity.record import Metric, Verdict
from parity.trace import Array, first_difference

HEADROOM = 8.0
"""How many floors a clean cell may be off. The three sources are single draws of an error whose
other draw is the subject's own rounding; `reports/calibration.md` shows the distribution."""

EPS = {"float64": 2.0**-52, "float32": 2.0**-23, "bfloat16": 2.0**-7, "float16": 2.0**-10}
"""Distance from 1 to the next number of a dtype."""


NEARER = "the subject is nearer to float64 than the reference"

LOGARITHMS = ("loss", "token_loss", "completion_loss")


@dataclass(frozen=True)
class Noise:
    """What is known of the rounding around a reference.

    Attributes:
        exact: Bits must be equal; the rest then only explains.
        referee: The same quantities in float64, by name; may be empty.
        perturbed: The reference with its input moved by one ulp, by name; may be empty.
        own: How far each element of the subject moves under the same perturbation, by name. Asked for
            in half precision only, where the two sides round in different places.
        reduction: How much a sum over the vocabulary depends on its order: absolute for what is a
            logarithm of it (losses), relative for what is divided by it (gradients).
    """

    exact: bool
    referee: Mapping[str, Array] = field(default_factory=dict)
    perturbed: Mapping[str, Array] = field(default_factory=dict)
    own: Mapping[str, Array] = field(default_factory=dict)
    reduction: float = 0.0

    def summed(self, name: str, reference: Array) -> Array:
        """What the order of the sum over the vocabulary explains, elementwise."""
        if name in LOGARITHMS:
            return np.full(reference.shape, self.reduction)
        return self.reduction * np.abs(reference)

    def floor(self, name: str, reference: Array) -> float:
        """The noise floor of one tensor."""
        floor = precision(reference) * float(np.max(np.abs(reference), initial=0.0))
        floor = max(floor, float(np.max(self.summed(name, reference), initial=0.0)))
        for other in (self.referee.get(name), self.perturbed.get(name)):
            if other is not None and other.shape == reference.shape:
                floor = max(floor, distance(reference, other))
        return max(floor, float(np.max(self.own.get(name, 0.0), initial=0.0)))


def precision(array: Array) -> float:
    """Distance from 1 to the next number of the dtype that the values were computed in.

    Half precision travels as float32 (exact), so the values tell: if none uses a digit that bfloat16
    or float16 lacks, one of these is where they come from.
    """
    if array.dtype == np.float16:
        return EPS["float16"]
    if array.dtype == np.float32 and array.size > 1:
        if not (np.ascontiguousarray(array).view(np.uint32) & 0xFFFF).any():
            return EPS["bfloat16"]
        with np.errstate(over="ignore"):
            if np.array_equal(array, array.astype(np.float16)):
                return EPS["float16"]
    return EPS["float32"]


def distance(a: Array, b: Array) -> float:
    """Greatest absolute difference, in float64."""
    if a.size == 0:
        return 0.0
    with np.errstate(invalid="ignore"):  # infinities on both sides
        return float(np.max(np.abs(a.astype(np.float64) - b.astype(np.float64))))


def perturb(array: Array, rng: np.random.Generator, dtype: str = "float32") -> Array:
    """Every element moved by one ulp of `dtype`, up or down at random; integers and bools stay."""
    if not np.issubdtype(array.dtype, np.floating):
        return array
    values = array.astype(np.float64)
    # The exponent is read, not computed: a logarithm rounds otherwise in another library.
    binade = np.where(values == 0, 0.0, np.ldexp(1.0, np.frexp(values)[1] - 1))
    signs = np.where(rng.random(array.shape) < 0.5, -1.0, 1.0)
    return np.asarray(values + signs * binade * EPS[dtype], array.dtype)


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
            minimum_required_tolerance=float(total),
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
            "minimum_required_tolerance": max(m.minimum_required_tolerance for m in metrics),
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
    floor = noise.floor(name, reference)
    tolerance = 0.0 if noise.exact else HEADROOM * floor
    referee = noise.referee.get(name)
    errors: tuple[float | None, float | None] = (None, None)
    if referee is not None and referee.shape == reference.shape:
        errors = distance(subject, referee), distance(reference, referee)
    verdict, accepted = Verdict.DIVERGE, ""
    if value == 0:
        verdict = Verdict.IDENTICAL
    elif value <= tolerance:
        verdict = Verdict.AGREE
    elif not noise.exact and None not in errors and errors[0] <= errors[1]:  # type: ignore[operator]
        verdict, accepted = Verdict.AGREE, NEARER
    scale = np.abs(reference.astype(np.float64))
    relative = float((difference / np.where(scale == 0, np.inf, scale)).max(initial=0.0))
    return Metric(
        name=name,
        verdict=verdict,
        value=value,
        tolerance=tolerance,
        minimum_required_tolerance=value,
        floor=floor,
        relative=relative,
        mismatched=int(np.count_nonzero(difference)),
        total=int(reference.size),
        where=f"{name} {_at(index)}".strip() if value else "",
        error_subject=errors[0],
        error_reference=errors[1],
        off=side_off(*errors, floor) if verdict is Verdict.DIVERGE else "",
        accepted=accepted,
        note=accepted,
    )


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
    floors = np.maximum(EPS["float32"] * np.abs(reference), noise.summed(name, reference))
    for other in (noise.referee.get(name), noise.perturbed.get(name)):
        if other is not None and len(other) == len(reference):
            floors = np.maximum(floors, np.abs(other.astype(np.float64) - reference))
    if len(own := noise.own.get(name, np.zeros(0))) == len(reference):
        floors = np.maximum(floors, own)
    floors = np.maximum.accumulate(floors)
    tolerances = np.zeros_like(floors) if noise.exact else HEADROOM * floors
    over = difference > tolerances
    referee = noise.referee.get(name)
    errors: tuple[float | None, float | None] = (None, None)
    if referee is not None and len(referee) == len(reference):
        errors = distance(subject, referee), distance(reference, referee)
        if not noise.exact:  # a subject that is nearer to float64 than the reference is not off
            over &= np.abs(subject - referee) > np.abs(reference - referee)
    steps = np.flatnonzero(over)
    ratio = difference / np.where(floors == 0, np.inf, floors)
    place = int((difference if noise.exact else ratio).argmax())
    verdict = Verdict.DIVERGE if steps.size else Verdict.AGREE
    if not difference.any():
        verdict = Verdict.IDENTICAL
    return Metric(
        name=name,
        verdict=verdict,
        value=float(difference[place]),
        tolerance=float(tolerances[place]),
        minimum_required_tolerance=float(difference.max()),
        floor=float(floors[place]),
        relative=float((difference / np.maximum(np.abs(reference), 1e-30)).max()),
        mismatched=int(np.count_nonzero(difference)),
        total=len(reference),
        where=f"{name} step {int(steps[0]) + 1}" if steps.size else "",
        step=int(steps[0]) + 1 if steps.size else None,
        error_subject=errors[0],
        error_reference=errors[1],
        off=side_off(*errors, float(floors.max())) if steps.size else "",
        accepted=NEARER
        if verdict is Verdict.AGREE and difference[place] > tolerances[place]
        else "",
    )


def _at(index: tuple[int, ...] | tuple[np.intp, ...]) -> str:
    return f"at ({', '.join(str(int(i)) for i in index)})" if len(index) else ""
