"""Every cell as a line of a table (CSV, Parquet) and as a test case of JUnit's XML."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any
from xml.sax.saxutils import escape, quoteattr

import numpy as np

from parity.cells.plan import GridRow
from parity.results.aggregate import Aggregate
from parity.results.cells import EXPECTED, GREEN, MISSING, lists

AT_ONCE = 32_768
"""Cells that are in memory together."""
_REFUSED = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # by XML 1.0


def tables(result: Aggregate) -> Iterator[Any]:
    """All cells by row and seed, as Arrow tables.

    Columns: the fields of `GridRow`, `seed`, `state`, `verdict`, `excess`; `metric`, `value` and
    `tolerance` of the metric that decides and came nearest to its tolerance or went farthest beyond;
    `reason`, `expected`, `seconds`, `reproduce`. Null where there is no record.
    """
    import pyarrow as pa

    for start in range(0, max(len(result.cells), 1), AT_ONCE):
        cells = result.cells.iloc[start : start + AT_ONCE]
        rows = [result.grid[i] for i in cells["row"].tolist()]
        at = cells["position"].to_numpy()
        there = np.flatnonzero(at >= 0)
        columns = ("verdict", "reason", "seconds", "reproduce", "metrics")
        found = result.store.take(at[there].tolist(), columns)
        back = np.full(len(cells), -1)
        back[there] = np.arange(len(there))
        index = pa.array(back, mask=back < 0)
        texts = {name: found.column(name).take(index) for name in columns[:4]}
        worst = {
            name: column.take(index) for name, column in _worst(found.column("metrics")).items()
        }
        expected = [result.expected.get(p, "") if p >= 0 else None for p in at.tolist()]
        keys = zip(*rows, strict=True) if rows else [()] * len(GridRow._fields)
        yield pa.table({
            **{name: [*values] for name, values in zip(GridRow._fields, keys, strict=True)},
            "seed": cells["seed"].to_numpy(),
            "state": cells["state"].astype(str).tolist(),
            "verdict": texts["verdict"],
            "excess": pa.array(cells["excess"].to_numpy(), mask=at < 0),
            **worst,
            "reason": texts["reason"],
            "expected": pa.array(expected, pa.string()),
            "seconds": texts["seconds"],
            "reproduce": texts["reproduce"],
        }, schema=schema())  # fmt: skip


def schema() -> Any:
    """The columns of `tables`."""
    import pyarrow as pa

    numbers = {name: pa.int64() for name in ("probe", "seed")}
    numbers |= {name: pa.float64() for name in ("excess", "value", "tolerance", "seconds")}
    names = (*GridRow._fields, "seed", "state", "verdict", "excess", "metric", "value", "tolerance",
             "reason", "expected", "seconds", "reproduce")  # fmt: skip
    return pa.schema([(name, numbers.get(name, pa.string())) for name in names])


def _worst(column: Any) -> dict[str, Any]:
    """Name, value and tolerance of one metric of each record; null where none decides."""
    import pyarrow as pa

    lengths, (name, _, value, tolerance, _, accepted, gate, _) = lists(column.combine_chunks())
    of = np.repeat(np.arange(len(lengths)), lengths)
    values, tolerances = (c.to_numpy(zero_copy_only=False) for c in (value, tolerance))
    with np.errstate(divide="ignore", invalid="ignore"):
        times = np.nan_to_num(np.where(values == 0, 0.0, values / tolerances), nan=np.inf)
    times = np.where(accepted.to_numpy(zero_copy_only=False), 0.0, times)
    order = np.lexsort((-times, of))
    order = order[gate.to_numpy(zero_copy_only=False)[order].astype(bool)]
    which, first = np.unique(of[order], return_index=True)
    at = np.full(len(lengths), -1)
    at[which] = order[first]
    index = pa.array(at, mask=at < 0)
    return {
        "metric": name.take(index),
        "value": value.take(index),
        "tolerance": tolerance.take(index),
    }


def write_csv(result: Aggregate, file: Path) -> None:
    """With a header; NaN as `nan`, an absent value as nothing."""
    import pyarrow.csv as csv

    with csv.CSVWriter(file, schema()) as writer:
        for table in tables(result):
            writer.write_table(table)


def write_parquet(result: Aggregate, file: Path) -> None:
    """The same bytes for the same cells."""
    import pyarrow.parquet as pq

    with pq.ParquetWriter(file, schema(), compression="zstd") as writer:
        for table in tables(result):
            writer.write_table(table)


def write_junit(result: Aggregate, file: Path) -> None:
    """A suite for each row of the grid and a test case for each of its cells.

    What diverges, is stale or inconclusive is a failure; what is missing or in error is an error; what
    is skipped or diverges as expected is skipped. Damaged files are errors of a suite of their own.
    """
    with file.open("w", encoding="utf-8") as stream:
        total = [sum(n) for n in zip(*(_counts(line) for line in _lines(result)), strict=True)]
        tests, failures, errors, _ = total or [0] * 4
        more = len(result.damaged)
        stream.write('<?xml version="1.0" encoding="utf-8"?>\n')
        stream.write(
            f'<testsuites name="parity" tests="{tests + more}" failures="{failures}" '
            f'errors="{errors + more}">\n'
        )
        if result.damaged:
            stream.write(f'<testsuite name="damaged files" tests="{more}" failures="0" errors="{more}" skipped="0">\n')  # fmt: skip
            for line in result.damaged:
                name, _, why = line.partition(": ")
                stream.write(f'<testcase classname="damaged files" name={_attribute(name)}>')
                stream.write(f'<error type="damaged" message={_attribute(why)}/></testcase>\n')
            stream.write("</testsuite>\n")
        _write_suites(result, stream)
        stream.write("</testsuites>\n")


def _lines(result: Aggregate) -> list[dict[str, int]]:
    return result.rows.drop(columns="state").to_dict("records")  # type: ignore[return-value]


def _counts(line: dict[str, int]) -> tuple[int, int, int, int]:
    """Tests, failures, errors and skipped ones of a row."""
    failures = line["diverge"] + line["stale"] + line["inconclusive"]
    return line["seeds"], failures, line["error"] + line[MISSING], line["skip"] + line[EXPECTED]


def _write_suites(result: Aggregate, stream: IO[str]) -> None:
    counts = {row: _counts(line) for row, line in zip(result.grid, _lines(result), strict=True)}
    current = None
    for table in tables(result):
        for cell in table.to_pylist():
            row = GridRow(*(cell[name] for name in GridRow._fields))
            if row != current:
                stream.write("</testsuite>\n" * (current is not None))
                numbers = zip(("tests", "failures", "errors", "skipped"), counts[row], strict=True)
                shown = " ".join(f'{name}="{n}"' for name, n in numbers)
                stream.write(
                    f"<testsuite name={_attribute(f'{row.title} · {row.pair}')} {shown}>\n"
                )
                current = row
            stream.write(_case(row, cell))
    stream.write("</testsuite>\n" * (current is not None))


def _case(row: GridRow, cell: dict[str, Any]) -> str:
    name = _attribute(f"{row.title}, seed {cell['seed']}")
    time = f' time="{cell["seconds"]:.3f}"' if cell["seconds"] is not None else ""
    start = f"<testcase classname={_attribute(row.pair)} name={name}{time}"
    state = cell["state"]
    if state in GREEN:
        return f"{start}/>\n"
    message = cell["expected"] or cell["reason"] or "there is no record"
    tag = "skipped" if state in ("skip", EXPECTED) else "failure"
    tag = "error" if state in ("error", MISSING) else tag
    lines = [message]
    if cell["metric"] is not None:
        lines.append(f"{cell['metric']}: {cell['value']:.3g}, {cell['tolerance']:.3g} allowed")
    if cell["reproduce"]:
        lines.append(f"reproduce: {cell['reproduce']}")
    body = escape(_clean("\n".join(lines)))
    return (
        f'{start}><{tag} type="{state}" message={_attribute(message)}>{body}</{tag}></testcase>\n'
    )


def _clean(text: str) -> str:
    return _REFUSED.sub("\ufffd", text)


def _attribute(text: str) -> str:
    return quoteattr(_clean(text))
