"""A run's results as files: HTML, Markdown, JSON, CSV, Parquet and JUnit's XML."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from parity.errors import UsageError
from parity.files import atomic, to_json
from parity.record import Record
from parity.report import cells, html, markdown
from parity.results.aggregate import SCHEMA, Aggregate

SEEDS = 50
"""Longer lists of seeds are given in JSON by their number and the first of them."""
CHANGED = 500
"""Cells that changed are listed in JSON up to that many."""


def aggregate_json(result: Aggregate) -> bytes:
    """What reports are made from; records by name. NaN and infinities are strings: see `to_json`."""

    def plain(value: Any) -> Any:
        if isinstance(value, Record):
            return value.name
        if isinstance(value, tuple) and hasattr(value, "_asdict"):
            return {key: plain(item) for key, item in value._asdict().items()}
        if is_dataclass(value) and not isinstance(value, type):
            return plain(asdict(value))
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, tuple) and len(value) > SEEDS and {*map(type, value)} == {int}:
            return {"number": len(value), "first": value[:SEEDS]}
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    names = (
        "verdict", "exit_code", "reason", "counts", "seeds", "first", "curves", "passes", "notes",
        "gaps", "problems", "damaged", "about", "versions", "memory",
    )  # fmt: skip
    data = {name: plain(getattr(result, name)) for name in names}
    rows = result.rows.astype({"state": str}).to_dict("records")
    return to_json({"schema_version": SCHEMA, **data, "rows": rows, "changes": _changes(result)})


def _changes(result: Aggregate) -> dict[str, Any] | None:
    if (changes := result.changes) is None:
        return None
    listed = changes.cells.head(CHANGED).to_dict("records")
    rows = changes.rows.to_dict("records")
    counts, versions = changes.counts, changes.versions
    return {"counts": counts, "versions": versions, "rows": rows, "cells": listed}


def _bytes(render: Callable[[Aggregate], bytes]) -> Callable[[Aggregate, Path], None]:
    def written(result: Aggregate, file: Path) -> None:
        file.write_bytes(render(result))

    return written


def _summary(result: Aggregate) -> bytes:
    return result.rows.to_csv(index=False, na_rep="nan").encode()


FORMATS: Mapping[str, Mapping[str, Callable[[Aggregate, Path], None]]] = {
    "json": {"aggregate.json": _bytes(aggregate_json)},
    "csv": {"summary.csv": _bytes(_summary), "cells.csv": cells.write_csv},
    "parquet": {"cells.parquet": cells.write_parquet},
    "junit": {"junit.xml": cells.write_junit},
    "markdown": {"report.md": _bytes(lambda result: markdown.render(result).encode())},
    "html": {"report.html": _bytes(lambda result: html.render(result).encode())},
}
"""Format to the files that it has and what writes each."""


def parse_formats(text: str) -> tuple[str, ...]:
    """`markdown,junit`, or all where nothing is given.

    Raises:
        UsageError: There is no such format.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in FORMATS:
            raise UsageError(f"--format {name!r}: give some of {', '.join(FORMATS)}")
    return tuple(name for name in FORMATS if name in names or not names)


def write(result: Aggregate, folder: Path, formats: Collection[str] = ()) -> list[Path]:
    """Writes the files of these formats, or of all; each file atomically."""
    written = []
    for name, files in FORMATS.items():
        for file, save in files.items():
            if name in formats or not formats:
                with atomic(folder / file) as part:
                    save(result, part)
                written.append(folder / file)
    return written
