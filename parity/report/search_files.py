"""What a search found as files: JSON, Markdown and a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from parity.bisect.answer import answer
from parity.bisect.result import SearchReport
from parity.bisect.versions import Change
from parity.files import to_json, write_atomically
from parity.report.markdown import table
from parity.report.search_page import render, render_versions


def save(folder: Path, report: SearchReport) -> list[Path]:
    """Writes bisect.json, bisect.md and bisect.html of a search for causes."""
    return _save(folder, asdict(report), markdown(report), render(report))


def save_versions(folder: Path, changes: Sequence[Change], command: str) -> list[Path]:
    """Writes bisect.json, bisect.md and bisect.html of changes that a command line found."""
    title = f"What moved with {', '.join(change.package for change in changes)}"
    lines = [f"# {title}", "", *(f"- {change.sentence()}" for change in changes), ""]
    for change in changes:
        checks = [
            [str(step), check.candidate, str(check.outcome), check.reason]
            for step, check in enumerate(change.found.finished, 1)
        ]
        lines += [
            f"## {change.package}",
            "",
            table(["step", "version", "outcome", "reason"], checks),
        ]
    lines += [f"Found by `{command}`.", ""]
    data = {"command": command, "changes": [asdict(change) for change in changes]}
    return _save(folder, data, "\n".join(lines), render_versions(changes, title, command))


def markdown(report: SearchReport) -> str:
    """The report as Markdown."""
    lines = [f"# {report.subject} against {report.reference}: {report.verdict}", ""]
    lines += [answer(report), ""]
    lines += [
        f"{report.differing} factors differ; {report.runs} recipes of the subject were run in "
        f"{report.seconds:.0f} s.",
        "",
    ]
    if report.settings:
        lines += ["## Effective settings that differ", "", *(f"- {s}" for s in report.settings), ""]
    if report.ledger:
        rows = [[", ".join(e.changes), str(e.status), "; ".join(e.evidence)] for e in report.ledger]
        lines += ["## Ledger", "", table(["hypothesis", "status", "evidence"], rows)]
    return "\n".join(lines)


def _save(folder: Path, data: Any, text: str, page: str) -> list[Path]:
    """Writes what a search found as JSON, Markdown and HTML."""
    files = {
        folder / "bisect.json": to_json(data),
        folder / "bisect.md": text.encode(),
        folder / "bisect.html": page.encode(),
    }
    for file, content in files.items():
        write_atomically(file, content)
    return list(files)
