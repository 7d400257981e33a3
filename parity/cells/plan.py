"""The cells that a run is to fill, kept so that what never came can be named."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from pydantic import BaseModel
from pydantic_core import from_json, to_json

from parity.errors import UsageError
from parity.files import dumps, write_atomically
from parity.record import Record

if TYPE_CHECKING:
    from parity.cells.cell import Cell

SCHEMA = 2
NAME = "plan.json"


class GridRow(NamedTuple):
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


def row_of(record: Record) -> GridRow:
    """The row that a record belongs to."""
    sides = record.subject.path, record.reference.path
    return GridRow(record.model, *sides, record.probe, record.stage)


class PlannedRow(NamedTuple):
    """A row of the grid before anything was run."""

    model: str
    subject: str
    reference: str
    probe: int


@dataclass(frozen=True)
class Plan:
    """The cells that a run is to fill: the seeds of each row."""

    rows: Mapping[PlannedRow, frozenset[int]]

    @classmethod
    def of(cls, cells: Iterable[Cell]) -> Plan:
        """The plan of the cells of a run."""
        rows: dict[PlannedRow, set[int]] = {}
        for cell in cells:
            sides = cell.names["subject"], cell.names["reference"]
            row = PlannedRow(cell.model, *sides, cell.stage.number)
            rows.setdefault(row, set()).add(cell.recipe.seed.value)
        return cls({row: frozenset(seeds) for row, seeds in rows.items()})

    @classmethod
    def product(
        cls,
        probes: Iterable[int],
        pairs: Iterable[tuple[str, str]],
        models: Iterable[str],
        seeds: Iterable[int],
    ) -> Plan:
        """Each probe for each pair, model and seed."""
        rows = [PlannedRow(m, *pair, p) for m, pair, p in product(models, pairs, probes)]
        return cls(dict.fromkeys(rows, frozenset(seeds)))

    @classmethod
    def union(cls, plans: Iterable[Plan]) -> Plan:
        """The cells of all of them, whatever their order."""
        rows: dict[PlannedRow, frozenset[int]] = {}
        for plan in plans:
            for row, seeds in plan.rows.items():
                rows[row] = rows.get(row, frozenset()) | seeds
        return cls(dict(sorted(rows.items())))

    def to_json(self) -> bytes:
        """As `plan.json` holds it: rows of equal seeds together, the same for equal plans."""
        groups: dict[tuple[int, ...], list[PlannedRow]] = {}
        for row, seeds in sorted(self.rows.items()):
            groups.setdefault(tuple(sorted(seeds)), []).append(row)
        planned = [{"seeds": seeds, "rows": rows} for seeds, rows in sorted(groups.items())]
        return dumps({"schema_version": SCHEMA, "planned": planned}, indent=1).encode()


def write_plan(plan: Plan, folder: Path) -> Path:
    """Writes `plan.json` before the run, so that what never came can be named."""
    write_atomically(folder / NAME, plan.to_json())
    return folder / NAME


class _Group(BaseModel, extra="forbid", strict=True):
    seeds: list[int]
    rows: list[tuple[str, str, str, int]]


class _File(BaseModel, extra="forbid", strict=True):
    schema_version: Literal[2]
    planned: list[_Group]


class _FileOfSchema1(BaseModel, extra="forbid", strict=True):
    schema_version: Literal[1]
    probes: list[int]
    pairs: list[tuple[str, str]]
    models: list[str]
    seeds: list[int]


def load_plan(file: Path) -> Plan:
    """Reads one `plan.json`, of this or an older schema.

    Raises:
        ValueError: It is none.
        UsageError: It was written by a newer version of this tool.
    """
    data = from_json(file.read_bytes())
    version = data.get("schema_version") if isinstance(data, dict) else None
    if isinstance(version, int) and version > SCHEMA:
        raise UsageError(
            f"{file}: plan schema {version} is newer than this tool's {SCHEMA}: upgrade mlx-parity"
        )
    text = to_json(data)  # as JSON: lists are the tuples of a strict model there alone
    if version == 1:
        old = _FileOfSchema1.model_validate_json(text)
        return Plan.product(old.probes, old.pairs, old.models, old.seeds)
    planned = _File.model_validate_json(text).planned
    return Plan.union(
        Plan({PlannedRow(*row): frozenset(g.seeds) for row in g.rows}) for g in planned
    )
