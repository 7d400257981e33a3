"""All records of a run together: what every report is made from.

An `Aggregate` stays small whatever the number of records: tables of the grid's rows and of its cells,
and short lists of what is to be read first. Whole records are loaded for those that are shown.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from parity.cells.plan import GridRow, Plan
from parity.record import Record
from parity.results import details
from parity.results.cells import (
    EXPECTED,
    MISSING,
    STALE,
    STATES,
    WORST_FIRST,
    Found,
    read,
)
from parity.results.details import Note, PassRates, Uncompared
from parity.results.expected import unmatched
from parity.results.grid import cells_of, kept_of, rows_of
from parity.results.series import Curve
from parity.results.store import Store

if TYPE_CHECKING:
    import pandas as pd

    from parity.results.changes import Changes
    from parity.results.expected import KnownDivergence

SCHEMA = 3
GAPS = ("error", MISSING, STALE, EXPECTED, "skip")
SHOWN_PROBLEMS = 200
"""Problems beyond are counted."""


class FirstFailure(NamedTuple):
    """Where a pair goes wrong first, in the order in which data flows."""

    row: GridRow
    state: str
    seeds: tuple[int, ...]
    reason: str
    """The first such seed's, as the rest of its record."""
    record: Record | None
    later: tuple[GridRow, ...]
    """Rows after it that are not green either."""
    hints: tuple[str, ...]
    """Of any row of the pair."""


@dataclass(frozen=True)
class Aggregate:
    """The results of all records of a run, in a fixed order."""

    verdict: str
    """Worst state of any cell."""
    exit_code: int
    """0 all green or expected, 1 something diverges, is stale or inconclusive, 3 cells missing or in
    error, records damaged, or nothing compared."""
    reason: str
    counts: dict[str, int]
    """Number of cells in each state that occurs."""
    seeds: tuple[int, ...]
    grid: tuple[GridRow, ...]
    """The rows, in the order of `rows`."""
    rows: pd.DataFrame
    """A line for each row of the grid: the fields of `GridRow`; `seeds`, the number of its cells; the
    number in each state; `decided`; `pass_rate` = green / decided with `low` and `high`, Wilson's 95 %
    interval (NaN where nothing is decided); `state`, the worst."""
    cells: pd.DataFrame
    """A line for each cell, by row and seed: `row` (index into `grid`), `seed`, `state` (a category,
    worst first), `excess` (greatest value over tolerance; infinite where bits had to be equal and are
    not; NaN where there is no record) and `position` (of the record in the store, -1 without one)."""
    curves: tuple[Curve, ...]
    passes: tuple[PassRates, ...]
    first: tuple[FirstFailure, ...]
    notes: tuple[Note, ...]
    gaps: dict[str, tuple[Uncompared, ...]]
    """Cells by `error`, `missing`, `stale`, `expected` and `skip`."""
    problems: tuple[str, ...]
    """Reasons to doubt a number: a series cut short, two records of one cell."""
    damaged: tuple[str, ...]
    """Files that were set aside, each with what is wrong in it."""
    about: tuple[str, ...]
    """Releases of this tool and platforms, each once."""
    versions: dict[str, dict[str, tuple[str, ...]]]
    """Path to distribution to the versions that ran."""
    memory: dict[str, int]
    """Path to the greatest peak memory of its processes, in bytes."""
    store: Store = field(repr=False)
    expected: Mapping[int, str] = field(repr=False)
    """Position of a record to why its divergence is known."""
    changes: Changes | None = None
    """What is other than in an earlier run, where one was named."""

    def records(self, positions: Iterable[int]) -> list[Record]:
        """Whole records, marked with why a divergence is known."""
        positions = [int(p) for p in positions]
        found = zip(positions, self.store.records(positions), strict=True)
        return [r.model_copy(update={"expected": self.expected.get(p, "")}) for p, r in found]

    def states(self, row: GridRow) -> dict[int, str]:
        """Seed to state of each cell of a row."""
        cells = self._of(row)
        return dict(zip(cells["seed"].tolist(), cells["state"].tolist(), strict=True))

    def failures(self, limit: int = 100) -> list[Record]:
        """Records neither green, expected nor skipped: of each row the worst, then of each the next.

        Rows whose state is worse come first, and those farther over their tolerance.
        """
        bad = self.red()
        return self.records(bad[bad["position"] >= 0]["position"].head(limit))

    def red(self) -> pd.DataFrame:
        """The lines of `cells` that keep the run from being green, in the order of `failures`."""
        codes = self.cells["state"].cat.codes
        bad = self.cells[codes < WORST_FIRST.index(EXPECTED)]
        # Of these lines alone: a frame without any would take those of the whole column.
        bad = bad.assign(code=bad["state"].cat.codes, far=-bad["excess"].fillna(0.0))
        bad = bad.sort_values(["code", "far", "row", "seed"], kind="stable")
        bad = bad.assign(turn=bad.groupby("row").cumcount())
        return bad.sort_values(["turn", "code", "far", "row"], kind="stable")

    def green(self, limit: int = 100) -> list[Record]:
        """Records that are green, expected or skipped, by row and seed."""
        fine = self.cells["state"].cat.codes >= WORST_FIRST.index(EXPECTED)
        return self.records(self.cells[fine]["position"].head(limit))

    def steps(self, row: GridRow, limit: int) -> pd.DataFrame:
        """Losses, gradient norms and their differences, a line a step; NaN where a series is short.

        Columns: `seed`, `step` (from 1) and those of `STEP_COLUMNS`; of at most `limit` seeds, those
        farthest over their tolerance.
        """
        cells = self._of(row)
        cells = cells[cells["position"] >= 0].sort_values("excess", ascending=False, kind="stable")
        return details.steps(self.store, cells.head(limit).sort_values("seed"))

    def _of(self, row: GridRow) -> pd.DataFrame:
        number = self.grid.index(row) if row in self.grid else -1
        at = np.searchsorted(self.cells["row"].to_numpy(), [number, number + 1])
        return self.cells.iloc[at[0] : at[1]]


def state(record: Record | None) -> str:
    """Verdict of a cell, `missing`, or what became of a known divergence."""
    if record is None:
        return MISSING
    if record.expected:
        return STALE if record.verdict.green else EXPECTED
    return str(record.verdict)


def aggregate(
    records: Iterable[Record] | Store,
    plan: Plan | None = None,
    known: Sequence[KnownDivergence] = (),
    damaged: Sequence[str] = (),
    problems: Sequence[str] = (),
) -> Aggregate:
    """Puts records together.

    A cell is missing where the plan has it and there is no record; in rows that no plan has, where
    another such row has the seed.

    Args:
        records: Of a run, or of many.
        plan: The cells that were to be filled.
        known: Known divergences; those that match no record are named.
        damaged: Files that were set aside, with the reason: with any, the run is not green. Records
            whose verdict does not follow from their metrics are set aside here.
        problems: Reasons to doubt a number that are known already.
    """
    store = records if isinstance(records, Store) else Store.of(records)
    found = read(store, known)
    damaged = [*damaged, *_contradictions(store, found)]
    kept, doubled = kept_of(store, found)
    grid, cells = cells_of(found, kept, plan)
    rows = rows_of(grid, cells)
    counts = Counter({name: int(rows[name].sum()) for name in STATES})
    verdict, code, reason = conclude(counts, len(damaged), _uncompared(grid, rows))
    number = {row: i for i, row in enumerate(grid)}
    row_of = np.array([number[row] for row in found.rows], np.int64)[found.row]
    seen = details.read(store, grid, row_of, found.seed, kept)
    problems = [*problems, *doubled, *seen.problems, *unmatched(found.ran, found.used, known)]
    expected = {int(p): found.texts[found.expected[p]] for p in np.flatnonzero(found.expected)}
    hints: dict[GridRow, list[str]] = {}
    for note in seen.notes:
        if note.kind == "hint":
            hints.setdefault(note.row, []).append(note.text)
    result = Aggregate(
        verdict=verdict,
        exit_code=code,
        reason=reason,
        counts={name: counts[name] for name in STATES if counts[name]},
        seeds=tuple(np.unique(cells["seed"].to_numpy()).tolist()),
        grid=grid,
        rows=rows,
        cells=cells,
        curves=seen.curves,
        passes=seen.passes,
        first=(),
        notes=seen.notes,
        gaps={name: details.gaps(store, grid, cells, name, expected) for name in GAPS},
        problems=_short(sorted(problems)),
        damaged=tuple(damaged),
        about=seen.about,
        versions=_versions(found),
        memory=seen.memory,
        store=store,
        expected=expected,
    )
    return replace(result, first=tuple(_first(result, hints)))


def _short(lines: Sequence[str]) -> tuple[str, ...]:
    more = len(lines) - SHOWN_PROBLEMS
    return (*lines[:SHOWN_PROBLEMS], *[f"and {more:,} more"] * (more > 0))


def _contradictions(store: Store, found: Found) -> list[str]:
    wrong = store.records(np.flatnonzero(found.contradicts).tolist())
    return sorted(f"{record.name}: {record.contradiction()}" for record in wrong)


def _uncompared(grid: Sequence[GridRow], rows: pd.DataFrame) -> list[str]:
    """Pairs all of whose cells were skipped."""
    compared: dict[str, int] = {}
    for row, cells, skipped in zip(grid, rows["seeds"], rows["skip"], strict=True):
        compared[row.pair] = compared.get(row.pair, 0) + int(cells - skipped)
    return [pair for pair, count in compared.items() if not count]


def conclude(
    counts: Mapping[str, int], damaged: int = 0, uncompared: Sequence[str] = ()
) -> tuple[str, int, str]:
    """Verdict, exit code and sentence.

    A damaged record leaves its cell without a result, like a missing one.

    Args:
        counts: The number of cells in each state.
        damaged: Records that were set aside.
        uncompared: Pairs all of whose cells were skipped.
    """
    total = sum(counts.values())
    texts = {name: f"{n} {name}" for name in WORST_FIRST if (n := counts.get(name, 0))}
    listed = ", ".join(texts.values())
    found = f"{total} cell{'s' * (total != 1)}: {listed}"
    if damaged:
        aside = f"{damaged} damaged record{'s' * (damaged != 1)} set aside"
        verdict = "error" if "error" in texts else MISSING
        return verdict, 3, f"{aside}; {found}" if total else aside
    for code, states in ((3, ("error", MISSING)), (1, ("diverge", STALE, "inconclusive"))):
        if bad := [name for name in states if name in texts]:
            return bad[0], code, found
    compared = [name for name in texts if name != "skip"]
    if not compared:
        return "inconclusive", 3, "nothing was compared" + (f": {listed}" if listed else "")
    if uncompared:
        return "inconclusive", 3, f"nothing was compared for {'; '.join(uncompared)}; {found}"
    what = "green or diverge as expected" if EXPECTED in texts else "green"
    return (
        compared[0],
        0,
        f"all {total - counts.get('skip', 0)} cells compared are {what}: {listed}",
    )


def _first(result: Aggregate, hints: Mapping[GridRow, Sequence[str]]) -> Iterable[FirstFailure]:
    from parity.stages import flow

    bad = result.rows["state"].cat.codes < WORST_FIRST.index(EXPECTED)
    pairs: dict[str, list[int]] = {}
    for i in np.flatnonzero(bad.to_numpy()).tolist():
        pairs.setdefault(result.grid[i].pair, []).append(i)
    for which in pairs.values():
        which.sort(key=lambda i: (flow(result.grid[i].stage), result.grid[i].probe))
        # A divergence tells more about the cause than a missing cell before it.
        name, i = next(
            (name, i)
            for name in ("diverge", "error", "inconclusive", STALE, MISSING)
            for i in which
            if result.rows.at[i, name]
        )
        row = result.grid[i]
        cells = result._of(row)
        cells = cells[cells["state"] == name]
        position = int(cells["position"].iloc[0])
        record = result.records([position])[0] if position >= 0 else None
        reason = record.expected or record.reason if record else "there is no record"
        later = tuple(result.grid[j] for j in which[which.index(i) + 1 :])
        texts = dict.fromkeys(text for j in which for text in hints.get(result.grid[j], ()))
        seeds = tuple(cells["seed"].tolist())
        yield FirstFailure(row, name, seeds, reason, record, later, tuple(texts))


def _versions(found: Found) -> dict[str, dict[str, tuple[str, ...]]]:
    sets: dict[str, dict[str, set[str]]] = {}
    for place in found.ran:
        for path, versions in (
            (place.subject, place.of_subject),
            (place.reference, place.of_reference),
        ):
            for name, version in versions.items():
                sets.setdefault(path, {}).setdefault(name, set()).add(version)
    return {
        path: {name: tuple(sorted(of)) for name, of in sorted(names.items())}
        for path, names in sorted(sets.items())
    }
