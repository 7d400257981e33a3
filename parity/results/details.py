"""What reports list beside the grid: curves, pass rates, notes, and why cells were not compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from parity.cells.plan import GridRow
from parity.files import loads
from parity.results.cells import MISSING, Codes, lists
from parity.results.series import (
    COLUMNS,
    QUANTITIES,
    VALUES,
    Curve,
    Gate,
    SeriesStats,
    curve,
    stats_of,
)
from parity.results.statistics import PairedComparison, holm, paired
from parity.results.store import STEP_COLUMNS, Store, notes_of
from parity.results.texts import without_numbers
from parity.trace import Array

if TYPE_CHECKING:
    import pandas as pd

REASONS = 20
"""Reasons listed for the cells of a row in one state; the rest is counted."""
NOTES = 100
"""Notes listed for a row; the rest is counted."""


class Note(NamedTuple):
    """An observation, once for all seeds in which it was made."""

    kind: str
    """`shipped`, `finding` or `hint`."""
    row: GridRow
    text: str
    seeds: tuple[int, ...]
    varies: bool
    """Whether numbers in it differ from seed to seed; `text` is the first seed's."""


class PassRates(NamedTuple):
    """How often each side completed one prompt as expected, over seeds."""

    row: GridRow
    prompt: str
    comparison: PairedComparison
    holm_p: float
    """Exact McNemar, corrected for all prompts and pairs."""


class Uncompared(NamedTuple):
    """Cells of a row in which nothing was compared, and why."""

    row: GridRow
    seeds: tuple[int, ...]
    reason: str


@dataclass
class Details:
    """See the fields of `Aggregate`."""

    curves: tuple[Curve, ...] = ()
    passes: tuple[PassRates, ...] = ()
    notes: tuple[Note, ...] = ()
    about: tuple[str, ...] = ()
    memory: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def read(store: Store, grid: Sequence[GridRow], row: Array, seed: Array, kept: Array) -> Details:
    """Reads them from the records that count.

    Args:
        store: All records.
        grid: Rows of the grid.
        row: Index into `grid` of each record.
        seed: Of each record.
        kept: Positions of the records that count.
    """
    import pandas as pd

    counts = np.zeros(store.size, bool)
    counts[kept] = True
    found = Details()
    names, about, memory = Codes(), dict[str, None](), dict[str, int]()
    series: dict[str, list[_Series]] = {quantity: [] for quantity in QUANTITIES}
    notes: list[tuple[Array, ...]] = []
    passes: list[tuple[Array, ...]] = []
    columns = ("about", "memory", "steps", "metrics", "notes", "passes", *STEP_COLUMNS)
    for start, batch in store.batches(columns):
        here = np.arange(start, start + batch.num_rows)
        use = counts[here]
        about |= dict.fromkeys(_distinct(batch.column("about"), use))
        for text in _distinct(batch.column("memory"), use):
            for path, peak in loads(text).items():
                memory[path] = max(memory.get(path, 0), peak)
        for quantity, parts in series.items():
            if part := _series(batch, quantity, here, use, names):
                parts.append(part)
        for name, into, fields in (("notes", notes, 3), ("passes", passes, 3)):
            lengths, flat = lists(batch.column(name))
            of = np.repeat(here, lengths)
            some = counts[of]
            if some.any():
                into.append((of[some], *(_values(f, names)[some] for f in flat[:fields])))
    texts = [*names]
    found.about = tuple(dict.fromkeys(part for text in sorted(about) for part in text.split(" · ")))
    found.memory = memory
    found.curves = tuple(_curves(series, grid, row, seed))
    found.problems = [f"{c.quantity}, {c.row.pair}, {p}" for c in found.curves for p in c.problems]
    if passes:
        frame = pd.DataFrame(dict(zip(("of", "side", "prompt", "passed"), map(np.concatenate, zip(*passes, strict=True)), strict=True)))  # fmt: skip
        found.passes = _passes(frame, grid, row, seed, texts)
    if notes:
        frame = pd.DataFrame(dict(zip(("of", "kind", "pattern", "text"), map(np.concatenate, zip(*notes, strict=True)), strict=True)))  # fmt: skip
        found.notes = _notes(store, frame, grid, row, seed, texts, found.problems)
    return found


def _distinct(column: Any, use: Array) -> list[str]:
    codes = Codes()
    return [[*codes][i] for i in np.unique(codes.of(column)[use])]


def _values(column: Any, names: Codes) -> Array:
    import pyarrow as pa

    text = pa.types.is_dictionary(column.type) or pa.types.is_string(column.type)
    if text:
        return names.of(column)
    values: Array = column.to_numpy(zero_copy_only=False)
    return values


class _Series(NamedTuple):
    of: Array
    """Positions."""
    d: SeriesStats
    values: SeriesStats
    gate: Gate
    steps: Array


def _series(batch: Any, quantity: str, here: Array, use: Array, names: Codes) -> _Series | None:
    """The difference in those records of a batch that have it, or the quantity on the subject's side."""
    stem, metric = QUANTITIES[quantity]
    column = batch.column(COLUMNS[quantity])
    having = use & ~column.is_null().to_numpy(zero_copy_only=False)
    if stem:
        subject = batch.column(VALUES[quantity].replace("reference", "subject"))
        having |= use & ~subject.is_null().to_numpy(zero_copy_only=False)
    if not having.any():
        return None
    d = _stats(column, having)
    values = _stats(batch.column(VALUES[quantity]), having) if stem else d
    lengths, (name, _, value, tolerance, _, _, _, step) = lists(batch.column("metrics"))
    of = np.repeat(np.arange(len(here)), lengths)
    judging = names.of(name) == names[metric]
    gate = [np.full(len(here), np.nan), np.full(len(here), np.nan), np.full(len(here), -1)]
    for array, source in zip(gate, (value, tolerance, step.fill_null(-1)), strict=True):
        array[of[judging]] = source.to_numpy(zero_copy_only=False)[judging]
    steps = batch.column("steps").to_numpy(zero_copy_only=False)
    return _Series(here[having], d, values, Gate(*(g[having] for g in gate)), steps[having])


def _stats(column: Any, having: Array) -> SeriesStats:
    lengths, (flat,) = lists(column)
    keep = np.repeat(having, lengths)
    return stats_of(flat.to_numpy(zero_copy_only=False)[keep], lengths[having])


def _curves(
    series: Mapping[str, list[_Series]], grid: Sequence[GridRow], row: Array, seed: Array
) -> list[Curve]:
    found = []
    for quantity, parts in series.items():
        if not parts:
            continue
        of = np.concatenate([p.of for p in parts])
        d, values = (
            SeriesStats(*map(np.concatenate, zip(*(p[i] for p in parts), strict=True)))
            for i in (1, 2)
        )
        gate = Gate(*map(np.concatenate, zip(*(p.gate for p in parts), strict=True)))
        steps = np.concatenate([p.steps for p in parts])
        for number in np.unique(row[of]):
            which = np.flatnonzero(row[of] == number)
            which = which[np.argsort(seed[of[which]], kind="stable")]
            found.append(curve(
                grid[number], quantity, seed[of[which]], SeriesStats(*(a[which] for a in d)),
                SeriesStats(*(a[which] for a in values)), Gate(*(a[which] for a in gate)),
                int(steps[which].max()),
            ))  # fmt: skip
    order = [*QUANTITIES]
    return sorted(found, key=lambda c: (c.row, order.index(c.quantity)))


def _passes(
    frame: pd.DataFrame, grid: Sequence[GridRow], row: Array, seed: Array, texts: Sequence[str]
) -> tuple[PassRates, ...]:
    frame = frame.assign(row=row[frame["of"]], seed=seed[frame["of"]]).sort_values(
        ["row", "seed"], kind="stable"
    )
    passed: dict[tuple[GridRow, str], dict[str, dict[int, bool]]] = {}
    keys = ["row", "prompt", "side"]
    for key, group in frame.groupby(keys, sort=False):
        number, prompt, side = cast("tuple[int, int, int]", key)
        by_seed = dict(zip(group["seed"].tolist(), group["passed"].tolist(), strict=True))
        passed.setdefault((grid[number], texts[prompt]), {})[texts[side]] = by_seed
    found = {
        key: paired(sides.get("subject", {}), sides.get("reference", {}))
        for key, sides in passed.items()
    }
    corrected = holm({str(key): c.test.exact_p for key, c in found.items()})
    return tuple(PassRates(*key, c, corrected[str(key)]) for key, c in found.items())


def _notes(
    store: Store,
    frame: pd.DataFrame,
    grid: Sequence[GridRow],
    row: Array,
    seed: Array,
    texts: Sequence[str],
    problems: list[str],
) -> tuple[Note, ...]:
    """Findings and hints once each; texts that differ only in their numbers count as one."""
    frame = frame.assign(row=row[frame["of"]], seed=seed[frame["of"]]).sort_values(
        ["row", "seed"], kind="stable"
    )
    groups = frame.groupby(["row", "kind", "pattern"], sort=False)
    first = groups.agg(of=("of", "first"), different=("text", "nunique")).reset_index()
    listed = first[first.groupby("row").cumcount() < NOTES]
    if more := len(first) - len(listed):
        problems.append(f"{more:,} findings and hints beyond {NOTES} of a row are not listed")
    seeds = groups["seed"].unique()
    found = []
    records = store.records(listed["of"].tolist())
    keys = zip(*(listed[name].tolist() for name in ("row", "kind", "pattern")), strict=True)
    varies = (listed["different"] > 1).tolist()
    for record, key, various in zip(records, keys, varies, strict=True):
        wanted = texts[key[1]], texts[key[2]]
        text = next(t for k, t in notes_of(record) if (k, without_numbers(t)) == wanted)
        found.append(Note(wanted[0], grid[key[0]], text, tuple(seeds[key].tolist()), various))
    return tuple(found)


def gaps(
    store: Store,
    grid: Sequence[GridRow],
    cells: pd.DataFrame,
    name: str,
    expected: Mapping[int, str],
) -> tuple[Uncompared, ...]:
    """The cells in one state, by row and reason."""
    which = cells[cells["state"] == name]
    if which.empty:
        return ()
    at = which["position"].tolist()
    if name == MISSING:
        reasons = ["no record"] * len(at)
    else:
        reasons = store.take(at, ["reason"]).column("reason").to_pylist()
    texts = [expected.get(p, reason) for p, reason in zip(at, reasons, strict=True)]
    found: dict[int, dict[str, list[int]]] = {}
    for row, seed, text in zip(which["row"].tolist(), which["seed"].tolist(), texts, strict=True):
        found.setdefault(row, {}).setdefault(text, []).append(seed)
    listed = []
    for row, by_reason in found.items():
        each = [*by_reason.items()]
        listed += [Uncompared(grid[row], tuple(seeds), text) for text, seeds in each[:REASONS]]
        if rest := each[REASONS:]:
            seeds = sorted(seed for _, of in rest for seed in of)
            listed.append(Uncompared(grid[row], tuple(seeds), f"{len(rest):,} other reasons"))
    return tuple(listed)


def steps(store: Store, cells: pd.DataFrame) -> pd.DataFrame:
    """See `Aggregate.steps`."""
    import pandas as pd

    table = store.take(cells["position"].tolist(), [*STEP_COLUMNS])
    columns = [table.column(name).to_pylist() for name in STEP_COLUMNS]
    parts = []
    for seed, *series in zip(cells["seed"].tolist(), *columns, strict=True):
        n = max(len(values or ()) for values in series)
        full = {
            name: np.append(
                np.array(values or (), np.float64), np.full(n - len(values or ()), np.nan)
            )
            for name, values in zip(STEP_COLUMNS, series, strict=True)
        }
        parts.append(pd.DataFrame({"seed": seed, "step": np.arange(1, n + 1), **full}))
    if not parts:
        return pd.DataFrame(columns=["seed", "step", *STEP_COLUMNS])
    return pd.concat(parts, ignore_index=True)
