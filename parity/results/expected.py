"""Known divergences: marked, listed with their reason, and red once they are gone.

A file `<subject>-vs-<reference>.toml` holds entries for that pair; a file of another name is for
every pair. A record that diverges is *expected* when entries cover all its diverging metrics.
"""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, NamedTuple, Protocol

from packaging.specifiers import SpecifierSet
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    ValidationError,
    model_validator,
)

from parity import resources
from parity.errors import UsageError
from parity.files import write_atomically
from parity.record import Record, Side, Verdict
from parity.stages import find

FOLDER = "expected"  # of the fixtures, and of a run, which keeps the files it ran with


def _number(value: object) -> int:
    try:
        return find(str(value)).number
    except UsageError as error:
        raise ValueError(str(error)) from None


def _specifier(value: str) -> str:
    SpecifierSet(value)  # raises a ValueError that names it
    return value


class Entry(BaseModel, frozen=True, extra="forbid", strict=True):
    """One known divergence.

    `probe` is a number or a name, `metric` may hold `*` and `?`, `versions` maps a distribution
    to a PEP 440 specifier. `at_most` bounds a metric's value in floors, or the value itself where a
    metric has no floor: what is further off is another divergence. `deterministic` says that it shows
    in every cell; where it does not, `seeds` are those in which it was seen. A cell in which it should
    show and does not is stale.
    """

    probe: Annotated[int, BeforeValidator(_number)]
    model: str | None = None
    metric: str = "*"
    versions: dict[str, Annotated[str, AfterValidator(_specifier)]] = {}
    reason: Annotated[str, Field(min_length=1)]
    link: str = ""
    at_most: Annotated[float, Field(gt=0, strict=False)]
    deterministic: bool
    seeds: Annotated[tuple[int, ...], Field(strict=False)] = ()

    @model_validator(mode="after")
    def _can_go_stale(self) -> Entry:
        if not self.deterministic and not self.seeds:
            raise ValueError("an entry that is not deterministic needs the seeds it was seen with")
        return self

    def covers(self, metric: Measured) -> bool:
        """Whether it speaks of a metric and of a divergence of that size."""
        size = metric.value / metric.floor if metric.floor > 0 else metric.value
        return fnmatchcase(metric.name, self.metric) and size <= self.at_most

    def shows(self, seed: int) -> bool:
        """Whether it must show in a cell of that seed."""
        return self.deterministic or seed in self.seeds


class _File(BaseModel, extra="forbid"):
    entry: list[Entry]


class Where(NamedTuple):
    """What an entry is looked up by: a row of the grid, and what its sides ran with."""

    subject: str
    reference: str
    model: str
    probe: int
    of_subject: Mapping[str, str]
    """Versions of the subject's distributions."""
    of_reference: Mapping[str, str]

    @classmethod
    def of(cls, record: Record) -> Where:
        """Where a record stands."""
        sides = (record.subject, record.reference)
        subject, reference = map(versions_of, sides)
        names = record.subject.path, record.reference.path
        return cls(*names, record.model, record.probe, subject, reference)


def versions_of(side: Side) -> dict[str, str]:
    """The versions that a side's environment names."""
    found = side.environment.get("versions")
    known = found.items() if isinstance(found, dict) else ()
    return {name: v for name, v in known if isinstance(v, str) and v}


class KnownDivergence(NamedTuple):
    """An entry, its file, and its number in that file, from 1."""

    file: Path
    number: int
    entry: Entry

    @property
    def explanation(self) -> str:
        """Reason and link."""
        return self.entry.reason + f" ({self.entry.link})" * bool(self.entry.link)

    def of_pair(self, where: Where) -> bool:
        """Whether the file is about the pair."""
        pair = file_name(where.subject, where.reference)
        return "-vs-" not in self.file.name or self.file.name == pair

    def applies(self, where: Where) -> bool:
        """Whether the entry is for this row of the grid and these versions, whatever the verdict."""
        ran = {**where.of_reference, **where.of_subject}
        same = self.entry.probe == where.probe and self.entry.model in (None, where.model)
        wanted = self.entry.versions.items()
        fits = (p in ran and SpecifierSet(v).contains(ran[p], prereleases=True) for p, v in wanted)
        return same and self.of_pair(where) and all(fits)


def file_name(subject: str, reference: str) -> str:
    """Name of the file of a pair."""
    return f"{subject}-vs-{reference}.toml".replace("/", "_").replace(":", "_")


def load(file: Path) -> list[KnownDivergence]:
    """The entries of one file; a UsageError names the file, entry and value that is wrong."""
    try:
        entries = _File.model_validate(tomllib.loads(file.read_text(encoding="utf-8"))).entry
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ": ".join(str(p + 1) if isinstance(p, int) else str(p) for p in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise UsageError(
            f"{file}: {where.replace('entry: ', 'entry ')}: {message}, got {first['input']!r}"
        ) from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{file}: no expected divergences: {error}") from None
    return [KnownDivergence(file, number, entry) for number, entry in enumerate(entries, 1)]


def chosen(
    subject: str, references: Iterable[str], file: Path | None, none: bool
) -> list[KnownDivergence]:
    """The entries of `file`, or those of the fixtures for these pairs."""
    if file and none:
        raise UsageError(f"--expected {file} and --no-expected: give one of them")
    shipped = [resources.fixtures() / FOLDER / file_name(subject, name) for name in references]
    files = [file] if file else [] if none else [file for file in shipped if file.is_file()]
    return [known for file in files for known in load(file)]


def keep(known: Iterable[KnownDivergence], folder: Path) -> None:
    """Copies the files into the folder of a run, so that its report can be made again anywhere."""
    for file in {k.file for k in known}:
        write_atomically(folder / FOLDER / file.name, file.read_bytes())


def mark(record: Record, known: Sequence[KnownDivergence]) -> Record:
    """The record with `expected` set: why it diverges, that it no longer does, or nothing.

    What the record had there before is not used.
    """
    where = Where.of(record)
    applying = [entry for entry in known if entry.applies(where)]
    found = matching(applying, record.verdict, record.seed, record.metrics)
    return record.model_copy(update={"expected": explained(found, record.verdict.green)})


def explained(matched: Iterable[KnownDivergence], green: bool) -> str:
    """Why a cell diverges, or that it no longer does; empty without an entry."""
    gone = "no longer diverges: remove entry {0.number} from {0.file}: {0.explanation}"
    text = (gone if green else "{0.explanation}").format
    return "; ".join(dict.fromkeys(map(text, matched)))


class Measured(Protocol):
    """What an entry is held against in a metric."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def verdict(self) -> Verdict: ...  # noqa: D102
    @property
    def value(self) -> float: ...  # noqa: D102
    @property
    def floor(self) -> float: ...  # noqa: D102
    @property
    def gate(self) -> bool: ...  # noqa: D102


def matching(
    applying: Sequence[KnownDivergence], verdict: Verdict, seed: int, metrics: Iterable[Measured]
) -> list[KnownDivergence]:
    """Stale entries of what is green; of what diverges the entries that together cover it.

    Args:
        applying: Entries that apply where the record stands.
        verdict: The record's.
        seed: The record's.
        metrics: The record's.
    """
    if verdict.green:
        return [k for k in applying if k.entry.shows(seed)]
    bad = [m for m in metrics if m.gate and not m.verdict.green]
    # What was inconclusive beside a known divergence is not known.
    if {verdict, *(m.verdict for m in bad)} != {Verdict.DIVERGE}:
        return []
    # Names that do not match leave no metrics: then only an entry for every metric covers it.
    if not bad:
        return [k for k in applying if fnmatchcase("", k.entry.metric)]
    found = [[k for k in applying if k.entry.covers(metric)] for metric in bad]
    return [k for k in applying if any(k in group for group in found)] if all(found) else []


def unmatched(
    ran: Collection[Where], used: Collection[KnownDivergence], known: Sequence[KnownDivergence]
) -> list[str]:
    """Entries that explain no record, without those of probes and known models that were not run.

    Args:
        ran: Where there are records.
        used: Entries that explain one.
        known: All entries.
    """
    probes = {where.probe for where in ran}
    models = {*resources.names("models"), *resources.EXTRA_MODELS} - {w.model for w in ran}
    text = (
        "{0.file}: entry {0.number} (probe {0.entry.probe:02d}, {0.entry.metric}) matched no record"
    )

    def not_run(k: KnownDivergence) -> bool:
        elsewhere = k.entry.probe not in probes or k.entry.model in models
        return elsewhere and any(map(k.of_pair, ran))

    return [text.format(k) for k in known if k not in used and not not_run(k)]
