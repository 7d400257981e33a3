"""What a search found as files: JSON, Markdown and a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from parity.bisect.causes import SearchReport
from parity.bisect.versions import Change
from parity.files import dumps, write_atomically
from parity.report.search_page import render, render_versions


def save(folder: Path, report: SearchReport) -> list[Path]:
    """Writes bisect.json, bisect.md and bisect.html of a search for causes."""
    return _save(folder, asdict(report), markdown(report), render(report))


def save_versions(folder: Path, changes: Sequence[Change], command: str) -> list[Path]:
    """Writes bisect.json, bisect.md and bisect.html of changes that a command line found."""
    title = f"What moved with {', '.join(change.package for change in changes)}"
    lines = [f"# {title}", "", *(f"- {change.sentence()}" for change in changes), ""]
    for change in changes:
        lines += [
            f"## {change.package}",
            "",
            "| step | version | outcome | said |",
            "|---|---|---|---|",
        ]
        lines += [
            f"| {step} | {told.candidate} | {told.outcome} | {told.reason.replace('|', '/')} |"
            for step, told in enumerate(change.found.told, 1)
        ]
        lines.append("")
    lines += [f"Found by `{command}`.", ""]
    data = {"command": command, "changes": [asdict(change) for change in changes]}
    return _save(folder, data, "\n".join(lines), render_versions(changes, title, command))


def markdown(report: SearchReport) -> str:
    """The report for people."""
    lines = [f"# {report.subject} against {report.reference}: {report.verdict}", ""]
    lines += [report.answer(), ""]
    lines += [
        f"{report.differing} factors differ; {report.runs} recipes of the subject were run in "
        f"{report.seconds:.0f} s.",
        "",
    ]
    if report.settings:
        lines += ["## Effective settings that differ", "", *(f"- {s}" for s in report.settings), ""]
    if report.ledger:
        lines += ["## Ledger", "", "| hypothesis | status | evidence |", "|---|---|---|"]
        for entry in report.ledger:
            evidence = "; ".join(entry.evidence)
            lines.append(f"| {', '.join(entry.changes)} | {entry.status} | {evidence} |")
        lines.append("")
    return "\n".join(lines)


def _save(folder: Path, data: Any, text: str, page: str) -> list[Path]:
    """Writes what a search found as JSON, Markdown and HTML."""
    files = {
        folder / "bisect.json": dumps(data, indent=1),
        folder / "bisect.md": text,
        folder / "bisect.html": page,
    }
    for file, content in files.items():
        write_atomically(file, content.encode())
    return list(files)
