"""The cells that a run is to fill, kept so that what never came can be named."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from parity.errors import UsageError
from parity.files import dumps, loads, write_atomically
from parity.record import Record

if TYPE_CHECKING:
    from parity.cells.cell import Cell

SCHEMA = 1


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
            tuple(sorted({(c.names["subject"], c.names["reference"]) for c in cells})),
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
