"""The files of a sweep: HTML, Markdown and JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from parity.files import write_atomically
from parity.sweep.changes import Change
from parity.sweep.run import Found


def write(out: Path, found: Found, moves: Sequence[Change], complete: bool) -> list[Path]:
    """Writes what was found; the page first."""
    data = {
        "columns": found.columns, "transformers": found.transformers, "complete": complete,
        "seconds": round(found.seconds, 1), "unavailable": found.unavailable, "skipped": found.skipped,
        "cells": [cell.to_json() for _, cell in sorted(found.cells.items())],
        "changes": [asdict(change) for change in moves],
    }  # fmt: skip
    file = out / "architectures.json"
    write_atomically(file, json.dumps(data, indent=1, ensure_ascii=False).encode())
    return [file]
