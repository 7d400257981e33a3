"""A sweep: every architecture on every column, kept as it goes, so that it can be stopped and continued."""

from __future__ import annotations

import contextlib
import json
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import parity
from parity.bisect.versions import VersionEngine
from parity.capture.environments import UnavailableVersion, digest
from parity.errors import UsageError, closest
from parity.files import write_atomically
from parity.sweep.answers import Answer, Cause, Cell, read
from parity.sweep.bench import Column
from parity.sweep.columns import Columns, Planned, key_of
from parity.sweep.examine import Examiner
from parity.sweep.maker import Maker
from parity.sweep.models import Architecture, Store
from parity.sweep.questions import QUESTIONS
from parity.sweep.sources import Sources

ASIDE = ("report", "commands", "cli.py", "ci", "pytest_plugin.py", "replay", "adapters", "audit")
"""Parts of this package on which no answer depends."""


@dataclass
class Found:
    """What a sweep has so far, for the report."""

    columns: list[str]
    architectures: dict[str, Architecture] = field(default_factory=dict)
    cells: dict[tuple[str, str], Cell] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)
    """Column → why nothing could be asked of it."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Model type that both know → why it is no causal language model here."""
    transformers: str = ""
    seconds: float = 0.0
    expected: int = 0
    """Cells that there are when all is finished."""


def common(
    registry: dict[str, object], columns: Iterable[Sources]
) -> tuple[list[str], dict[str, str]]:
    """Model types that transformers and mlx-lm both have, and those of them that are no language model.

    Args:
        registry: What transformers knows, see `parity.paths.hf.tiny.registry`.
        columns: Sources of mlx-lm; a type counts that any of them has.
    """
    sources = list(columns)
    known: list[str] = registry["known"]  # type: ignore[assignment]
    causal: dict[str, str] = registry["causal"]  # type: ignore[assignment]
    both = [name for name in known if any(s.file(name) is not None for s in sources)]
    aside = {
        name: "transformers has no causal language model of this type: its text model is another type"
        for name in both
        if name not in causal
    }
    return sorted(name for name in both if name in causal), aside


class Sweep:
    """Runs cells in threads; each thread has a process of its own that makes models.

    Args:
        columns: What is compared with transformers.
        cache: Keeps models and finished cells.
        jobs: Architectures under way at once.
        wanted: Questions that are asked.
        chosen: Configurations that are asked; empty: all.
        progress: Called with each finished cell.
    """

    def __init__(
        self, columns: Columns, cache: Path, jobs: int,
        wanted: tuple[str, ...] = QUESTIONS, chosen: tuple[str, ...] = (),
        progress: Callable[[Cell, bool], None] | None = None,
    ) -> None:  # fmt: skip
        self.columns, self.cache, self.jobs = columns, cache.resolve(), jobs
        self.wanted, self.chosen = wanted, chosen
        self.progress = progress or (lambda cell, kept: None)
        self.stopped = threading.Event()
        self._local = threading.local()
        self._makers: list[Maker] = []
        self._live: dict[str, Column | str] = {}
        self._lock = threading.Lock()
        self._code = _code()

    def run(self, only: tuple[str, ...] = (), found: Found | None = None) -> Found:
        """All cells of all architectures, or of some.

        Raises:
            UsageError: An architecture that is not common; no column can be run.
        """
        started = time.perf_counter()
        result = found or Found([planned.name for planned in self.columns.planned])
        names = self._names(only, result)
        result.expected = len(names) * (len(self.columns.planned) - len(result.unavailable))
        pool = ThreadPoolExecutor(max_workers=self.jobs, thread_name_prefix="architecture")
        try:
            waiting = [pool.submit(self._architecture, name, result) for name in names]
            for future in as_completed(waiting):
                future.result()
        finally:
            result.seconds += time.perf_counter() - started
            pool.shutdown(wait=False, cancel_futures=True)
        return result

    def listed(self, only: tuple[str, ...] = ()) -> Iterator[tuple[str, Architecture]]:
        """The common architectures with their configurations; nothing is asked."""
        for name in self._names(only, Found([])):
            yield name, self._store().architecture(name)

    def _names(self, only: tuple[str, ...], result: Found) -> list[str]:
        """The architectures that are common to transformers and some column that can be run."""
        registry = self._store().registry
        result.transformers = str(registry["version"])
        sources = []
        for planned in self.columns.planned:
            column = self.column(planned)
            if isinstance(column, Column):
                sources.append(column.sources)
            else:
                result.unavailable[planned.name] = column
        if not sources:
            raise UsageError(f"no column can be run: {next(iter(result.unavailable.values()))}")
        names, result.skipped = common(registry, sources)
        return _only(names, result.skipped, only)

    def stop(self) -> None:
        """Nothing that is under way is kept from now on."""
        self.stopped.set()
        self.close()

    def close(self) -> None:
        """Ends the processes that make models."""
        for maker in self._makers:
            maker.close()
        for column in self._live.values():
            if isinstance(column, str):
                continue
            if self.stopped.is_set():
                column.engine.stop()
            elif isinstance(column.engine, VersionEngine):  # the other belongs to who made it
                column.engine.close()

    def column(self, planned: Planned) -> Column | str:
        """A column that can be asked, or why it cannot."""
        with self._lock:
            if planned.name not in self._live:
                try:
                    self._live[planned.name] = planned.make()
                except UnavailableVersion as error:
                    self._live[planned.name] = str(error)
            return self._live[planned.name]

    def cell(self, architecture: Architecture, column: Column) -> Cell:
        """The answers of one cell, run or kept from before."""
        file = self._file(architecture, column)
        if file.is_file():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                cell = read(json.loads(file.read_text("utf-8")))
                self.progress(cell, True)
                return cell
        whole = True
        try:
            cell = Examiner(architecture, column, self._store(), self.wanted, self.chosen).examine()
        except Exception as error:  # one broken cell must not end the sweep
            reason, whole = f"{type(error).__name__}: {error}", False
            broken = Cause(
                "tool",
                "",
                f"the search itself failed: {reason}",
                proofs=[traceback.format_exc()[-1500:]],
            )
            cell = Cell(
                architecture.name,
                column.name,
                [Answer("loads", "", "error", reason, causes=[broken])],
            )
        if not self.stopped.is_set():
            if whole:  # else it is asked again next time
                write_atomically(file, json.dumps(cell.to_json(), indent=1).encode())
            self.progress(cell, False)
        return cell

    def _architecture(self, name: str, result: Found) -> None:
        architecture = self._store().architecture(name)
        result.architectures[name] = architecture
        if architecture.why_not:
            return
        for planned in reversed(self.columns.planned):  # the newest first
            column = self.column(planned)
            if self.stopped.is_set():
                return
            if isinstance(column, Column):
                cell = self.cell(architecture, column)
                if not self.stopped.is_set():
                    result.cells[name, planned.name] = cell

    def _store(self) -> Store:
        if not hasattr(self._local, "store"):
            number = len(self._makers)
            maker = Maker(self.cache / "logs" / f"maker-{number}.log")
            self._makers.append(maker)
            if self.stopped.is_set():  # whoever stopped it has not seen this one
                maker.close()
            self._local.store = Store(self.cache, maker)
        store: Store = self._local.store
        return store

    def _file(self, architecture: Architecture, column: Column) -> Path:
        configs = json.dumps([c.config for c in architecture.found.made], sort_keys=True)
        key = digest(self._code, key_of(column), configs, *self.wanted, *self.chosen)
        return self.cache / "sweep" / "cells" / f"{architecture.name}-{column.name}-{key}.json"


def _only(names: list[str], aside: dict[str, str], only: tuple[str, ...]) -> list[str]:
    if not only:
        return names
    for name in only:
        if name in aside:
            raise UsageError(f"--only {name}: {aside[name]}")
        if name not in names:
            raise UsageError(
                f"--only {name}: no architecture that transformers and mlx-lm both have: "
                f"{closest(name, names)}there are {len(names)}, see parity sweep --list"
            )
    return [name for name in names if name in only]


def _code() -> str:
    """Hash of the code that answers depend on."""
    here = Path(parity.__file__).resolve().parent
    files = [
        file for file in sorted(here.rglob("*.py")) if file.relative_to(here).parts[0] not in ASIDE
    ]
    return digest(*(sha256(file.read_bytes()).hexdigest() for file in files))
