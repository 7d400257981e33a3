"""Which release, or which commit, of a package changed a verdict.

One cell is run over and over, one side of it (or both) in an interpreter with another version.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

import parity
from parity import content
from parity.bisect.search import Answer, Found, Ledger, Outcome, Progress, SameEnds, search
from parity.cell import Cell
from parity.engine import Engine
from parity.errors import UsageError
from parity.paths.base import registered, resolve
from parity.recipe import Recipe
from parity.record import Verdict
from parity.trace import Trace, write_atomically
from parity.worker import Worker

WORKER = ("numpy", "pydantic", "safetensors", "filelock", "platformdirs", "packaging", "pyyaml")
SIDES = {"subject": ("subject",), "reference": ("reference",), "both": ("subject", "reference")}
PATIENCE = 900  # seconds an installation may take
# The folder a command is run in comes last: a checkout there must not hide the release.
_PTH = (
    'import os, sys; sys.path += [os.getcwd(), *filter(None, os.environ["PARITY_PATH"].split(":"))]'
)
_IMPORT = """
import importlib, importlib.metadata, re, sys
found = importlib.metadata.packages_distributions().items()
names = [m for m, d in found if sys.argv[1] in [re.sub("[-_.]+", "-", n).lower() for n in d]]
own = sys.argv[1].replace("-", "_")
for name in [own] if own in names else names: importlib.import_module(name)
"""


class Range(NamedTuple):
    """A package and two releases between which something changed."""

    package: str
    low: str
    high: str


class Place(NamedTuple):
    """An interpreter, the key of what it has, and that by name and version."""

    python: str
    key: str
    versions: dict[str, str]


class Gap(Exception):
    """A version that cannot be installed, imported or checked out."""


@dataclass(frozen=True)
class Change:
    """Where a verdict changed.

    Attributes:
        package: Package or checkout that was searched.
        side: Who ran it: subject, reference or both.
        found: Last version with the verdict of the low end, first with that of the high end.
        verdicts: "verdict: reason" of these two.
        also: Other packages that the resolver changed between these two: suspects as well.
        moved: For both sides: those that change the verdict when they alone have the new version.
        runs: Cells that were run; those known from an earlier search do not count.
    """

    package: str
    side: str
    found: Found
    verdicts: tuple[str, str] = ("", "")
    also: tuple[str, ...] = ()
    moved: tuple[str, ...] = ()
    runs: int = 0
    seconds: float = 0.0

    def sentence(self) -> str:
        """The result in words."""
        if self.found.inconclusive:
            return f"{self.package}: inconclusive: {self.found.inconclusive}"
        who = " and ".join(self.moved) or "both together" if self.side == "both" else self.side
        when = self.found.first_bad
        if self.found.hidden:
            when += f" or before, after {self.found.last_good}"
            when += f" ({', '.join(self.found.hidden)} cannot be run)"
        also = f"; changed with it: {', '.join(self.also)}" if self.also else ""
        return f"the {who} moved with {self.package} {when}: {' → '.join(self.verdicts)}{also}"


def parse_range(text: str) -> Range:
    """Reads `mlx-lm==0.30.0..0.32.2`.

    Raises:
        UsageError: Not of that form, no versions, or the wrong way round.
    """
    match = re.fullmatch(r"\s*([A-Za-z0-9][\w.-]*?)\s*==\s*(\S+?)\.\.(\S+?)\s*", text)
    if not match:
        raise UsageError(f"cannot read {text!r}: write PACKAGE==LOW..HIGH, as mlx-lm==0.30..0.32.2")
    try:
        low, high = Version(match[2]), Version(match[3])
    except InvalidVersion as error:
        raise UsageError(f"{text!r}: {error}") from None
    if low >= high:
        raise UsageError(f"{text!r}: {low} must be lower than {high}")
    return Range(canonicalize_name(match[1]), str(low), str(high))


def releases(span: Range) -> list[str]:
    """Releases on the index from low to high that fit this platform and Python, in order.

    Final releases only, unless an end is a pre-release.

    Raises:
        UsageError: Fewer than two.
    """
    low, high = Version(span.low), Version(span.high)
    early = low.is_prerelease or high.is_prerelease
    has_pip = importlib.util.find_spec("pip")
    pip = [sys.executable, "-m", "pip"] if has_pip else [_uv(), "tool", "run", "pip"]
    try:
        out = _run(*pip, "index", "versions", span.package, *(["--pre"] if early else []))
    except Gap as error:
        raise UsageError(f"no releases of {span.package!r}: {error}") from None
    line = re.search(r"^Available versions: (.*)$", out, re.MULTILINE)
    every = sorted(Version(text) for text in line[1].split(", ")) if line else []
    inside = [str(v) for v in every if low <= v <= high and (early or not v.is_prerelease)]
    if len(inside) < 2:
        known = f"has {every[0]} to {every[-1]}" if every else "has none"
        raise UsageError(
            f"{span.package}: {len(inside)} releases in {span.low}..{span.high}, a search needs two "
            f"(the index {known})"
        )
    return inside


def environment(
    package: str, version: str, cache: Path, extra: Iterable[str] = (), inherit: bool = False
) -> Place:
    """An interpreter with one release of a package, made once with uv below `environments/`.

    Args:
        extra: Further requirements; the resolver chooses whatever is not pinned.
        inherit: Take what it lacks from this interpreter. torch comes from there or not at all.

    Raises:
        Gap: It cannot be installed or imported; the message is the end of what was printed.
    """
    here = Path(parity.__file__).resolve().parent
    wanted = [*map(_requirement, (f"{package}=={version}", *extra)), *WORKER]
    key = _digest(*wanted, sys.version, sys.prefix, here, inherit, _PTH)
    folder = cache.resolve() / "environments" / f"{package}-{version}-{key}"
    python, complete = str(folder / "bin" / "python"), folder / "complete"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not complete.exists():
            shutil.rmtree(folder, ignore_errors=True)
            _run(_uv(), "venv", "--quiet", "--python", sys.executable, folder)
            never = folder / "override.txt"
            never.write_text("torch; sys_platform == 'never'\n", encoding="utf-8")
            _run(_uv(), "pip", "install", "--python", python, "--override", never, *wanted)
            # This package alone, without its dependencies, be it a checkout or an installed wheel.
            (folder / "package").mkdir()
            (folder / "package" / "parity").symlink_to(here, target_is_directory=True)
            own = [p for p in sys.path if p.endswith("-packages")] if inherit else []
            [site] = folder.glob("lib/python*/site-packages")
            lines = "\n".join([str(folder / "package"), *own, _PTH, ""])
            (site / "parity.pth").write_text(lines, encoding="utf-8")
            launcher = _launcher(folder / "launch", python, "")
            _run(launcher, "-c", _IMPORT, package)
            listed = json.loads(_run(_uv(), "pip", "list", "--format=json", "--python", python))
            versions = {row["name"]: row["version"] for row in listed}
            write_atomically(complete, json.dumps(versions).encode())
        versions = json.loads(complete.read_text(encoding="utf-8"))
    return Place(str(folder / "launch"), folder.name, versions)


def commits(repo: Path, good: str, bad: str) -> list[str]:
    """Commits of the main line from good to bad, both included.

    Raises:
        UsageError: No repository, no such commits, or bad does not come after good.
    """
    git = ("git", "-C", repo)
    try:
        first = _run(*git, "rev-parse", "--verify", f"{good}^{{commit}}").strip()
        _run(*git, "merge-base", "--is-ancestor", first, bad)
        rest = _run(*git, "rev-list", "--first-parent", "--reverse", f"{first}..{bad}").split()
    except Gap as error:
        raise UsageError(f"{repo}: no commits from {good!r} to {bad!r}: {error}") from None
    return [first, *rest]


def snapshot(repo: Path, commit: str, cache: Path) -> Place:
    """This interpreter with the files of a commit first on its path; the checkout stays as it is.

    Raises:
        Gap: The files cannot be written.
    """
    folder = cache.resolve() / "snapshots" / commit
    source, index = folder / "files", folder / "index"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / "complete").exists():
            git, own = ("git", "-C", repo.resolve()), {**os.environ, "GIT_INDEX_FILE": str(index)}
            _run(*git, "read-tree", commit, env=own)
            _run(*git, "checkout-index", "--all", "--force", f"--prefix={source}/", env=own)
            write_atomically(folder / "complete", b"{}")
    found = source / "src" if (source / "src").is_dir() else source
    path = ":".join(map(str, (found, Path.cwd(), Path(parity.__file__).resolve().parent.parent)))
    name = f"launch-{_digest(sys.executable, path)}"
    return Place(str(_launcher(folder / name, sys.executable, path)), f"{commit}-{name}", {})


class Elsewhere(Engine):
    """Runs some paths in other interpreters, with captures of their own; the rest in the base's.

    Repeats (`attempt` > 0) capture everything afresh.
    """

    def __init__(self, base: Engine, places: Mapping[str, Place], attempt: int = 0) -> None:
        self.base, self.places, self.attempt = base, places, attempt
        keys = sorted((spec, place.key) for spec, place in places.items())
        folder = base.cache.resolve() / "elsewhere" / _digest(keys, attempt)
        super().__init__(folder, base.timeout, folder / "logs", base.notice)

    def capture(self, spec: str, method: str, recipe: Recipe, inputs: Trace) -> Trace:
        """See `Engine.capture`."""
        if not (spec in self.places or self.attempt):
            return self.base.capture(spec, method, recipe, inputs)
        return super().capture(spec, method, recipe, inputs)

    def _worker(self, spec: str) -> Worker:
        worker = self._workers.get(spec)
        if worker is None or not worker.alive:
            if worker is not None:
                worker.close()
            log = self.log_dir / f"{spec.replace(':', '_')}-{os.getpid()}.log"
            python = self.places[spec].python if spec in self.places else sys.executable
            # Entry points are not known in another interpreter: the class is named.
            target, framework = registered().get(spec, spec), resolve(spec).framework
            worker = Worker(target, framework, self.base.cache.resolve(), log, python)
            self._workers[spec] = worker
        return worker


@dataclass(frozen=True)
class Bisection:
    """A cell, the side that runs in other interpreters, and what is told on the way.

    Args:
        engine: Runs what stays as it is; its cache also keeps environments and ledgers.
        side: subject, reference or both.
        extra: Requirements of the environments, beside the packages that the paths name.
        ledger: File of finished checks; by default one in the cache, named by its content.
    """

    engine: Engine
    cell: Cell
    side: str = "subject"
    extra: tuple[str, ...] = ()
    ledger: Path | None = None
    progress: Progress | None = None

    def releases(self, *spans: Range) -> list[Change]:
        """Searches each package by itself, the others at the high end of their ranges."""
        kinds = [resolve(getattr(self.cell, side)) for side in SIDES[self.side]]
        needed = sorted({name for kind in kinds for name in kind.packages} - {"torch"})
        inherit = any(kind.framework == "torch" for kind in kinds)
        changes = []
        for span in spans:
            pins = [f"{other.package}=={other.high}" for other in spans if other != span]
            extra = (*[n for n in needed if n != span.package], *pins, *self.extra)
            cache = self.engine.cache

            def place(version: str, span: Range = span, extra: tuple[str, ...] = extra) -> Place:
                return environment(span.package, version, cache, extra, inherit)

            try:
                changes.append(self.search(span.package, releases(span), place, *extra))
            except SameEnds as error:
                if len(spans) == 1:
                    raise
                found = Found(inconclusive=str(error))
                changes.append(Change(span.package, self.side, found))
        return changes

    def commits(self, repo: Path, good: str, bad: str) -> Change:
        """Searches the history of a checkout of a pure Python package."""
        repo = repo.resolve()
        named = commits(repo, good, bad)
        return self.search(repo.name, named, lambda c: snapshot(repo, c, self.engine.cache))

    def search(
        self, package: str, versions: Sequence[str], place: Callable[[str], Place], *about: str
    ) -> Change:
        """Finds where the verdict of the low end gives way to that of the high end.

        Raises:
            SameEnds: Both ends have the same verdict.
            UsageError: Fewer than two versions can be run.
        """
        started, sides = time.perf_counter(), SIDES[self.side]
        # A side that runs elsewhere is named by its class, so that the referee and the other side
        # stay where they are.
        classes = {s: registered().get(getattr(self.cell, s), getattr(self.cell, s)) for s in sides}
        cell = replace(self.cell, **classes)

        def run(places: Mapping[str, Place], attempt: int = 0) -> Answer:
            with Elsewhere(
                self.engine, {classes[s]: p for s, p in places.items()}, attempt
            ) as there:
                record = there.run(cell)
            state = "agree" if record.verdict.green else str(record.verdict)
            if record.verdict is Verdict.ERROR and (
                kind := re.search(r"(\w+) in \w+: ", record.reason)
            ):
                state += f" ({kind[1]})"  # one error is not another
            return Answer(state, record.reason)

        def verdict(version: str, attempt: int) -> Answer:
            try:
                where = place(version)
            except Gap as error:
                return Answer(Outcome.GAP, str(error))
            return run(dict.fromkeys(sides, where), attempt)

        told = cell.stage.name, cell.changes, self.side, about
        key = _digest(package, *told, *map(content.of_path, (cell.subject, cell.reference)),
                      content.of_recipe(cell.recipe), _code())  # fmt: skip
        book = Ledger(self.ledger or self.engine.cache / "bisect" / f"{key}.json", key)
        asked = book.remember(verdict)

        def end(order: Iterable[str]) -> Answer:
            every = (asked(version, 0) for version in order)
            return next((a for a in every if a.outcome != Outcome.GAP), Answer(Outcome.GAP))

        first, last = end(versions), end(reversed(versions))
        if first.outcome == last.outcome != Outcome.GAP:
            raise SameEnds(
                f"{package}: from {versions[0]} to {versions[-1]} nothing changes, both ends: "
                f"{first.outcome}: {first.reason}; widen the range"
            )
        labels = {first.outcome: Outcome.GOOD, last.outcome: Outcome.BAD}

        def check(version: str, attempt: int) -> Answer:
            outcome, reason = asked(version, attempt)
            label = labels.get(outcome, Outcome.GAP)
            return Answer(label, reason if outcome == Outcome.GAP else f"{outcome}: {reason}")

        found = search(versions, check, progress=self.progress)
        change = Change(package, self.side, found, runs=book.computed)
        if not found.inconclusive:
            names = found.last_good, found.first_bad
            old, new = map(place, names)
            moved = [
                s for s in sides if len(sides) > 1
                and run({t: new if t == s else old for t in sides}).outcome == last.outcome
            ]  # fmt: skip
            change = replace(
                change,
                verdicts=tuple(check(name, 0).reason for name in names),
                also=tuple(_differences(old.versions, new.versions, package)),
                moved=tuple(moved),
                runs=book.computed + len(sides) * (len(sides) > 1),
            )
        return replace(change, seconds=time.perf_counter() - started)


def _differences(old: Mapping[str, str], new: Mapping[str, str], package: str) -> list[str]:
    names = sorted((old.keys() | new.keys()) - {package})
    return [
        f"{name} {old.get(name, 'none')} → {new.get(name, 'none')}"
        for name in names
        if old.get(name) != new.get(name)
    ]


def _requirement(text: str) -> str:
    """On Linux MLX has its backend in an extra."""
    return re.sub(r"^mlx(?![\w.\[-])", "mlx[cpu]", text) if sys.platform == "linux" else text


def _digest(*parts: object) -> str:
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:16]


def _code() -> str:
    """Hash of this package's code: verdicts depend on what compares as well."""
    files = sorted(Path(parity.__file__).resolve().parent.rglob("*.py"))
    return _digest(*(hashlib.sha256(file.read_bytes()).hexdigest() for file in files))


def _launcher(file: Path, python: str, path: str) -> Path:
    lines = [
        'export PARITY_PATH="$PYTHONPATH" PYTHONSAFEPATH=1',
        f"export PYTHONPATH={shlex.quote(path)}" if path else "unset PYTHONPATH",
        f'exec {shlex.quote(python)} "$@"',
    ]
    write_atomically(file, "\n".join(["#!/bin/sh", *lines, ""]).encode())
    file.chmod(0o755)
    return file


def _uv() -> str:
    beside = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    if not (found := shutil.which("uv", path=beside)):
        raise UsageError("environments are made with uv, which is not installed: pip install uv")
    return found


def _run(*command: str | Path, env: Mapping[str, str] | None = None) -> str:
    try:
        done = subprocess.run(
            [*map(str, command)], capture_output=True, text=True, timeout=PATIENCE, env=env,
            check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Gap(str(error)) from None
    if done.returncode:
        raise Gap(" ".join((done.stderr or done.stdout or "it failed").split())[-600:])
    return done.stdout
