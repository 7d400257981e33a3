"""What of a run stands on the page: all pairs and probes as counts, the worst cells in full.

A page stays small whatever the number of records: it shows a bounded number of pairs, seeds and
records, worst first, and says what it leaves out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from parity.capture.machine import PASSING
from parity.cells.plan import GridRow
from parity.record import Metric, Record
from parity.results.aggregate import Aggregate
from parity.results.cells import EXPECTED, MISSING, NOT_RED, WORST_FIRST
from parity.results.changes import FAILS, FIXED, GONE, STILL, Changes
from parity.stages import flow
from parity.trace import Array

PAIRS = 24
"""Pairs with a section of their own."""
SEEDS = 40
"""Seeds of a row of the grid."""
TRAINED = 24
"""Seeds of a heat map."""
SAMPLED = 4
"""Records of other rows: for settings, environments and the first bad module."""
RECORDS = 400
"""Records in full; fewer where they are long."""
CHANGED = 5
"""Rows listed of each kind of change."""
BYTES = 2_500_000
"""Of all records in full."""


class Row(NamedTuple):
    """One probe of a pair."""

    row: GridRow
    counts: Mapping[str, int]
    """Number of cells in each state that occurs, the worst first."""
    cells: tuple[tuple[int, str, str], ...]
    """Seed, state and name of the record of the cells that are shown, by seed."""

    @property
    def worst(self) -> str:
        """Worst state of any cell."""
        return next(iter(self.counts), MISSING)

    @property
    def red(self) -> int:
        """Cells that keep the run from being green."""
        return sum(n for name, n in self.counts.items() if name not in NOT_RED)

    @property
    def total(self) -> int:
        """Cells."""
        return sum(self.counts.values())

    @property
    def listed(self) -> Mapping[str, int]:
        """The states that keep it from being green with their counts; all where it is green."""
        return {k: n for k, n in self.counts.items() if k not in NOT_RED} or self.counts

    @property
    def first(self) -> str:
        """Name of the record of the first cell in the worst state; empty where none is shown."""
        return next((name for _, found, name in self.cells if found == self.worst and name), "")


class Pair(NamedTuple):
    """A subject, a reference and a model, with their probes in the order in which data flows."""

    name: str
    anchor: str
    rows: tuple[Row, ...]

    @property
    def worst(self) -> str:
        """Worst state of any cell."""
        return min((row.worst for row in self.rows), key=WORST_FIRST.index)

    @property
    def red(self) -> int:
        """Cells that keep the run from being green."""
        return sum(row.red for row in self.rows)

    @property
    def seeds(self) -> tuple[int, ...]:
        """Those of the cells that are shown, where all rows show the same; else none."""
        listed = {tuple(seed for seed, _, _ in row.cells) for row in self.rows}
        return listed.pop() if len(listed) == 1 else ()


def pairs(result: Aggregate, shown: Mapping[tuple[GridRow, int], str]) -> list[Pair]:
    """Every pair, the worst first; cells of the first `PAIRS` alone.

    Args:
        result: Of the run.
        shown: Row and seed to the name of its record, of those that stand on the page in full.
    """
    counts = result.rows[[*WORST_FIRST]].to_numpy()
    found: dict[str, list[Row]] = {}
    for row, numbers in zip(result.grid, counts.tolist(), strict=True):
        of = {name: n for name, n in zip(WORST_FIRST, numbers, strict=True) if n}
        found.setdefault(row.pair, []).append(Row(row, of, ()))
    listed = [
        Pair(name, f"pair-{slug(name)}", tuple(sorted(rows, key=_flow)))
        for name, rows in found.items()
    ]
    listed.sort(key=lambda p: (WORST_FIRST.index(p.worst), -p.red, p.name))
    for index, pair in enumerate(listed[:PAIRS]):
        rows = [row._replace(cells=_cells(result, row.row, shown)) for row in pair.rows]
        listed[index] = pair._replace(rows=tuple(rows))
    return listed


def _cells(
    result: Aggregate, row: GridRow, shown: Mapping[tuple[GridRow, int], str]
) -> tuple[tuple[int, str, str], ...]:
    states = result.states(row).items()
    worst = sorted(states, key=lambda cell: (WORST_FIRST.index(cell[1]), cell[0]))[:SEEDS]
    return tuple((seed, name, shown.get((row, seed), "")) for seed, name in sorted(worst))


def _flow(row: Row) -> tuple[int, int]:
    return flow(row.row.stage), row.row.probe


def slug(text: str) -> str:
    """Text as a part of an address."""
    return re.sub(r"[^\w.-]+", "-", text).strip("-")


class Matrix(NamedTuple):
    """Probes by pairs: what failed most stands first."""

    pairs: tuple[Pair, ...]
    rows: tuple[tuple[str, tuple[Row | None, ...]], ...]
    """Title of a probe, and its row in each pair."""


def matrix(listed: Sequence[Pair]) -> Matrix:
    """The matrix of the pairs that have a section."""
    columns = tuple(listed[:PAIRS])
    by_probe: dict[tuple[int, int, str], dict[str, Row]] = {}
    for pair in columns:
        for row in pair.rows:
            by_probe.setdefault((*_flow(row), row.row.title), {})[pair.name] = row

    def rank(key: tuple[int, int, str]) -> tuple[int, tuple[int, int, str]]:
        worst = min(WORST_FIRST.index(row.worst) for row in by_probe[key].values())
        # Probes that are fine keep the order of the data.
        return (min(worst, WORST_FIRST.index("skip")), key)

    return Matrix(
        columns,
        tuple(
            (key[2], tuple(by_probe[key].get(pair.name) for pair in columns))
            for key in sorted(by_probe, key=rank)
        ),
    )


def samples(result: Aggregate, listed: Sequence[Pair]) -> dict[GridRow, list[Record]]:
    """Whole records of each row of the pairs that have a section, by seed.

    `TRAINED` of a row with curves, of others `SAMPLED`: what fails worst, and else the first, which lie
    together in the store. All are read at once.
    """
    curved = {curve.row for curve in result.curves}
    number = {row: index for index, row in enumerate(result.grid)}
    rows = [row.row for pair in listed[:PAIRS] for row in pair.rows]
    bounds = np.searchsorted(result.cells["row"].to_numpy(), np.arange(len(result.grid) + 1))
    position, excess = (result.cells[name].to_numpy() for name in ("position", "excess"))
    state = result.cells["state"].cat.codes.to_numpy()
    chosen: dict[GridRow, Array] = {}
    for row in rows:
        cells = np.arange(*bounds[number[row] : number[row] + 2])
        cells = cells[position[cells] >= 0]
        far = np.where(state[cells] < WORST_FIRST.index(EXPECTED), -excess[cells], 0.0)
        worst = cells[np.lexsort((position[cells], far, state[cells]))]
        chosen[row] = np.sort(worst[: TRAINED if row in curved else SAMPLED])
    wanted = [int(position[cell]) for cells in chosen.values() for cell in cells]
    records = iter(result.records(wanted))
    return {row: [next(records) for _ in cells] for row, cells in chosen.items()}


def changed(changes: Changes) -> list[tuple[str, int, list[tuple[str, str]]]]:
    """Kind of a change, the number of its cells, and its rows as text with the pair's anchor.

    What newly fails stands first; lines beyond `CHANGED` of a kind are counted.
    """
    found = []
    for kind in (FAILS, FIXED, STILL, GONE):
        numbers: dict[str, tuple[int, str]] = {}
        for line in changes.rows[changes.rows[kind] > 0].to_dict("records"):
            row = GridRow(*(line[name] for name in GridRow._fields))
            # What is gone is gone with its pair most of the time.
            name = row.pair if kind == GONE else f"{row.title}, {row.pair}"
            cells = numbers.get(name, (0, ""))[0] + int(line[kind])
            numbers[name] = cells, f"pair-{slug(row.pair)}"
        lines = [
            (f"{name}: {cells:,} cell{'s' * (cells > 1)}", anchor)
            for name, (cells, anchor) in [*numbers.items()][:CHANGED]
        ]
        if more := len(numbers) - CHANGED:
            lines += [(f"and {more:,} more", "")] * (more > 0)
        if lines:
            found.append((kind, changes.counts[kind], lines))
    return found


class Setting(NamedTuple):
    """One effective setting of both sides."""

    name: str
    subject: str
    reference: str
    decides: bool
    """Whether the verdict depends on it."""


_BOTH = re.compile(
    r"(?P<name>[^:]+): (?P<subject>.+) in the subject, (?P<reference>.+) in the reference"
)


def settings(record: Record) -> tuple[list[Setting], list[str]]:
    """Effective settings in which the sides differ, of a record of the config; and other sentences.

    What differs as shipped follows what differs under the recipe.
    """
    found, others = [], []
    notes = [(m.note, m.gate) for m in record.metrics if not m.verdict.green and m.note]
    shipped = [f for f in record.findings if f.startswith("as shipped: ")]
    notes += [(text, False) for text in shipped]
    for text, decides in notes:
        match = _BOTH.fullmatch(text.removeprefix("as shipped: "))
        if match and not text.startswith("as shipped: "):
            found.append(Setting(match["name"], match["subject"], match["reference"], decides))
        elif match:
            found.append(
                Setting(
                    f"{match['name']} (as shipped)", match["subject"], match["reference"], decides
                )
            )
        else:
            others.append(text)
    return found, others


def environments(records: Sequence[Record]) -> list[tuple[str, str, str, bool]]:
    """Key, subject's values, reference's values, whether they differ: differing ones first."""
    sides: list[dict[str, dict[str, None]]] = [{}, {}]
    for record in records:
        for values, side in zip(sides, (record.subject, record.reference), strict=True):
            for key, text in _flat(side.environment).items():
                values.setdefault(key, {})[text] = None
    subject, reference = ({k: " or ".join(v) for k, v in values.items()} for values in sides)
    rows = [(k, subject.get(k, "–"), reference.get(k, "–")) for k in sorted({*subject, *reference})]
    return sorted(((*row, row[1] != row[2]) for row in rows), key=lambda row: not row[3])


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        elif f"{prefix}{key}" not in PASSING:
            flat[prefix + key] = (
                ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            )
    return flat


def differing(record: Record) -> list[tuple[str, Any, Any]]:
    """Factors in which the sides' recipes differ."""
    subject, reference = record.subject.recipe, record.reference.recipe
    values = {k: (subject.get(k), reference.get(k)) for k in sorted({*subject, *reference})}
    return [(name, a, b) for name, (a, b) in values.items() if a != b]


def ordered(metrics: Sequence[Metric]) -> list[Metric]:
    """Metrics that are not green first; those that decide before those that do not."""
    return sorted(metrics, key=lambda m: (m.verdict.green, not m.gate))
