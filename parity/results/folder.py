"""Folders of runs: records, plan and known divergences of one or many, with what is damaged in them."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import pyarrow as pa
from pydantic import BaseModel, ValidationError

from parity.cells import plan as plans
from parity.cells.plan import Plan
from parity.errors import UsageError
from parity.files import file_digest
from parity.record import SCHEMA as RECORD_SCHEMA
from parity.record import DamagedRecord, Record, load
from parity.results import expected, store
from parity.results.aggregate import Aggregate, aggregate
from parity.results.expected import KnownDivergence
from parity.results.store import Store

STORE = "records.parquet"
MANIFEST = "merged.json"
SCHEMA: Final = 1
AT_ONCE = 2048
"""Records that are turned into columns together."""


class Manifest(BaseModel, extra="forbid"):
    """What lies beside a store: its digest, and what was found when it was made."""

    schema_version: Literal[1] = SCHEMA
    record_schema: int = RECORD_SCHEMA
    records: int
    sha256: str
    damaged: list[str]
    problems: list[str]


@dataclass
class Run:
    """One run, from any number of folders; the same whatever their order.

    Attributes:
        plan: The cells that were to be filled; None where no folder has a plan.
        known: Known divergences.
        files: Their files: name to content.
        damaged: Files that were set aside, by their path below what the folders have in common.
        problems: Reasons to doubt a number.
    """

    plan: Plan | None = None
    known: list[KnownDivergence] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    damaged: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def aggregate(self, records: Store) -> Aggregate:
        """Its records put together."""
        return aggregate(records, self.plan, self.known, sorted(self.damaged), self.problems)


class Folders:
    """Reads the files below some folders, each once.

    Raises:
        UsageError: There is no record below them, whole or damaged, and no plan.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        found = sorted({folder.resolve() for folder in folders})
        self._base = Path(os.path.commonpath(found)) if found else Path()
        self.run = Run()
        self.json = self._files(found, "records/*.json")
        self._stores = self._files(found, STORE)
        self._read_plans(self._files(found, plans.NAME))
        self._read_known(self._files(found, f"{expected.FOLDER}/*.toml"))
        self.stores = [file for file in self._stores if self._whole(file)]
        for file in self._files(found, MANIFEST):
            if not file.with_name(STORE).exists():
                self._aside(file, f"{STORE} is not beside it")
        if not (self.json or self._stores or self.run.plan or self.run.damaged):
            names = ", ".join(map(str, folders))
            raise UsageError(f"{names}: no records: run `parity run --out {folders[0]}` first")
        runs = {file.parent.parent for file in self.json} | {file.parent for file in self._stores}
        for file in sorted(folder / plans.NAME for folder in runs):
            if not file.exists():
                self.run.problems.append(
                    f"{self._name(file)}: there is none: cells that never came are not known"
                )

    @staticmethod
    def _files(folders: Iterable[Path], pattern: str) -> list[Path]:
        return sorted({file for folder in folders for file in folder.rglob(pattern)})

    def _name(self, file: Path) -> str:
        return file.relative_to(self._base).as_posix()

    def _aside(self, file: Path, reason: str) -> None:
        self.run.damaged.append(f"{self._name(file)}: {reason}")

    def _read_plans(self, files: Sequence[Path]) -> None:
        found = []
        for file in files:
            try:
                found.append(plans.load_plan(file))
            except (OSError, ValueError) as error:
                self._aside(file, f"not a plan: {_line(error)}")
        self.run.plan = Plan.union(found) if found else None

    def _read_known(self, files: Sequence[Path]) -> None:
        """The known divergences; those of files of one name with several contents are not used."""
        contents: dict[str, set[bytes]] = {}
        for file in files:
            try:
                # By name alone: the entry is to be corrected in the original file, not in the copy.
                known = [k._replace(file=Path(file.name)) for k in expected.load(file)]
                contents.setdefault(file.name, set()).add(file.read_bytes())
            except (OSError, UsageError) as error:
                self._aside(file, f"no known divergences: {_line(error)}")
                continue
            if len(contents[file.name]) == 1 and file.name not in self.run.files:
                self.run.files[file.name] = file.read_bytes()
                self.run.known += known
        for name in [name for name, of in contents.items() if len(of) > 1]:
            del self.run.files[name]
            self.run.known = [k for k in self.run.known if k.file.name != name]
            self.run.problems.append(
                f"{expected.FOLDER}/{name} has {len(contents[name])} contents: none is used"
            )

    def _whole(self, file: Path) -> bool:
        """Whether a store is as its manifest has it; takes over what the manifest says.

        Raises:
            UsageError: It was written by a newer version of this tool.
        """
        beside = file.with_name(MANIFEST)
        try:
            manifest = read_manifest(beside)
            if file_digest(file) != manifest.sha256:
                raise ValueError(f"it is not as {MANIFEST} has it: its digest is another")
        except (OSError, ValueError) as error:
            self._aside(file, f"not a store of records: {_line(error)}")
            return False
        start = self._name(file.parent)
        start = "" if start == "." else f"{start}/"
        self.run.damaged += [start + line for line in manifest.damaged]
        self.run.problems += [start + line for line in manifest.problems]
        return True

    def tables(self) -> Iterator[pa.Table]:
        """All records as columns; those that are damaged are set aside meanwhile.

        Raises:
            UsageError: One was written by a newer version of this tool.
        """
        for start in range(0, len(self.json), AT_ONCE):
            yield self._table(self.json[start : start + AT_ONCE])
        for file in self.stores:
            yield from store.whole(file, read_manifest(file.with_name(MANIFEST)).record_schema)

    def _table(self, files: Iterable[Path]) -> pa.Table:
        # Looking for circles among so many new objects, of which none is in one, takes three times as
        # long as making them.
        collecting = gc.isenabled()
        gc.disable()
        try:
            records = []
            for file in files:
                try:
                    records.append(load(file))
                except DamagedRecord as error:
                    self._aside(file, error.reason)
            return store.table_of(records)
        finally:
            if collecting:
                gc.enable()


def _line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def read_manifest(file: Path) -> Manifest:
    """Reads the manifest of a store.

    Raises:
        ValueError: It is none.
        UsageError: It, or the records of its store, were written by a newer version of this tool.
    """
    from pydantic_core import from_json

    data: Any = from_json(file.read_bytes())
    for name, newest in (("schema_version", SCHEMA), ("record_schema", RECORD_SCHEMA)):
        version = data.get(name) if isinstance(data, dict) else None
        if isinstance(version, int) and version > newest:
            raise UsageError(
                f"{file}: {name} {version} is newer than this tool's {newest}: upgrade mlx-parity"
            )
    return Manifest.model_validate(data)


def read(folders: Sequence[Path]) -> tuple[Run, Store]:
    """The run of some folders with its records; those of a single store stay on disk.

    Raises:
        UsageError: There are none, or they were written by a newer version of this tool.
    """
    found = Folders(folders)
    if len(found.stores) == 1 and not found.json:
        manifest = read_manifest(found.stores[0].with_name(MANIFEST))
        if manifest.record_schema == RECORD_SCHEMA:
            return found.run, Store(found.stores[0])
    table, copies = store.without_copies(
        store.in_order(pa.concat_tables([store.table_of([]), *found.tables()]))
    )
    found.run.problems += copies_text(copies)
    return found.run, Store(table)


def copies_text(copies: int) -> list[str]:
    """What is said of records that were found more than once."""
    again = f"{copies:,} record{'s' * (copies > 1)} found again with the same content"
    return [f"{again}: each counts once"] if copies else []


def records_of(folder: Path) -> tuple[list[Record], list[str]]:
    """Every record below a folder, and what was set aside."""
    run, found = read([folder])
    return found.records(range(found.size)), run.damaged
