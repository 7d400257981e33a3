"""Finished records, kept by what they were made of: a cell is not compared twice where nothing changed.

A record follows from the cell, from this tool's code and from its captures. It is used again where the first
two are the same, and where each of its captures would be used again itself (see `parity.capture.loaded`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import parity
from parity import resources, timing
from parity.capture import keys, machine, storage
from parity.capture.bundle import is_bundle
from parity.capture.engine import Engine, Source
from parity.cells.cell import Cell, reproduce
from parity.cells.run import REFEREE, run_cell, sources_of
from parity.errors import NO_ANSWER
from parity.files import write_atomically
from parity.recipe import Recipe
from parity.record import Record, Verdict, parse
from parity.stages import STAGES
from parity.trace import Trace

_LIBRARIES = ("numpy", "scipy", "pydantic")
"""What comparing computes with and records are written with, beside this package."""
_ONE = threading.Lock()
"""Reading is all Python: two threads at it take longer than one."""


@dataclass
class _Uses:
    """The captures that a record is made of, by path."""

    cache: Path
    environments: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    files: dict[str, dict[str, None]] = field(default_factory=dict)
    usable: bool = True
    """Whether all of them succeeded, those of one path in one environment."""

    def noted(self, spec: str, source: Source) -> Source:
        """The same source, its answers noted as those of a path."""

        def capture(method: str, recipe: Recipe, inputs: Trace, attempt: str = "") -> Trace:
            try:
                trace = source(method, recipe, inputs, attempt)
            except BaseException:
                self.usable = False  # what failed once may not fail again
                raise
            first = self.environments.setdefault(spec, trace.environment)
            self.usable &= not machine.differences(first, trace.environment)
            self.files.setdefault(spec, {})[os.path.relpath(trace.file, self.cache)] = None
            return trace

        return capture


def run_kept(engine: Engine, cell: Cell, repeat: bool = False) -> Record:
    """The record of a cell as `run_cell` gives it, or as it gave it before of the same captures.

    Args:
        engine: Owns workers and cache.
        cell: What is asked.
        repeat: See `run_cell`.
    """
    specs = {"subject": cell.subject, "reference": cell.reference, "referee": REFEREE}
    if cell.stage not in STAGES or any(map(is_bundle, specs.values())):
        return run_cell(engine, cell, repeat)
    started = time.perf_counter()
    with _ONE, timing.span(timing.READ, "finished record"):
        file = _file(engine.cache, cell, repeat, specs)
        if found := _read(engine, file):
            changes = {"seconds": time.perf_counter() - started, "git": keys.git_state()}
            return found.model_copy(update=changes)
    uses = _Uses(engine.cache)
    sources = {side: uses.noted(specs[side], s) for side, s in sources_of(engine, cell).items()}
    record = run_cell(engine, cell, repeat, sources)
    if uses.usable and record.verdict not in (Verdict.ERROR, Verdict.SKIP):
        head = json.dumps({"environments": uses.environments, "files": uses.files}, default=dict)
        text = record.model_dump_json(indent=1).encode()
        # A cache that cannot be written makes it slower, not wrong.
        with contextlib.suppress(OSError):
            write_atomically(file, head.encode() + b"\n" + text)
    return record


def _file(folder: Path, cell: Cell, repeat: bool, specs: Mapping[str, str]) -> Path:
    """Where the record of a cell is kept, by all that it depends on but its captures."""
    recipes = [cell.recipe, *map(cell.recipe.override, cell.changes.values())]
    words = [
        _code(), cell.stage.name, str(repeat), reproduce(cell), cell.model,
        *(f"{spec} {keys.of_path(spec)}" for spec in specs.values()),
        *map(keys.of_recipe, recipes),
    ]  # fmt: skip
    key = hashlib.sha256("\n".join(words).encode()).hexdigest()[:32]
    return folder / storage.RECORDS / key[:2] / f"{key}.json"


@cache
def _code() -> str:
    """The state of this package and of the libraries that records come from."""
    libraries = (f"{name}={version(name)}" for name in _LIBRARIES)
    own = resources.fingerprint(Path(parity.__file__).parent)
    return " ".join([sys.version, own, *libraries])


def _read(engine: Engine, file: Path) -> Record | None:
    """A record that is kept, where each of its captures would be used again."""
    try:
        head, _, text = file.read_bytes().partition(b"\n")
        uses = json.loads(head)
        record = parse(text, whole=False)
        files = [(spec, engine.cache / name) for spec, of in uses["files"].items() for name in of]
        environments = uses["environments"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none, or a damaged one
        return None
    try:
        again = all(engine.would_use(spec, capture, environments[spec]) for spec, capture in files)
    except NO_ANSWER:
        return None
    return record if again and files and storage.used(file) else None
