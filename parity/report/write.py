"""A run's results as files: JSON, CSV, Markdown and HTML."""

from __future__ import annotations

from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from parity.files import dumps, write_atomically
from parity.record import Record
from parity.report import html, markdown
from parity.results.aggregate import SCHEMA, Aggregate


def to_json(result: Aggregate) -> str:
    """Everything but the records and their steps; NaN and infinities survive `trace.loads`."""

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

    names = ("verdict", "exit_code", "reason", "counts", "seeds", "first", "curves", "passes")
    data = {name: plain(getattr(result, name)) for name in (*names, "notes", "gaps", "problems")}
    tables = {name: getattr(result, name).to_dict("records") for name in ("summary", "grid")}
    return dumps({"schema_version": SCHEMA, **data, **tables}, indent=1)


def write(result: Aggregate, folder: Path) -> list[Path]:
    """Writes JSON, CSV, Markdown and HTML; each file atomically."""
    texts = {"aggregate.json": to_json(result)}
    for name in ("summary", "grid", "steps"):
        texts[f"{name}.csv"] = getattr(result, name).to_csv(
            index=False, na_rep="nan", lineterminator="\n"
        )
    texts |= {"report.md": markdown.render(result), "report.html": html.render(result)}
    for name, text in texts.items():
        write_atomically(folder / name, text.encode())
    return [folder / name for name in texts]
