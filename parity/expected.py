"""Divergences that are known: marked, listed with their reason, and red once they are gone.

A file `<subject>-vs-<reference>.toml` holds entries for that pair; a file of another name speaks of
every pair. A record that diverges is *expected* when entries cover all its diverging metrics.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, NamedTuple

from packaging.specifiers import SpecifierSet
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from parity import resources
from parity.errors import UsageError
from parity.record import Record, Verdict
from parity.stages import find

FOLDER = "expected"
"""Below the fixtures, and below the folder of a run, which keeps the files it ran with."""


class Entry(BaseModel):
    """One known divergence."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    probe: int
    """Number; a file may give the name."""
    model: str | None = None
    metric: str = "*"
    """Name of the metrics covered, with `*` and `?`."""
    versions: dict[str, str] = Field(default_factory=dict)
    """Distribution to PEP 440 specifier."""
    reason: Annotated[str, Field(min_length=1)]
    link: str = ""
    deterministic: bool
    """Whether it shows in every cell, so that a green one means that it is gone."""

    @field_validator("probe", mode="before")
    @classmethod
    def _number(cls, value: object) -> int:
        try:
            return find(str(value)).number
        except UsageError as error:
            raise ValueError(str(error)) from None

    @field_validator("versions")
    @classmethod
    def _specifiers(cls, value: dict[str, str]) -> dict[str, str]:
        for specifier in value.values():
            SpecifierSet(specifier)  # raises a ValueError that names it
        return value


class Known(NamedTuple):
    """An entry and where it stands."""

    file: Path
    number: int
    entry: Entry

    @property
    def said(self) -> str:
        """Reason and link."""
        return self.entry.reason + (f" ({self.entry.link})" if self.entry.link else "")

    def of_pair(self, record: Record) -> bool:
        """Whether the file is about the record's pair."""
        pair = file_name(record.subject.path, record.reference.path)
        return "-vs-" not in self.file.name or self.file.name == pair

    def applies(self, record: Record) -> bool:
        """Whether the entry speaks of this cell in these versions, whatever its verdict."""
        sides = (record.reference, record.subject)
        ran = {k: v for side in sides for k, v in side.environment.get("versions", {}).items() if v}
        return (
            self.entry.probe == record.probe
            and self.entry.model in (None, record.model)
            and self.of_pair(record)
            and all(
                package in ran and SpecifierSet(wanted).contains(ran[package], prereleases=True)
                for package, wanted in self.entry.versions.items()
            )
        )


def file_name(subject: str, reference: str) -> str:
    """Name of the file of a pair."""
    return f"{subject}-vs-{reference}.toml".replace("/", "_").replace(":", "_")


def load(file: Path) -> list[Known]:
    """The entries of one file.

    Raises:
        UsageError: It cannot be read; or names file, entry and value that are wrong.
    """
    try:
        data = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{file}: no expected divergences: {error}") from None
    entries = data.get("entry")
    if not isinstance(entries, list) or len(data) > 1:
        raise UsageError(f"{file}: give tables [[entry]] and nothing else, got {', '.join(data)}")
    number = 0
    try:
        return [Known(file, number, Entry.model_validate(v)) for number, v in enumerate(entries, 1)]
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        at = 1 + entries.index(first["input"]) if first["type"] == "missing" else None
        raise UsageError(f"{file}: {where}: {first['msg']}, got {first['input']!r} {at}") from None


def of_pairs(subject: str, references: Iterable[str]) -> list[Known]:
    """What the fixtures know of these pairs."""
    files = [resources.fixtures() / FOLDER / file_name(subject, name) for name in references]
    return [known for file in files if file.is_file() for known in load(file)]


def of_run(folder: Path) -> list[Known]:
    """What a run, or the shards below a folder, were told to expect."""
    files = {file.name: file for file in sorted(folder.rglob(f"{FOLDER}/*.toml"))}
    return [known for file in files.values() for known in load(file)]


def keep(known: Iterable[Known], folder: Path) -> None:
    """Copies the files into the folder of a run, so that its report can be made again anywhere."""
    for file in {k.file for k in known}:
        (folder / FOLDER).mkdir(parents=True, exist_ok=True)
        (folder / FOLDER / file.name).write_bytes(file.read_bytes())


def mark(record: Record, known: Sequence[Known]) -> Record:
    """The record with `expected` filled: why it diverges, or that it no longer does."""
    said = [k.said for k in _covering(record, known)]
    if record.verdict.green:
        stale = [k for k in known if k.entry.deterministic and k.applies(record)]
        said = [
            f"no longer diverges: remove entry {k.number} from {k.file}: {k.said}" for k in stale
        ]
    return (
        record.model_copy(update={"expected": "; ".join(dict.fromkeys(said))}) if said else record
    )


def _covering(record: Record, known: Sequence[Known]) -> list[Known]:
    """The entries that together explain a divergence; none where one metric is left over."""
    if record.verdict is not Verdict.DIVERGE:
        return []
    bad = [m for m in record.metrics if m.gate and not m.verdict.green]
    # Names that do not match leave no metrics: then only an entry for every metric covers it.
    names = [m.name for m in bad] or [""]
    applying = [k for k in known if k.applies(record)]
    found = [[k for k in applying if fnmatchcase(name, k.entry.metric)] for name in names]
    # What was inconclusive beside a known divergence is not known.
    if not all(found) or any(m.verdict is not Verdict.DIVERGE for m in bad):
        return []
    return [k for k in applying if any(k in group for group in found)]


def unmatched(records: Sequence[Record], known: Sequence[Known]) -> list[str]:
    """Entries that explain no record, but for those of probes and known models that were not run."""
    models = {*resources.names("models"), *resources.EXTRA_MODELS} - {r.model for r in records}
    used = [k for r in records for k in _covering(r, known)]
    used += [k for r in records if r.verdict.green for k in known
             if k.entry.deterministic and k.applies(r)]  # fmt: skip
    pairs = [k for k in known if any(k.of_pair(r) for r in records)]
    probes = {r.probe for r in records}
    return [
        f"{k.file}: entry {k.number} (probe {k.entry.probe:02d}, {k.entry.metric}) matched no record"
        for k in known
        if k not in used
        and not (k in pairs and (k.entry.probe not in probes or k.entry.model in models))
    ]
