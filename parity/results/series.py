"""Step-for-step differences summarized over seeds. Bad input raises ValueError."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from parity.record import Record
from parity.results.statistics import PairedTest, check_count, check_fraction, mcnemar

if TYPE_CHECKING:
    from parity.cells.plan import GridRow

StepTolerance = float | Sequence[float]


@dataclass(frozen=True, slots=True)
class SeriesComparison:
    """Differences step for step, keyed by seed; steps count from 1.

    `quartiles` of max |d| (25 %, median, 75 %) and `sign`, the sign test of the mean difference
    (`b` seeds positive, `c` negative, ties dropped), use the `complete` seeds only. `problems`
    names every truncated, non-finite or constant series; nothing is green unless it is empty.
    """

    steps: int
    complete: tuple[int, ...]
    max_abs: dict[int, float]
    quartiles: tuple[float, ...] | None
    sign: PairedTest
    systematic: bool
    first_divergent: dict[int, int | None]
    problems: tuple[str, ...]


def series_over_seeds(
    diffs: Mapping[int, Sequence[float]],
    tolerance: StepTolerance | Mapping[int, StepTolerance],
    metric: Mapping[int, Sequence[float]] | None = None,
    steps: int = 0,
    alpha: float = 0.05,
) -> SeriesComparison:
    """Summarize step-for-step differences (dloss, dgrad), one series per seed.

    Args:
        diffs: Subject minus reference at each step, in the metric's unit, keyed by seed.
        tolerance: Largest |d| allowed, or one per step, or either of them keyed by seed.
        metric: The metric itself, to tell bit-identical from never measured. Without it, each
            seed whose difference is constant (0 included) is named.
        steps: Steps that were asked for; the longest series or tolerance if that is more.
        alpha: Level of the sign test; at 0.05 fewer than 6 seeds cannot be systematic.
    """
    check_fraction("alpha", alpha, 0.5)
    check_count("steps", steps)
    if not diffs:
        raise ValueError(f"diffs = {diffs!r}: give the differences of at least one seed")
    series = {seed: np.asarray(diffs[seed], np.float64) for seed in sorted(diffs)}
    watched = diffs if metric is None else metric
    values = {seed: np.asarray(watched.get(seed, ()), np.float64) for seed in series}
    limits = {}
    for seed, d in series.items():
        limit = tolerance.get(seed, ()) if isinstance(tolerance, Mapping) else tolerance
        limits[seed] = t = np.asarray(limit, np.float64)
        if d.ndim != 1 or values[seed].shape != d.shape:
            shapes = f"{d.shape} differences, {values[seed].shape} metric values"
            raise ValueError(f"seed {seed}: {shapes}: give one of each per step")
        if not np.all(np.isfinite(t) & (t >= 0)) or (t.ndim and t.size < max(d.size, 1)):
            fix = f"give one finite number >= 0, or {d.size} of them"
            raise ValueError(f"seed {seed}: tolerance = {limit!r}: {fix}")
    steps = max(steps, *(x.size for x in (*series.values(), *limits.values())))

    complete: list[int] = []
    max_abs: dict[int, float] = {}
    first_divergent: dict[int, int | None] = {}
    problems: list[str] = []
    for seed, d in series.items():
        t = limits[seed][: d.size] if limits[seed].ndim else limits[seed]
        beyond, bad = np.flatnonzero(~(np.abs(d) <= t)), np.flatnonzero(~np.isfinite(d))
        first_divergent[seed] = int(beyond[0]) + 1 if beyond.size else None
        max_abs[seed] = float(np.abs(d).max()) if d.size else float("nan")
        if d.size < steps:
            problems.append(f"seed {seed}: truncated, {d.size} of {steps} steps")
        if bad.size:
            problems.append(f"seed {seed}: not finite at step {bad[0] + 1}, value {d[bad[0]]}")
        if d.size > 1 and np.all(values[seed] == values[seed][0]):
            problems.append(f"seed {seed}: constant over {d.size} steps, was it measured?")
        if d.size == steps and not bad.size:
            complete.append(seed)
    means = np.array([series[seed].mean() for seed in complete])
    sign = mcnemar(int(np.sum(means > 0)), int(np.sum(means < 0)))
    spread = [max_abs[seed] for seed in complete]
    quartiles = tuple(np.percentile(spread, [25, 50, 75]).tolist()) if spread else None
    return SeriesComparison(
        steps,
        tuple(complete),
        max_abs,
        quartiles,
        sign,
        sign.exact_p <= alpha,
        first_divergent,
        tuple(problems),
    )


# The series of a record, by difference: the stem of both sides' series and the metric that gates.
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
    asked = max(int(r.reference.recipe.get("train.steps", 0)) for r in records)
    # A zero stands for tolerances that differ by seed and step: the metric has judged by them.
    found = series_over_seeds(diffs, 0.0, values if known else None, asked)
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
        found.quartiles[1] if found.quartiles else float("nan"),
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
