"""Many records as columns: what all of them are summed up from, and each whole record beside it.

A store is a Parquet file, or the same table in memory. Its columns hold what an aggregate reads of
every record; `json` holds the record itself, which is read for the few that are shown in full.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from parity.capture.machine import PEAK_MEMORY
from parity.files import dumps
from parity.record import SCHEMA as RECORD_SCHEMA
from parity.record import Record, parse
from parity.results.expected import versions_of
from parity.results.texts import without_numbers

ROWS = 1024
"""Records in a row group: a whole record is read with those of its group."""
BATCH = 16 * ROWS
"""Records whose columns are read at once."""
MANY = 16
"""Row groups from which on all are read one after the other, which takes less than finding each."""

STEP_COLUMNS = {
    "loss_subject": "loss subject",
    "loss_reference": "loss reference",
    "dloss": "dloss",
    "grad_subject": "gradient_norm subject",
    "grad_reference": "gradient_norm reference",
    "dgrad": "dgrad",
    "dloss_shipped": "dloss as shipped",
    "dloss_floor": "dloss floor",
    "dgrad_floor": "dgrad floor",
}
"""Columns of step-for-step values and the series of a record that fill them."""

KEY = ("model", "subject", "reference", "probe", "stage")
"""Columns that make a row of the grid."""

_METRIC = {
    "name": pa.string(),
    "verdict": pa.string(),
    "value": pa.float64(),
    "tolerance": pa.float64(),
    "floor": pa.float64(),
    "accepted": pa.bool_(),
    "gate": pa.bool_(),
    "step": pa.int64(),
}
_NOTE = {"kind": pa.string(), "pattern": pa.string(), "text": pa.int64()}
_PASS = {"side": pa.string(), "prompt": pa.string(), "passed": pa.bool_()}
_LISTS = {"metrics": _METRIC, "notes": _NOTE, "passes": _PASS}
_PLAIN = {
    "model": pa.string(),
    "subject": pa.string(),
    "reference": pa.string(),
    "probe": pa.int64(),
    "stage": pa.string(),
    "seed": pa.int64(),
    "verdict": pa.string(),
    "reason": pa.string(),
    "reproduce": pa.string(),
    "seconds": pa.float64(),
    "versions": pa.string(),
    "about": pa.string(),
    "memory": pa.string(),
    "steps": pa.int64(),
}
SCHEMA = pa.schema(
    [
        *_PLAIN.items(),
        *((name, pa.list_(pa.struct(list(of.items())))) for name, of in _LISTS.items()),
        *((name, pa.list_(pa.float64())) for name in STEP_COLUMNS),
        ("json", pa.large_string()),
    ]
)
"""`notes.text` is a hash of the text; `versions` holds JSON by side, `about` the tool and platforms,
`memory` the peak of each path in bytes as JSON."""

_DICTIONARIES = [name for name, kind in _PLAIN.items() if kind == pa.string()] + [
    f"{name}.list.element.{field}"
    for name, of in _LISTS.items()
    for field, kind in of.items()
    if kind == pa.string()
]


def table_of(records: Iterable[Record]) -> pa.Table:
    """The records as columns, in their order."""
    records = list(records)
    columns: list[Any] = [
        pa.array([r.model for r in records], pa.string()),
        pa.array([r.subject.path for r in records], pa.string()),
        pa.array([r.reference.path for r in records], pa.string()),
        pa.array([r.probe for r in records], pa.int64()),
        pa.array([r.stage for r in records], pa.string()),
        pa.array([r.seed for r in records], pa.int64()),
        pa.array([r.verdict.value for r in records], pa.string()),
        pa.array([r.reason for r in records], pa.string()),
        pa.array([r.reproduce for r in records], pa.string()),
        pa.array([r.seconds for r in records], pa.float64()),
        pa.array([_versions(r) for r in records], pa.string()),
        pa.array([_about(r) for r in records], pa.string()),
        pa.array([_memory(r) for r in records], pa.string()),
        pa.array([_steps(r) for r in records], pa.int64()),
        _metrics(records),
        _lists(records, _NOTE, _notes),
        _lists(records, _PASS, _passes),
    ]
    for name in STEP_COLUMNS.values():
        columns.append(pa.array([r.series.get(name) for r in records], pa.list_(pa.float64())))
    columns.append(pa.array([r.model_dump_json() for r in records], pa.large_string()))
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def in_order(table: pa.Table) -> pa.Table:
    """The records by row of the grid, seed and content."""
    return table.sort_by([(name, "ascending") for name in (*KEY, "seed", "json")])


def _structs(lists: Sequence[Sequence[Any]], of: dict[str, Any], columns: Sequence[Any]) -> Any:
    """Lists of structs, given their lengths by `lists` and the values of each field."""
    offsets = np.cumsum([0, *map(len, lists)])
    arrays = [pa.array(v, kind) for v, kind in zip(columns, of.values(), strict=True)]
    struct = pa.StructArray.from_arrays(arrays, fields=[pa.field(*item) for item in of.items()])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), struct)


def _metrics(records: Sequence[Record]) -> Any:
    flat = [m for r in records for m in r.metrics]
    columns = [
        [m.name for m in flat],
        [m.verdict.value for m in flat],
        [m.value for m in flat],
        [m.tolerance for m in flat],
        [m.floor for m in flat],
        [bool(m.accepted) for m in flat],
        [m.gate for m in flat],
        [m.step for m in flat],
    ]
    return _structs([r.metrics for r in records], _METRIC, columns)


def _lists(records: Sequence[Record], of: dict[str, Any], items: Any) -> Any:
    lists = [items(record) for record in records]
    columns = list(zip(*(item for found in lists for item in found), strict=True))
    return _structs(lists, of, columns or [()] * len(of))


def _notes(record: Record) -> list[tuple[str, str, int]]:
    """Kind, text without its numbers and hash of the text, for each finding and hint."""
    found = []
    for kind, text in notes_of(record):
        digest = hashlib.blake2b(text.encode(), digest_size=7).digest()
        found.append((kind, without_numbers(text), int.from_bytes(digest)))
    return found


def notes_of(record: Record) -> Iterator[tuple[str, str]]:
    """Kind and text of each finding (`shipped` or `finding`) and hint."""
    for text in record.findings:
        yield ("shipped" if text.startswith("as shipped") else "finding"), text
    for text in record.hints:
        yield "hint", text


def _passes(record: Record) -> list[tuple[str, str, bool]]:
    return [(s, prompt, p) for s, of in record.passes.items() for prompt, p in of.items()]


def _versions(record: Record) -> str:
    sides = {"subject": record.subject, "reference": record.reference}
    return dumps({name: versions_of(side) for name, side in sides.items()})


def _memory(record: Record) -> str:
    found: dict[str, int] = {}
    for side in (record.subject, record.reference):
        if isinstance(peak := side.environment.get(PEAK_MEMORY), int):
            found[side.path] = max(found.get(side.path, 0), peak)
    return dumps(found)


def _about(record: Record) -> str:
    tool = f"mlx-parity {record.tool}" + f" at {record.git}" * bool(record.git)
    sides = (record.subject, record.reference)
    found = [str(value) for side in sides if (value := side.environment.get("platform"))]
    return " · ".join(dict.fromkeys([tool, *found]))


def _steps(record: Record) -> int:
    steps = record.reference.recipe.get("train.steps", 0)
    return steps if isinstance(steps, int) else 0


class Store:
    """Records that are read as columns, in a fixed order; a record has its position in it."""

    def __init__(self, source: pa.Table | Path) -> None:
        self._file = None
        if isinstance(source, Path):
            self._file = pq.ParquetFile(source, pre_buffer=False)
            self._starts, at = [], 0
            for group in range(self._file.num_row_groups):
                self._starts.append(at)
                at += self._file.metadata.row_group(group).num_rows
            self.size: int = at
        else:
            self._table, self.size = source, source.num_rows

    @classmethod
    def of(cls, records: Iterable[Record]) -> Store:
        """A store in memory, the same whatever the order of the records."""
        return cls(in_order(table_of(records)))

    def batches(self, columns: Sequence[str]) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Position of the first record of each batch, and these columns of it."""
        at = 0
        if self._file is not None:
            found = self._file.iter_batches(BATCH, columns=[*columns])
        else:
            found = self._table.select([*columns]).to_batches()
        for batch in found:
            yield at, batch
            at += batch.num_rows

    def take(self, positions: Sequence[int], columns: Sequence[str]) -> pa.Table:
        """These columns of the records at these positions, in their order."""
        wanted = np.asarray(positions, np.int64)
        if self._file is None:
            return self._table.select([*columns]).take(pa.array(wanted))
        order = np.argsort(wanted, kind="stable")
        ascending = wanted[order]
        groups = np.searchsorted(self._starts, ascending, side="right") - 1
        parts = [SCHEMA.empty_table().select([*columns])]
        if len(which := np.unique(groups)) > MANY and "json" not in columns:
            for start, batch in self.batches(columns):
                at = np.searchsorted(ascending, [start, start + batch.num_rows])
                here = ascending[at[0] : at[1]] - start
                parts.append(pa.Table.from_batches([batch]).take(pa.array(here)))
        else:
            for group in which:
                here = ascending[groups == group] - self._starts[group]
                parts.append(self._file.read_row_group(group, [*columns]).take(pa.array(here)))
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        return pa.concat_tables(parts).take(pa.array(back))

    def records(self, positions: Sequence[int]) -> list[Record]:
        """The whole records at these positions."""
        texts = self.take(positions, ["json"]).column("json")
        return [parse(text.as_py().encode(), whole=False) for text in texts]


def without_copies(table: pa.Table) -> tuple[pa.Table, int]:
    """Records in order without those that follow their equal, and the number of these."""
    if table.num_rows < 2:
        return table, 0
    same = None
    for name in (*KEY, "seed", "json"):
        column = table.column(name).combine_chunks()
        equal = pc.equal(column[1:], column[:-1])
        same = equal if same is None else pc.and_(same, equal)
    keep = pa.concat_arrays([pa.array([True]), pc.invert(same)])
    kept = table.filter(keep)
    return kept, table.num_rows - kept.num_rows


def whole(file: Path, schema: int) -> Iterator[pa.Table]:
    """All columns of a store on disk, whose records are of this schema, a part at a time."""
    with pq.ParquetFile(file, pre_buffer=False) as source:
        for batch in source.iter_batches(2 * ROWS):
            if schema == RECORD_SCHEMA:
                yield pa.Table.from_batches([batch]).cast(SCHEMA)
            else:
                texts = batch.column("json").to_pylist()
                yield table_of(parse(text.encode(), whole=False) for text in texts)


def write(tables: Iterable[pa.Table], file: Path) -> int:
    """Writes tables of records as one store, the same bytes for the same records; returns their number."""
    count = 0
    with pq.ParquetWriter(
        file,
        SCHEMA,
        compression="zstd",
        compression_level=3,
        use_dictionary=_DICTIONARIES,
    ) as writer:
        for table in _of_rows(tables, ROWS):
            writer.write_table(table, row_group_size=ROWS)
            count += table.num_rows
    return count


def _of_rows(tables: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    """The same records in tables of a multiple of `rows`, but for the last."""
    left = SCHEMA.empty_table()
    for table in tables:
        left = pa.concat_tables([left, table])
        if full := left.num_rows // rows * rows:
            yield left[:full]
            left = left[full:]
    if left.num_rows:
        yield left
