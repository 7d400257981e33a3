"""Step-for-step differences of training curves, summarized over seeds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from parity.record import Record
from parity.results.statistics import PairedTest, check_count, mcnemar

if TYPE_CHECKING:
    from parity.cells.plan import GridRow

ALPHA = 0.05
"""Level of the sign test; with fewer than 6 seeds it can find nothing."""


@dataclass(frozen=True, slots=True)
class SeriesComparison:
    """Differences step for step, keyed by seed; steps count from 1.

    `median` of max |d| and `sign`, the sign test of the mean difference (`b` seeds positive, `c`
    negative, ties dropped), use the `complete` seeds only. `problems` names every series that is cut
    short, not finite or constant.
    """

    steps: int
    complete: tuple[int, ...]
    max_abs: dict[int, float]
    median: float
    sign: PairedTest
    systematic: bool
    problems: tuple[str, ...]


def series_over_seeds(
    diffs: Mapping[int, Sequence[float]],
    values: Mapping[int, Sequence[float]] | None = None,
    steps: int = 0,
) -> SeriesComparison:
    """Summarizes step-for-step differences (dloss, dgrad), one series per seed.

    Args:
        diffs: Subject minus reference at each step, in the unit of the quantity, keyed by seed.
        values: The quantity itself: if it varies, a difference of 0 at every step is bit-identity.
            Without it, each seed whose difference is constant (0 included) is named.
        steps: Steps that the recipe has; the longest series if that is more.

    Raises:
        ValueError: There is no seed, a series is not one-dimensional, or `values` has other lengths.
    """
    check_count("steps", steps)
    if not diffs:
        raise ValueError(f"diffs = {diffs!r}: give the differences of at least one seed")
    series = {seed: np.asarray(diffs[seed], np.float64) for seed in sorted(diffs)}
    measured = diffs if values is None else values
    shown = {seed: np.asarray(measured.get(seed, ()), np.float64) for seed in series}
    for seed, d in series.items():
        if d.ndim != 1 or shown[seed].shape != d.shape:
            shapes = f"{d.shape} differences, {shown[seed].shape} values"
            raise ValueError(f"seed {seed}: {shapes}: give one of each per step")
    steps = max(steps, *(d.size for d in series.values()))

    complete: list[int] = []
    problems: list[str] = []
    for seed, d in series.items():
        bad = np.flatnonzero(~np.isfinite(d))
        if d.size < steps:
            problems.append(f"seed {seed}: truncated, {d.size} of {steps} steps")
        if bad.size:
            problems.append(f"seed {seed}: not finite at step {bad[0] + 1}, value {d[bad[0]]}")
        if d.size > 1 and np.all(shown[seed] == shown[seed][0]):
            problems.append(f"seed {seed}: constant over {d.size} steps, was it measured?")
        if d.size == steps and not bad.size:
            complete.append(seed)
    max_abs = {
        seed: float(np.abs(d).max()) if d.size else float("nan") for seed, d in series.items()
    }
    means = np.array([series[seed].mean() for seed in complete])
    sign = mcnemar(int(np.sum(means > 0)), int(np.sum(means < 0)))
    return SeriesComparison(
        steps,
        tuple(complete),
        max_abs,
        float(np.median([max_abs[seed] for seed in complete])) if complete else float("nan"),
        sign,
        sign.exact_p <= ALPHA,
        tuple(problems),
    )


# Name of a difference to the stem of both sides' series and the metric that judges it.
QUANTITIES = {
    "dloss": ("loss", "loss per step"),
    "dgrad": ("gradient_norm", "gradient_norm per step"),
    "dloss as shipped": ("", ""),
}

STEP_COLUMNS = {
    "loss_subject": "loss subject",
    "loss_reference": "loss reference",
    "dloss": "dloss",
    "grad_subject": "gradient_norm subject",
    "grad_reference": "gradient_norm reference",
    "dgrad": "dgrad",
}
"""Columns of the step table and the series that fill them."""


class Curve(NamedTuple):
    """One difference over all seeds of a row of the grid."""

    row: GridRow
    quantity: str
    """A key of `QUANTITIES`."""
    seeds: tuple[int, ...]
    steps: int
    largest: float
    """Greatest |d| of any seed and step."""
    median: float
    """Median over the complete seeds of the greatest |d|."""
    nearest: float
    """The difference that came nearest to its tolerance or went farthest beyond."""
    tolerance: float
    """What was allowed where a seed came nearest to it or went farthest beyond; NaN: not gated."""
    first_step: int | None
    """Earliest step over the tolerance in any seed, counted from 1."""
    over: tuple[int, ...]
    """Seeds that go over the tolerance."""
    higher: int
    """Seeds in which the subject's mean is above the reference's."""
    lower: int
    sign_p: float
    systematic: bool
    problems: tuple[str, ...]


def curves(rows: Mapping[GridRow, Sequence[Record]]) -> Iterator[Curve]:
    """Each difference of each row that has any."""
    for row, records in rows.items():
        for quantity, (stem, metric) in QUANTITIES.items():
            having = [r for r in records if quantity in r.series or f"{stem} subject" in r.series]
            if having:
                yield _curve(row, quantity, stem, metric, having)


def _curve(row: GridRow, quantity: str, stem: str, metric: str, records: Sequence[Record]) -> Curve:
    diffs = {r.seed: r.series.get(quantity, []) for r in records}
    values = {r.seed: r.series.get(f"{stem} reference", [])[: len(diffs[r.seed])] for r in records}
    known = all(len(values[seed]) == len(d) for seed, d in diffs.items())
    steps = max(int(r.reference.recipe.get("train.steps", 0)) for r in records)
    found = series_over_seeds(diffs, values if known else None, steps)
    gates = {r.seed: m for r in records for m in r.metrics if m.name == metric}
    over = {seed: m.step for seed, m in gates.items() if m.step is not None}
    top = max(
        gates.values(),
        key=lambda m: m.value / m.tolerance if m.tolerance else m.value,
        default=None,
    )
    # As shipped nothing is gated, so a difference of zero throughout is no problem there.
    problems = [p for p in found.problems if stem or "constant" not in p]
    return Curve(
        row,
        quantity,
        tuple(diffs),
        found.steps,
        float(np.max([*found.max_abs.values()])),
        found.median,
        top.value if top else float("nan"),
        top.tolerance if top else float("nan"),
        min(over.values(), default=None),
        tuple(over),
        found.sign.b,
        found.sign.c,
        found.sign.exact_p,
        found.systematic,
        tuple(problems),
    )


def steps(rows: Mapping[GridRow, Sequence[Record]]) -> Iterator[dict[str, object]]:
    """Losses, gradient norms and their differences, one mapping a step; NaN where one is short."""
    for row, records in rows.items():
        for record in records:
            columns = [record.series.get(name, []) for name in STEP_COLUMNS.values()]
            for index, values in enumerate(zip_longest(*columns, fillvalue=float("nan"))):
                place = {**row._asdict(), "seed": record.seed, "step": index + 1}
                yield place | dict(zip(STEP_COLUMNS, values, strict=True))
