"""Step-for-step differences of training curves, summarized over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from parity.results.statistics import PairedTest, check_count, mcnemar
from parity.trace import Array

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
    lengths = np.array([d.size for d in series.values()])
    d, v = (np.concatenate([*of.values()]) for of in (series, shown))
    return summary(np.array([*series]), stats_of(d, lengths), stats_of(v, lengths).constant, steps)


class SeriesStats(NamedTuple):
    """What is known of each of many series: arrays with one entry a series."""

    size: Array
    max_abs: Array
    """NaN where a value is, or where there is none."""
    mean: Array
    bad: Array
    """Index of the first value that is not finite, -1 without one."""
    bad_value: Array
    constant: Array
    """Whether it has several values, all equal."""


def stats_of(values: Array, lengths: Array) -> SeriesStats:
    """Statistics of series that lie one after the other in `values`."""
    n, full = len(lengths), lengths > 0
    starts = (np.cumsum(lengths) - lengths)[full]
    max_abs, mean, bad_value = (np.full(n, np.nan) for _ in range(3))
    bad, constant = np.full(n, -1), np.zeros(n, bool)
    if starts.size:
        max_abs[full] = np.maximum.reduceat(np.abs(values), starts)
        with np.errstate(invalid="ignore"):
            mean[full] = np.add.reduceat(values, starts) / lengths[full]
        first = np.repeat(values[starts], lengths[full])
        constant[full] = np.logical_and.reduceat(values == first, starts)
        of = np.repeat(np.arange(n), lengths)
        at = np.flatnonzero(~np.isfinite(values))
        which, index = np.unique(of[at], return_index=True)
        bad[which] = at[index] - (np.cumsum(lengths) - lengths)[which]
        bad_value[which] = values[at[index]]
    return SeriesStats(lengths, max_abs, mean, bad, bad_value, constant & (lengths > 1))


def summary(seeds: Array, d: SeriesStats, constant: Array, steps: int = 0) -> SeriesComparison:
    """The same of many series, given what is known of each.

    Args:
        seeds: In the order of the series, ascending.
        d: Of the differences.
        constant: Whether the quantity of a series is constant.
        steps: Steps that the recipe has.
    """
    steps = max(steps, int(d.size.max()))
    complete = (d.size == steps) & (d.bad < 0)
    problems: list[str] = []
    for i in np.flatnonzero((d.size < steps) | (d.bad >= 0) | constant):
        if d.size[i] < steps:
            problems.append(f"seed {seeds[i]}: truncated, {d.size[i]} of {steps} steps")
        if d.bad[i] >= 0:
            where = f"not finite at step {d.bad[i] + 1}, value {d.bad_value[i]}"
            problems.append(f"seed {seeds[i]}: {where}")
        if constant[i]:
            problems.append(f"seed {seeds[i]}: constant over {d.size[i]} steps, was it measured?")
    sign = mcnemar(int(np.sum(d.mean[complete] > 0)), int(np.sum(d.mean[complete] < 0)))
    return SeriesComparison(
        steps,
        tuple(seeds[complete].tolist()),
        dict(zip(seeds.tolist(), d.max_abs.tolist(), strict=True)),
        float(np.median(d.max_abs[complete])) if complete.any() else float("nan"),
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

COLUMNS = {"dloss": "dloss", "dgrad": "dgrad", "dloss as shipped": "dloss_shipped"}
"""The column of a store that holds a difference."""
VALUES = {"dloss": "loss_reference", "dgrad": "grad_reference", "dloss as shipped": ""}
"""That of the quantity itself on the reference's side."""


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


class Gate(NamedTuple):
    """The metric that judges a difference, for many records; NaN and -1 where one has none."""

    value: Array
    tolerance: Array
    step: Array


def curve(
    row: GridRow,
    quantity: str,
    seeds: Array,
    d: SeriesStats,
    values: SeriesStats,
    gate: Gate,
    steps: int,
) -> Curve:
    """One difference over the seeds of a row, in ascending order.

    Args:
        row: Of the grid.
        quantity: A key of `QUANTITIES`.
        seeds: One of each series.
        d: Of the differences.
        values: Of the reference's quantity: if it varies, a difference of 0 is bit-identity.
        gate: What judges the differences.
        steps: Steps that the recipe has.
    """
    known = bool(np.all(values.size >= d.size))
    found = summary(seeds, d, values.constant if known else d.constant, steps)
    over = gate.step >= 0
    size = np.where(gate.tolerance > 0, gate.value / np.where(gate.tolerance > 0, gate.tolerance, 1), gate.value)  # fmt: skip
    gated = ~np.isnan(gate.tolerance)
    top = int(np.argmax(np.where(gated, np.nan_to_num(size, nan=np.inf), -1.0)))
    # As shipped nothing is gated, so a difference of zero throughout is no problem there.
    problems = [p for p in found.problems if QUANTITIES[quantity][0] or "constant" not in p]
    return Curve(
        row,
        quantity,
        tuple(seeds.tolist()),
        found.steps,
        float(np.max([*found.max_abs.values()])),
        found.median,
        float(gate.value[top]) if gated.any() else float("nan"),
        float(gate.tolerance[top]) if gated.any() else float("nan"),
        int(gate.step[over].min()) if over.any() else None,
        tuple(seeds[over].tolist()),
        found.sign.b,
        found.sign.c,
        found.sign.exact_p,
        found.systematic,
        tuple(problems),
    )
