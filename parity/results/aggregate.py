"""All records of a run together: tables, one verdict and one exit code."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, product, zip_longest
from typing import TYPE_CHECKING, NamedTuple

from parity.cells.plan import GridRow, Plan, row_of
from parity.record import Record, Verdict, worst
from parity.results.series import STEP_COLUMNS, Curve, curves, steps
from parity.results.statistics import PairedComparison, holm, paired, wilson
from parity.results.table import Table

if TYPE_CHECKING:
    from parity.results.expected import KnownDivergence

SCHEMA = 2
MISSING, EXPECTED, STALE = "missing", "expected", "stale"
STATES = (*(str(verdict) for verdict in Verdict), EXPECTED, STALE, MISSING)
"""What a cell of the grid can hold: a verdict, `missing` where there is no record, `expected` for a
known divergence and `stale` for a cell that came out green where one was known."""
GREEN = ("identical", "agree")
GAPS = ("error", MISSING, STALE, EXPECTED, "skip")
NOT_RED = (*GREEN, EXPECTED, "skip")
WORST_FIRST = (
    "error", MISSING, "diverge", STALE, "inconclusive", EXPECTED, "skip", "agree", "identical",
)  # fmt: skip


class Note(NamedTuple):
    """An observation, once for all seeds in which it was made."""

    kind: str
    """`shipped`, `finding` or `hint`."""
    row: GridRow
    text: str
    seeds: tuple[int, ...]
    varies: bool
    """Whether numbers in it differ from seed to seed; `text` is the first seed's."""


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


Cells = Mapping[GridRow, Mapping[int, Record | None]]
"""Row to seed to its record, None where it is missing."""


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
    seeds: tuple[int, ...]
    cells: Cells
    summary: Table
    """Per row: number of cells in each state, pass rate = green / decided, Wilson interval."""
    grid: Table
    """Rows by seeds, each cell a state."""
    steps: Table
    """Losses, gradient norms and differences, one row a step."""
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

    @property
    def records(self) -> list[Record]:
        """One record a cell, row by row."""
        return [r for row in self.cells.values() for r in row.values() if r]

    def failures(self) -> list[Record]:
        """Records neither green, expected nor skipped: the first seed of each row, then the next of each."""
        bad = [
            [r for r in row.values() if r and state(r) not in NOT_RED]
            for row in self.cells.values()
        ]
        return [record for turn in zip_longest(*bad) for record in turn if record]


def state(record: Record | None) -> str:
    """Verdict of a cell, `missing`, or what became of a known divergence."""
    if record is None:
        return MISSING
    if record.expected:
        return STALE if record.verdict.green else EXPECTED
    return str(record.verdict)


def aggregate(
    records: Iterable[Record],
    expected: Plan | None = None,
    known: Sequence[KnownDivergence] = (),
    damaged: Sequence[str] = (),
) -> Aggregate:
    """Puts records together.

    A cell is missing where the plan has it, or where another row has its seed, and there is no record.

    Args:
        records: Marked by `expected.mark` already.
        expected: The cells that the run was to fill.
        known: Known divergences; those that match no record are named.
        damaged: Files that were set aside, with the reason: with any, the run is not green. Records
            whose verdict does not follow from their metrics are set aside here.
    """
    from parity.results.expected import unmatched

    every = [(record, record.contradiction()) for record in records]
    records = [record for record, why in every if not why]
    damaged = [*damaged, *sorted(f"{record.name}: {why}" for record, why in every if why)]
    found: dict[tuple[GridRow, int], list[Record]] = defaultdict(list)
    for record in sorted(records, key=lambda r: (r.seed, r.verdict, r.reason, r.reproduce)):
        found[row_of(record), record.seed].append(record)
    rows = sorted({row for row, _ in found} | _planned(expected, [row for row, _ in found]))
    seeds = tuple(sorted({seed for _, seed in found} | set(expected.seeds if expected else ())))
    cells = {row: {seed: _worst(found[row, seed]) for seed in seeds} for row in rows}
    present = {row: [r for r in by_seed.values() if r] for row, by_seed in cells.items()}
    counts = Counter(state(r) for by_seed in cells.values() for r in by_seed.values())
    verdict, code, reason = conclude(counts, len(damaged))
    found_curves = tuple(curves(present))
    problems = [
        f"{row.title}, {row.pair}, seed {seed}: {len(group)} records for one cell, the worst counts"
        for (row, seed), group in found.items()
        if len(group) > 1
    ]
    problems += [f"{c.quantity}, {c.row.pair}, {p}" for c in found_curves for p in c.problems]
    problems += unmatched(records, known)
    return Aggregate(
        verdict=verdict,
        exit_code=code,
        reason=reason,
        counts={name: counts[name] for name in STATES if counts[name]},
        seeds=seeds,
        cells=cells,
        summary=_summary(cells),
        grid=Table(
            (*GridRow._fields, *map(str, seeds)),
            [
                {**row._asdict(), **{str(seed): state(r) for seed, r in by_seed.items()}}
                for row, by_seed in cells.items()
            ],
        ),
        steps=Table((*GridRow._fields, "seed", "step", *STEP_COLUMNS), [*steps(present)]),
        curves=found_curves,
        passes=_passes(present),
        first=tuple(_first(cells)),
        notes=_notes(present),
        gaps={name: tuple(_gaps(cells, name)) for name in GAPS},
        problems=tuple(sorted(problems)),
        damaged=tuple(damaged),
    )


def _planned(plan: Plan | None, seen: Sequence[GridRow]) -> set[GridRow]:
    """The rows of a plan; a probe has the stage name that records or this tool give it."""
    if plan is None:
        return set()
    from parity.stages import STAGES

    names = {stage.number: stage.name for stage in STAGES} | {r.probe: r.stage for r in seen}
    return {
        GridRow(model, *pair, probe, names.get(probe, "unknown"))
        for model, pair, probe in product(plan.models, plan.pairs, plan.probes)
    }


def _worst(records: Sequence[Record]) -> Record | None:
    if not records:
        return None
    verdict = worst([record.verdict for record in records])
    # Of two that diverge, the one that is not a known divergence.
    return min((r for r in records if r.verdict is verdict), key=lambda r: bool(r.expected))


def conclude(counts: Mapping[str, int], damaged: int = 0) -> tuple[str, int, str]:
    """Verdict, exit code and sentence from the number of cells in each state.

    A damaged record leaves its cell without a result, like a missing one.
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
    what = "green or diverge as expected" if EXPECTED in texts else "green"
    return (
        compared[0],
        0,
        f"all {total - counts.get('skip', 0)} cells compared are {what}: {listed}",
    )


def _summary(cells: Cells) -> Table:
    rows = []
    for row, by_seed in cells.items():
        counts = Counter(map(state, by_seed.values()))
        green = sum(counts[name] for name in (*GREEN, STALE))
        decided = green + counts["diverge"] + counts[EXPECTED]
        ci = wilson(green, decided) if decided else None
        rows.append(
            row._asdict()
            | {"seeds": len(by_seed)}
            | {name: counts[name] for name in STATES}
            | {"decided": decided, "pass_rate": green / decided if decided else float("nan")}
            | {"low": ci.low if ci else float("nan"), "high": ci.high if ci else float("nan")}
        )
    columns = ("seeds", *STATES, "decided", "pass_rate", "low", "high")
    return Table((*GridRow._fields, *columns), rows)


def _passes(rows: Mapping[GridRow, Sequence[Record]]) -> tuple[PassRates, ...]:
    found = {}
    for row, records in rows.items():
        for prompt in dict.fromkeys(p for r in records for side in r.passes.values() for p in side):
            subject, reference = (
                {
                    r.seed: r.passes[side][prompt]
                    for r in records
                    if prompt in r.passes.get(side, {})
                }
                for side in ("subject", "reference")
            )
            found[row, prompt] = paired(subject, reference)
    corrected = holm({str(key): c.test.exact_p for key, c in found.items()})
    return tuple(PassRates(*key, c, corrected[str(key)]) for key, c in found.items())


def without_numbers(text: str) -> str:
    """A sentence with its numbers left out: what it says of every seed."""
    return re.sub(r"\d[\d.,]*(e[+-]?\d+)?", "#", text)


def distinct(texts: Iterable[str]) -> tuple[str, ...]:
    """The first of those sentences that differ in numbers alone."""
    found: dict[str, str] = {}
    for text in texts:
        found.setdefault(without_numbers(text), text)
    return tuple(found.values())


def _first(cells: Cells) -> Iterator[FirstFailure]:
    from parity.stages import flow

    pairs: dict[str, list[GridRow]] = defaultdict(list)
    for row, by_seed in cells.items():
        if any(state(r) not in NOT_RED for r in by_seed.values()):
            pairs[row.pair].append(row)
    for rows in pairs.values():
        rows.sort(key=lambda row: (flow(row.stage), row.probe))
        # A divergence tells more about the cause than a missing cell before it.
        ranked = [
            (name, row, seeds)
            for name in ("diverge", "error", "inconclusive", STALE, MISSING)
            for row in rows
            if (seeds := tuple(s for s, r in cells[row].items() if state(r) == name))
        ]
        name, row, seeds = ranked[0]
        record = cells[row][seeds[0]]
        reason = record.expected or record.reason if record else "there is no record"
        later = tuple(rows[rows.index(row) + 1 :])
        # Once for all seeds of a row, whatever the numbers in it.
        hints = [distinct(h for r in cells[other].values() if r for h in r.hints) for other in rows]
        yield FirstFailure(
            row, name, seeds, reason, record, later, tuple(dict.fromkeys(chain(*hints)))
        )


def _notes(rows: Mapping[GridRow, Sequence[Record]]) -> tuple[Note, ...]:
    """Findings and hints once each; texts that differ only in their numbers count as one."""
    found: dict[tuple[str, GridRow, str], dict[int, str]] = defaultdict(dict)
    for row, records in rows.items():
        for record in records:
            findings = [("finding", text) for text in record.findings]
            for kind, text in [*findings, *(("hint", text) for text in record.hints)]:
                kind = "shipped" if text.startswith("as shipped") else kind
                pattern = without_numbers(text)
                found[kind, row, pattern].setdefault(record.seed, text)
    return tuple(
        Note(kind, row, next(iter(by.values())), tuple(by), len({*by.values()}) > 1)
        for (kind, row, _), by in found.items()
    )


def _gaps(cells: Cells, name: str) -> Iterator[Uncompared]:
    for row, by_seed in cells.items():
        reasons: dict[str, list[int]] = defaultdict(list)
        for seed, record in by_seed.items():
            if state(record) == name:
                reasons[record.expected or record.reason if record else "no record"].append(seed)
        yield from (Uncompared(row, tuple(seeds), reason) for reason, seeds in reasons.items())
