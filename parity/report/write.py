"""A run's results as files: JSON, CSV, Markdown and HTML."""

from __future__ import annotations

from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from parity.files import to_json, write_atomically
from parity.record import Record
from parity.report import html, markdown
from parity.results.aggregate import SCHEMA, Aggregate


def aggregate_json(result: Aggregate) -> bytes:
    """Everything but the steps; records by name. NaN and infinities are strings: see `to_json`."""

    def plain(value: Any) -> Any:
        if isinstance(value, Record):
            return value.name
        if isinstance(value, tuple) and hasattr(value, "_asdict"):
            return {key: plain(item) for key, item in value._asdict().items()}
        if is_dataclass(value) and not isinstance(value, type):
            return plain(asdict(value))
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    names = (
        "verdict", "exit_code", "reason", "counts", "seeds", "first", "curves", "passes", "notes",
        "gaps", "problems", "damaged", "about", "versions", "memory",
    )  # fmt: skip
    data = {name: plain(getattr(result, name)) for name in names}
    rows = result.rows.astype({"state": str}).to_dict("records")
    return to_json({"schema_version": SCHEMA, **data, "rows": rows})


def write(result: Aggregate, folder: Path) -> list[Path]:
    """Writes JSON, CSV, Markdown and HTML; each file atomically."""
    files = {"aggregate.json": aggregate_json(result)}
    files["summary.csv"] = result.rows.to_csv(index=False, na_rep="nan").encode()
    files["report.md"] = markdown.render(result).encode()
    files["report.html"] = html.render(result).encode()
    for name, content in files.items():
        write_atomically(folder / name, content)
    return [folder / name for name in files]
