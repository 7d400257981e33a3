"""Records of all seeds and pairs become tables, one verdict and one exit code."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from parity.errors import UsageError
from parity.record import Record, Verdict, worst
from parity.series import Curve, curves, step_table
from parity.stats import PairedComparison, holm, paired, wilson
from parity.trace import dumps, loads, write_atomically

if TYPE_CHECKING:
    import pandas as pd

    from parity.engine import Cell

SCHEMA = 1
MISSING = "missing"
STATES = (*(str(verdict) for verdict in Verdict), MISSING)
"""What a cell of the grid can hold: a verdict, or `missing` where there is no record."""


class Row(NamedTuple):
    """One probe for one pair and model: a row of the grid."""

    model: str
    subject: str
    reference: str
    probe: int
    stage: str

    @property
    def pair(self) -> str:
        """`mlx vs mlx-lm · tiny-gemma3`."""
        return f"{self.subject} vs {self.reference} · {self.model}"

    @property
    def title(self) -> str:
        """`06 optimizer step`."""
        return f"{self.probe:02d} {self.stage.replace('_', ' ')}"


def row_of(record: Record) -> Row:
    """The row that a record belongs to."""
    sides = record.subject.path, record.reference.path
    return Row(record.model, *sides, record.probe, record.stage)


@dataclass(frozen=True)
class Plan:
    """The cells that a run is to fill: the product of all four."""

    probes: tuple[int, ...]
    pairs: tuple[tuple[str, str], ...]
    models: tuple[str, ...]
    seeds: tuple[int, ...]

    @classmethod
    def of(cls, cells: Iterable[Cell]) -> Plan:
        """The plan of the cells of a run."""
        cells = list(cells)
        return cls(
            tuple(sorted({cell.stage.number for cell in cells})),
            tuple(sorted({(cell.subject, cell.reference) for cell in cells})),
            tuple(sorted({cell.model for cell in cells})),
            tuple(sorted({cell.recipe.seed.value for cell in cells})),
        )


def write_plan(plan: Plan, folder: Path) -> Path:
    """Writes `plan.json` before the run, so that what never came can be named."""
    data = {"schema_version": SCHEMA, **vars(plan)}
    write_atomically(folder / "plan.json", dumps(data, indent=1).encode())
    return folder / "plan.json"


def read_plan(folder: Path) -> Plan | None:
    """Every `plan.json` below a folder (shards have one each) as one plan; None without any.

    Raises:
        UsageError: One is no plan.
    """
    sets: dict[str, set[Any]] = {field.name: set() for field in fields(Plan)}
    files = sorted(folder.rglob("plan.json"))
    for file in files:
        try:
            data = loads(file.read_text(encoding="utf-8"))
            if data["schema_version"] != SCHEMA:
                raise ValueError(f"schema {data['schema_version']}, this tool writes {SCHEMA}")
            for name, found in sets.items():
                found.update(tuple(v) if isinstance(v, list) else v for v in data[name])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{file}: not a plan: {error!r}; delete it or run again") from None
    return Plan(**{name: tuple(sorted(found)) for name, found in sets.items()}) if files else None


class Note(NamedTuple):
    """An observation, once for all seeds in which it was made."""

    kind: str
    """`shipped`, `finding` or `hint`."""
    pair: str
    text: str
    seeds: tuple[int, ...]
    varies: bool
    """Whether its numbers differ from seed to seed; `text` is then the first seed's."""


class First(NamedTuple):
    """Where a pair goes wrong first, in the order in which data flows."""

    row: Row
    state: str
    reason: str
    seeds: tuple[int, ...]
    of: int
    later: tuple[Row, ...]
    """Rows after it that are not green either."""
    record: Record | None
    """The first seed's."""


class Passes(NamedTuple):
    """How often each side said what was expected, over seeds, after one prompt."""

    row: Row
    prompt: str
    comparison: PairedComparison
    holm_p: float
    """Exact McNemar, corrected for all prompts and pairs of the run."""


@dataclass(frozen=True)
class Aggregate:
    """What all records say together; everything in a fixed order.

    Attributes:
        verdict: Worst state of any cell.
        exit_code: 0 all green, 1 something diverges or is inconclusive, 3 missing or in error.
        reason: The verdict in one sentence.
        counts: State to number of cells.
        cells: (row, seed) to its record, None where it is missing.
        summary: A row per probe and pair: counts by state, pass rate, Wilson interval.
        grid: Rows by seeds, each cell a state.
        steps: Losses, gradient norms and their differences, one row a step.
        problems: What keeps the numbers from being taken at face value.
    """

    records: tuple[Record, ...]
    verdict: str
    exit_code: int
    reason: str
    counts: dict[str, int]
    cells: dict[tuple[Row, int], Record | None]
    seeds: tuple[int, ...]
    rows: tuple[Row, ...]
    summary: pd.DataFrame
    grid: pd.DataFrame
    steps: pd.DataFrame
    curves: tuple[Curve, ...]
    passes: tuple[Passes, ...]
    first: tuple[First, ...]
    notes: tuple[Note, ...]
    skipped: tuple[tuple[Row, str, tuple[int, ...]], ...]
    missing: tuple[tuple[Row, tuple[int, ...]], ...]
    problems: tuple[str, ...]

    def state(self, row: Row, seed: int) -> str:
        """Verdict of a cell, or `missing`."""
        record = self.cells[row, seed]
        return MISSING if record is None else str(record.verdict)

    def failures(self) -> list[Record]:
        """Records that are neither green nor skipped: one of each row, then the next of each."""
        rank: Counter[Row] = Counter()
        ranked = []
        for record in self.records:
            if not record.verdict.green and record.verdict is not Verdict.SKIP:
                ranked.append((rank[row_of(record)], record))
                rank[row_of(record)] += 1
        return [record for _, record in sorted(ranked, key=lambda item: item[0])]


def aggregate(records: Sequence[Record], expected: Plan | None = None) -> Aggregate:
    """Puts records together.

    A cell is missing where another row has the seed, or where the plan has the cell, and no
    record came.
    """
    ordered = sorted(records, key=lambda r: (row_of(r), r.seed, r.digest()))
    found: dict[tuple[Row, int], list[Record]] = defaultdict(list)
    for record in ordered:
        found[row_of(record), record.seed].append(record)
    rows = sorted({row for row, _ in found} | set(_planned(ordered, expected)))
    seeds = sorted({seed for _, seed in found} | set(expected.seeds if expected else ()))
    cells = {key: _worst(found.get(key, [])) for key in product(rows, seeds)}
    states = {key: str(r.verdict) if r else MISSING for key, r in cells.items()}
    kept = tuple(record for record in cells.values() if record)
    counts = Counter(states.values())
    verdict, code, reason = conclude(counts)
    series, problems = curves(kept), [
        f"{row.title}, {row.pair}, seed {seed}: {len(group)} records for one cell, the worst counts"
        for (row, seed), group in found.items()
        if len(group) > 1
    ]
    problems += [f"{row_label}: {text}" for c in series for row_label, text in c.named_problems()]
    return Aggregate(
        records=kept,
        verdict=verdict,
        exit_code=code,
        reason=reason,
        counts={state: counts[state] for state in STATES if counts[state]},
        cells=cells,
        seeds=tuple(seeds),
        rows=tuple(rows),
        summary=_summary(rows, seeds, states),
        grid=_grid(rows, seeds, states),
        steps=step_table(kept),
        curves=series,
        passes=_passes(kept),
        first=_first(rows, seeds, cells),
        notes=_notes(kept),
        skipped=_skipped(kept),
        missing=tuple(
            (row, gone)
            for row in rows
            if (gone := tuple(s for s in seeds if cells[row, s] is None))
        ),
        problems=tuple(problems),
    )
