"""The columns of a sweep: what is installed, releases of a package, or commits of a checkout."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from parity.bisect.versions import VersionEngine
from parity.capture import keys
from parity.capture.engine import Engine
from parity.capture.environments import (
    Interpreter,
    Range,
    UnavailableVersion,
    commits,
    digest,
    environment,
    releases,
    snapshot,
)
from parity.errors import UsageError
from parity.paths.registry import registered, resolve
from parity.sweep.bench import Column
from parity.sweep.sources import Sources, of_python

PACKAGE = "mlx-lm"


@dataclass(frozen=True)
class Planned:
    """A column before anything is installed for it."""

    name: str
    option: str
    make: Callable[[], Column]


@dataclass(frozen=True)
class Columns:
    """The columns of a table, and all that lies between them."""

    planned: list[Planned]
    between: Mapping[str, list[str]] = field(default_factory=dict)
    """Name of a column → those that lie between the one before it and it."""
    any: Callable[[str], Planned] | None = None
    """A column by its name, of those between."""


def installed(engine: Engine, subject: str) -> Columns:
    """One column: what this interpreter has, and the path that runs it."""
    from importlib.metadata import version

    def make() -> Column:
        return Column(name, subject, engine, of_python(sys.executable), _subject_option(subject))

    name = version(PACKAGE)
    return Columns([Planned(name, _subject_option(subject), make)])


def _subject_option(subject: str) -> str:
    return "" if subject == "mlx" else f"--subject {subject}"


def of_package(engine: Engine, subject: str, span: Range, count: int) -> Columns:
    """Releases of mlx-lm from low to high, `count` of them, both ends among them.

    Raises:
        UsageError: Another package; fewer than two releases.
    """
    if span.package != PACKAGE:
        raise UsageError(f"--package {span.package}: a sweep runs releases of {PACKAGE}")
    return _chosen(releases(span), count, lambda version: _release(engine, subject, version))


def one_release(engine: Engine, subject: str, version: str) -> Columns:
    """A single release, as a line that reproduces a cell names it."""
    return of_package_exactly(engine, subject, [version])


def of_package_exactly(engine: Engine, subject: str, versions: list[str]) -> Columns:
    """These releases and no others."""
    return Columns([_release(engine, subject, version) for version in versions])


def _release(engine: Engine, subject: str, version: str) -> Planned:
    option = f"--package {PACKAGE}=={version}"

    def make() -> Column:
        kind = resolve(subject)
        extra = sorted(set(kind.packages) - {"torch", PACKAGE})
        place = environment(PACKAGE, version, engine.cache, extra, False, kind.without_dependencies)
        return _elsewhere(engine, subject, version, place, of_python(place.python), option)

    return Planned(version, option, make)


def of_repo(engine: Engine, subject: str, repo: Path, good: str, bad: str, count: int) -> Columns:
    """Commits of a checkout of mlx-lm, `count` of them, both ends among them.

    Raises:
        UsageError: No repository, no such commits, or no mlx-lm in it.
    """
    named = commits(repo, good, bad)

    def planned(commit: str) -> Planned:
        option = f"--repo {repo} --good {commit} --bad {commit}"

        def make() -> Column:
            place = snapshot(repo, commit, engine.cache)
            files = engine.cache.resolve() / "snapshots" / commit / "files"
            folder = next(
                (f for f in (files / "src" / "mlx_lm", files / "mlx_lm") if f.is_dir()), None
            )
            if folder is None:
                raise UsageError(f"{repo}: commit {commit[:12]} has no folder mlx_lm")
            return _elsewhere(engine, subject, commit[:12], place, Sources(folder), option)

        return Planned(commit[:12], option, make)

    return _chosen(named, count, planned)


def _elsewhere(
    engine: Engine, subject: str, name: str, place: Interpreter, sources: Sources, option: str
) -> Column:
    spec = registered().get(subject, subject)
    inner = VersionEngine(engine, {spec: place})
    return Column(name, spec, inner, sources, option)


def _chosen(named: list[str], count: int, planned: Callable[[str], Planned]) -> Columns:
    """So many of them, evenly spaced, both ends among them."""
    steps = max(1, min(count, len(named)) - 1)
    picked = sorted({round(i * (len(named) - 1) / steps) for i in range(steps + 1)})
    between: dict[str, list[str]] = {}
    for low, high in itertools.pairwise(picked):
        between[planned(named[high]).name] = named[low + 1 : high]
    return Columns([planned(named[i]) for i in picked], between, planned)


def key_of(column: Column) -> str:
    """Content key of what a column runs: its interpreter's packages and the text of mlx-lm."""
    files = sorted(column.sources.folder.rglob("*.py"))
    text = digest(*(sha256(file.read_bytes()).hexdigest() for file in files))
    paths = [keys.of_path(spec) for spec in (column.spec, "hf")]
    place = getattr(column.engine, "places", {})
    return digest(text, *paths, *(p.key for p in place.values()))


__all__ = ["UnavailableVersion"]
