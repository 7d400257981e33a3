"""The files of a sweep: HTML, Markdown and JSON."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from parity import __version__
from parity.files import write_atomically
from parity.report.html import templates
from parity.report.labels import SYMBOLS
from parity.report.sweep_view import EXPLAINED, PROMISES, Page, Row, page
from parity.sweep.changes import Change
from parity.sweep.questions import QUESTIONS
from parity.sweep.run import Found

NAME = "architectures"
PACKAGES = ("transformers", "torch", "mlx", "mlx-lm", "numpy", "peft", "safetensors")
SHOWN = 6
"""Names of causes in a row of the table."""


def write(out: Path, found: Found, moves: Sequence[Change], complete: bool) -> list[Path]:
    """Writes what was found; the page first."""
    shown = page(found, moves, complete, _versions(found))
    data = {
        "schema": 1, "versions": shown.versions, "columns": found.columns, "complete": complete,
        "seconds": round(found.seconds, 1), "unavailable": found.unavailable,
        "not_made": {a.name: a.why_not for a in shown.not_made}, "no_language_model": found.skipped,
        "does_not_promise": list(PROMISES),
        "architectures": {
            name: {
                "class": a.kind, "idle": a.found.idle, "refused": a.found.refused,
                "configurations": {
                    c.name: [{"kind": t.kind, "changes": t.changes} for t in c.traps] for c in a.found.made
                },
            }
            for name, a in sorted(found.architectures.items()) if not a.why_not
        },
        "cells": [cell.to_json() for _, cell in sorted(found.cells.items())],
        "changes": [asdict(change) for change in moves],
    }  # fmt: skip
    files = {
        "html": _html(shown),
        "md": markdown(shown),
        "json": json.dumps(data, indent=1, ensure_ascii=False) + "\n",
    }
    written = []
    for ending, content in files.items():
        file = out / f"{NAME}.{ending}"
        write_atomically(file, content.encode())
        written.append(file)
    return written


def _versions(found: Found) -> dict[str, str]:
    """Versions of everything, and of the machine."""
    here: dict[str, str] = {"mlx-parity": __version__, "Python": platform.python_version(),
                            "machine": f"{platform.system()} {platform.machine()}"}  # fmt: skip
    for name in PACKAGES:
        try:
            here[name] = version(name)
        except PackageNotFoundError:
            here[name] = "not installed"
    set_here = {
        k: v for k, v in sorted(os.environ.items()) if k.startswith(("MLX_", "PARITY_TORCH"))
    }
    if set_here:
        here["variables"] = ", ".join(f"{k}={v}" for k, v in set_here.items())
    for column in found.columns:
        versions = next(
            (c.versions for (_, n), c in found.cells.items() if n == column and c.versions), {}
        )
        if versions:
            here[f"column {column}"] = ", ".join(f"{k} {v}" for k, v in sorted(versions.items()))
    return here


def _short(row: Row) -> list[str]:
    """Keys and modules of the causes of a row."""
    names: dict[str, None] = {}
    for reason in row.reasons:
        text = re.sub(r"\.\{.*?\}", "", reason.cause.name)  # rope_parameters.{rope_type, factor}
        for part in text.split(", "):
            last = part.rpartition(".")[2]
            if last in ("weight", "bias", "weight_scale"):
                last = ".".join(part.split(".")[-2:])
            if last and last != "plain":
                names.setdefault(last)
    listed = list(names)
    return listed[:SHOWN] + ([f"{len(listed) - SHOWN} more"] if len(listed) > SHOWN else [])


def _html(shown: Page) -> str:
    environment = templates()
    environment.filters["short"] = _short
    environment.globals |= {"symbols": SYMBOLS}
    text: str = environment.get_template("sweep.html.j2").render(
        page=shown, promises=PROMISES, explained=EXPLAINED, red=any(row.red for row in shown.rows)
    )
    return text


def markdown(shown: Page) -> str:
    """The same as text: the table, what changed, the causes of each red row."""
    found = shown.found
    lines = [
        f"# {len(shown.rows)} architectures: mlx-lm against transformers {found.transformers}",
        "",
        *(["**Not finished.**", ""] if not shown.complete else []),
        "Each architecture is a tiny random model that transformers made and saved; its configuration sets every",
        "trap that its keys allow. The five marks are, in this order: "
        + ", ".join(QUESTIONS)
        + ".",
        "`=` identical, `✓` agrees, `(✓)` agrees once config.json is edited as a cause says, `✗` diverges, `!` fails, `?` inconclusive, `–` not asked.",
        "",
        *(f"- {words[0]}: {words[1]}" for words in EXPLAINED.items()),
        "",
        "| mlx-lm | architectures asked | green | green once edited | red | not asked |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        *(f"| {' | '.join(map(str, total))} |" for total in shown.totals),
        "",
        "## The table",
        "",
        f"| architecture | {' | '.join(found.columns)} | causes |",
        f"| --- | {' | '.join('---' for _ in found.columns)} | --- |",
    ]
    for row in shown.rows:
        cells = [
            "`" + "".join(square.mark for square in squares) + "`" if squares else why
            for _, squares, why in row.cells
        ]
        lines.append(
            f"| {row.architecture.name} | {' | '.join(cells)} | {', '.join(_short(row))} |"
        )
    lines += ["", "## What changed between the releases", ""]
    if shown.moves:
        lines += [f"- {change.sentence()}" for change in shown.moves]
    else:
        lines.append("Nothing." if len(found.columns) > 1 else "One release was asked.")
    lines += ["", "## What a green cell does not promise", "", *(f"- {text}" for text in PROMISES)]
    if shown.not_made or found.skipped:
        lines += ["", "## Architectures that both know and that were not asked", ""]
        lines += [f"- {a.name}: {a.why_not}" for a in shown.not_made]
        lines += [f"- {name}: {why}" for name, why in found.skipped.items()]
    lines += ["", "## Versions", "", "| | |", "| --- | --- |"]
    lines += [f"| {name} | {value} |" for name, value in shown.versions.items()]
    lines += ["", "## Causes", ""]
    for row in shown.rows:
        if not (row.reasons or row.remark):
            continue
        lines += [f"### {row.architecture.name}", ""]
        lines += [f"{row.remark}.", ""] * bool(row.remark)
        for reason in row.reasons:
            name = f"**{reason.cause.name}**: " if reason.cause.name else ""
            where = "; ".join(reason.where)
            lines += [f"- {name}{reason.cause.sentence}"]
            lines += [f"  - {reason.cause.fix}"] * bool(reason.cause.fix)
            columns = f", in {', '.join(reason.columns)}" if len(found.columns) > 1 else ""
            lines += [f"  - turns red: {where}{columns}", f"  - `{reason.reproduce}`"]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"
