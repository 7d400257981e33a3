"""Which release, or which commit, of a package changed a verdict.

One cell is run over and over, one side of it (or both) in an interpreter with another version.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from shlex import quote
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
from parity.trace import Trace, write_atomically
from parity.worker import Worker

WORKER = ("numpy", "pydantic", "safetensors", "filelock", "platformdirs", "packaging", "pyyaml")
SIDES = {"subject": ("subject",), "reference": ("reference",), "both": ("subject", "reference")}
PATIENCE = 900  # seconds an installation may take
HERE = Path(parity.__file__).resolve().parent
# The working directory comes last: a checkout that lies there must not hide the release.
_LAST = 'import os, sys; sys.path += [os.getcwd(), *os.environ.get("PARITY_PATH", "").split(":")]'
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
    """An interpreter, the key of what it has installed, and that by name and version."""

    python: Path
    key: str
    versions: Mapping[str, str]


class Gap(UsageError):
    """A version that cannot be installed, imported or checked out."""


@dataclass(frozen=True)
class Change:
    """Where the verdict of a cell changed: `side` ran other versions of `package`.

    `verdicts` are "verdict: reason" of found.last_good and found.first_bad, `also` the packages that
    the resolver changed between these two as well; `runs` counts the cells that were run.
    """

    package: str
    side: str
    found: Found
    verdicts: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    runs: int = 0
    seconds: float = 0.0

    def sentence(self) -> str:
        """The result in words."""
        if self.found.inconclusive:
            return f"{self.package}: inconclusive: {self.found.inconclusive}"
        who = "both sides" if self.side == "both" else f"the {self.side}"
        hidden = ", ".join(self.found.hidden)
        unless = f" (or in {hidden}, which cannot be run)" if hidden else ""
        when = f"in {self.found.first_bad}{unless}, after {self.found.last_good}"
        also = f" (changed with it: {', '.join(self.also)})" if self.also else ""
        return f"{who} moved with {self.package} {when}{also}: {' → '.join(self.verdicts)}"


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
    """Releases on the index from low to high that fit this machine; final ones, unless an end is not.

    Raises:
        UsageError: Fewer than two.
    """
    low, high = Version(span.low), Version(span.high)
    early = low.is_prerelease or high.is_prerelease
    has_pip = importlib.util.find_spec("pip") is not None
    pip = [sys.executable, "-m", "pip"] if has_pip else [_uv(), "tool", "run", "pip"]
    try:
        out = _run(*pip, "index", "versions", span.package, *(["--pre"] if early else []))
    except Gap as error:
        raise UsageError(f"no releases of {span.package!r}: {error}") from None
    listed = re.search(r"^Available versions: (.+)$", out, re.MULTILINE)
    every = sorted(map(Version, listed[1].split(", "))) if listed else []
    inside = [str(v) for v in every if low <= v <= high and (early or not v.is_prerelease)]
    if len(inside) < 2:
        known = f"{every[0]} to {every[-1]}" if every else "none"
        told = f"{len(inside)} releases in {span.low}..{span.high}, the index has {known}"
        raise UsageError(f"{span.package}: {told}: widen the range")
    return inside


def environment(
    package: str, version: str, cache: Path, extra: Iterable[str] = (), inherit: bool = False
) -> Place:
    """An interpreter with one release of a package, made once with uv below `environments/`.

    The resolver chooses what `extra` does not pin. With `inherit` what it lacks comes from this
    interpreter: torch does so or not at all.

    Raises:
        Gap: It cannot be installed or imported; the message is the end of what was printed.
    """
    wanted = [*map(_requirement, (f"{package}=={version}", *extra)), *WORKER]
    key = _digest(*wanted, sys.version, sys.prefix, HERE, inherit, _LAST)
    folder = cache.resolve() / "environments" / f"{package}-{version}-{key}"
    python, complete, launch = folder / "bin" / "python", folder / "complete", folder / "launch"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not complete.exists():
            shutil.rmtree(folder, ignore_errors=True)
            _run(_uv(), "venv", "--python", sys.executable, folder)
            never = folder / "override.txt"
            never.write_text("torch; sys_platform == 'never'\n", encoding="utf-8")
            _run(_uv(), "pip", "install", "--python", python, "--override", never, *wanted)
            # This package without its dependencies, be it a checkout or an installed wheel.
            (folder / "own").mkdir()
            (folder / "own" / "parity").symlink_to(HERE, target_is_directory=True)
            last = [p for p in sys.path if p.endswith("-packages") and inherit]
            [site] = folder.glob("lib/python*/site-packages")
            (site / "parity.pth").write_text("\n".join([str(folder / "own"), *last, _LAST, ""]))
            _launcher(launch, python)
            _run(launch, "-c", _IMPORT, package)
            listed = json.loads(_run(_uv(), "pip", "list", "--format=json", "--python", python))
            names = {row["name"]: row["version"] for row in listed}
            write_atomically(complete, json.dumps(names).encode())
        return Place(launch, folder.name, json.loads(complete.read_text(encoding="utf-8")))


def commits(repo: Path, good: str, bad: str) -> list[str]:
    """Commits of the main line from good to bad, both included.

    Raises:
        UsageError: No repository, no such commits, or bad does not come after good.
    """
    git = ("git", "-C", repo)
    try:
        first = _run(*git, "rev-parse", "--verify", f"{good}^{{commit}}").strip()
        _run(*git, "merge-base", "--is-ancestor", first, bad)
        rest = _run(*git, "rev-list", "--first-parent", "--reverse", f"{first}..{bad}")
    except Gap as error:
        raise UsageError(f"{repo}: {bad!r} does not come after {good!r}: {error}") from None
    return [first, *rest.split()]


def snapshot(repo: Path, commit: str, cache: Path) -> Place:
    """This interpreter with the files of a commit first on its path; the checkout stays as it is."""
    folder = cache.resolve() / "snapshots" / commit
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        if not (folder / "complete").exists():
            git, env = ("git", "-C", repo), {**os.environ, "GIT_INDEX_FILE": str(folder / "index")}
            _run(*git, "read-tree", commit, env=env)
            _run(*git, "checkout-index", "-a", "-f", f"--prefix={folder}/files/", env=env)
            write_atomically(folder / "complete", b"{}")
        paths = [folder / "files" / "src", folder / "files", Path.cwd(), HERE.parent]
        path = ":".join([*map(str, paths), os.environ.get("PYTHONPATH", "")])
        launch = folder / f"launch-{_digest(sys.executable, path)}"
        if not launch.exists():
            _launcher(launch, Path(sys.executable), path)
        return Place(launch, f"{commit}-{launch.name}", {})


def _requirement(text: str) -> str:
    """On Linux MLX has its backend in an extra."""
    return re.sub(r"^mlx(?![\w.\[-])", "mlx[cpu]", text) if sys.platform == "linux" else text


def _digest(*parts: object) -> str:
    return sha256("\n".join(map(str, parts)).encode()).hexdigest()[:16]


def _launcher(file: Path, python: Path, path: str = "") -> None:
    text = f"""#!/bin/sh
export PARITY_PATH="$PYTHONPATH" PYTHONPATH={quote(path)} PYTHONSAFEPATH=1
exec {quote(str(python))} "$@"
"""
    write_atomically(file, text.encode())
    file.chmod(0o755)


def _uv() -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    if not (found := shutil.which("uv", path=path)):
        raise UsageError("environments are made with uv, which is not installed: pip install uv")
    return found


def _run(*command: object, env: Mapping[str, str] | None = None) -> str:
    words = [str(word) for word in command]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE, env=env)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Gap(str(error)) from None
    if done.returncode:
        raise Gap(" ".join((done.stderr or done.stdout or "it failed").split())[-600:])
    return done.stdout


class Elsewhere(Engine):
    """Runs some paths in other interpreters, with captures of their own; the rest in the base's.

    Repeats (`attempt` above 0) capture everything afresh.
    """

    def __init__(self, base: Engine, places: Mapping[str, Place], attempt: int = 0) -> None:
        self.base, self.places, self.attempt = base, places, attempt
        keys = sorted((spec, place.key) for spec, place in places.items())
        folder = base.cache.resolve() / "elsewhere" / _digest(keys, attempt)
        super().__init__(folder, base.timeout, folder / "logs", base.notice)

    def capture(self, spec: str, method: str, recipe: Recipe, inputs: Trace) -> Trace:
        """See `Engine.capture`."""
        if spec in self.places or self.attempt:
            return super().capture(spec, method, recipe, inputs)
        return self.base.capture(spec, method, recipe, inputs)

    def _worker(self, spec: str) -> Worker:
        worker = self._workers.get(spec)
        if worker is None or not worker.alive:
            if worker is not None:
                worker.close()
            # Entry points are not known in another interpreter: the class is named.
            target, framework = registered().get(spec, spec), resolve(spec).framework
            python = self.places[spec].python if spec in self.places else sys.executable
            log = self.log_dir / f"{_digest(spec)}-{os.getpid()}-{time.monotonic_ns()}.log"
            worker = Worker(target, framework, self.base.cache.resolve(), log, str(python))
            self._workers[spec] = worker
        return worker


@dataclass(frozen=True)
class Bisection:
    """A cell, the side that runs elsewhere, and further requirements of its environments.

    The engine runs what stays as it is; its cache keeps environments, snapshots and, unless a file
    is named, the ledger of finished checks.
    """

    engine: Engine
    cell: Cell
    side: str = "subject"
    extra: tuple[str, ...] = ()
    ledger: Path | None = None
    progress: Progress | None = None

    def release(self, span: Range, *pins: str) -> Change:
        """Searches the releases of a package, others pinned. Raises as `search` does."""
        kinds = [resolve(getattr(self.cell, side)) for side in SIDES[self.side]]
        inherit = any(kind.framework == "torch" for kind in kinds)
        named = {name for kind in kinds for name in kind.packages} - {"torch", span.package}
        extra, cache = (*sorted(named), *pins, *self.extra), self.engine.cache
        return self.search(
            span.package, releases(span),
            lambda version: environment(span.package, version, cache, extra, inherit), *extra,
        )  # fmt: skip

    def each(self, *spans: Range) -> list[Change]:
        """Searches several packages one after the other, the others at their high ends."""
        changes = []
        for span in spans:
            pins = [f"{other.package}=={other.high}" for other in spans if other != span]
            try:
                changes.append(self.release(span, *pins))
            except SameEnds as error:
                found = Found(inconclusive=str(error))
                changes.append(Change(span.package, self.side, found))
        return changes

    def commit(self, repo: Path, good: str, bad: str) -> Change:
        """Searches the main line of a checkout of a pure Python package."""
        repo = repo.resolve()
        named = commits(repo, good, bad)
        return self.search(repo.name, named, lambda c: snapshot(repo, c, self.engine.cache))

    def search(
        self, package: str, versions: list[str], place: Callable[[str], Place], *about: str
    ) -> Change:
        """Finds where the verdict of the low end gives way to that of the high end.

        Raises:
            SameEnds: Both have the same verdict.
            UsageError: Fewer than two versions can be run.
        """
        started, sides = time.perf_counter(), SIDES[self.side]
        # Named by its class, the side is neither the referee nor the other side of the same name.
        names = {side: getattr(self.cell, side) for side in sides}
        cell = replace(self.cell, **{s: registered().get(n, n) for s, n in names.items()})

        def run(version: str, attempt: int) -> Answer:
            where = place(version)
            specs = {getattr(cell, side): where for side in sides}
            with Elsewhere(self.engine, specs, attempt) as elsewhere:
                record = elsewhere.run(cell)
            kind = (
                re.search(r"(\w+) in \w+: ", record.reason) if record.verdict == "error" else None
            )
            state = "agree" if record.verdict.green else str(record.verdict)
            # One error is not another.
            return Answer(f"{state} ({kind[1]})" if kind else state, record.reason)

        paths = map(content.of_path, (cell.subject, cell.reference))
        told = package, cell.stage.name, cell.changes, self.side, about
        key = _digest(*told, *paths, content.of_recipe(cell.recipe), _code())
        book = Ledger(self.ledger or self.engine.cache / "bisect" / f"{key}.json", key)
        asked = book.remember(run)

        def verdict(version: str, attempt: int = 0) -> Answer:
            try:
                return asked(version, attempt)
            except Gap as error:
                return Answer(Outcome.GAP, str(error))

        def end(order: Iterable[str]) -> Answer:
            answers = map(verdict, order)
            return next((a for a in answers if a.outcome != Outcome.GAP), Answer(Outcome.GAP))

        first, last = end(versions), end(reversed(versions))
        labels = {last.outcome: Outcome.BAD, first.outcome: Outcome.GOOD, "gap": Outcome.GAP}

        def check(version: str, attempt: int) -> Answer:
            outcome, reason = verdict(version, attempt)
            said = reason if outcome == Outcome.GAP else f"{outcome}: {reason}"
            return Answer(labels.get(outcome, Outcome.GAP), said)

        try:
            found = search(versions, check, progress=self.progress)
        except SameEnds as error:
            raise SameEnds(f"{package}: {error} ({first.outcome}: {first.reason})") from None
        change = Change(package, self.side, found)
        if not found.inconclusive:
            ends = found.last_good, found.first_bad
            old, new = (place(version).versions for version in ends)
            also = [
                f"{name} {old.get(name, 'none')} → {new.get(name, 'none')}"
                for name in sorted((old.keys() | new.keys()) - {package})
                if old.get(name) != new.get(name)
            ]
            said = tuple(check(version, 0).reason for version in ends)
            change = replace(change, verdicts=said, also=tuple(also))
        return replace(change, runs=book.computed, seconds=time.perf_counter() - started)


def _code() -> str:
    """Hash of this package's code: a verdict depends on what compares as well."""
    return _digest(*(sha256(f.read_bytes()).hexdigest() for f in sorted(HERE.rglob("*.py"))))
