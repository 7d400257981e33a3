"""Environments of their own: releases of a package made with uv, commits of a checkout."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from shlex import quote
from typing import NamedTuple

from filelock import FileLock
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

import parity
from parity.errors import UsageError
from parity.files import write_atomically
from parity.paths.registry import resolve

WORKER = ("numpy", "pydantic", "safetensors", "filelock", "platformdirs", "packaging", "pyyaml")
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


class Interpreter(NamedTuple):
    """An interpreter, the key of what it has installed, and that by name and version."""

    python: Path
    key: str
    versions: Mapping[str, str]


class UnavailableVersion(UsageError):
    """A version that cannot be installed, imported or checked out."""


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
    except UnavailableVersion as error:
        raise UsageError(f"no releases of {span.package!r}: {error}") from None
    listed = re.search(r"^Available versions: (.+)$", out, re.MULTILINE)
    every = sorted(map(Version, listed[1].split(", "))) if listed else []
    inside = [str(v) for v in every if low <= v <= high and (early or not v.is_prerelease)]
    if len(inside) < 2:
        known = f"{every[0]} to {every[-1]}" if every else "none"
        found = f"{len(inside)} releases in {span.low}..{span.high}, the index has {known}"
        raise UsageError(f"{span.package}: {found}: widen the range")
    return inside


def environment(
    package: str,
    version: str,
    cache: Path,
    extra: Iterable[str] = (),
    inherit: bool = False,
    alone: Iterable[str] = (),
) -> Interpreter:
    """An interpreter with one release of a package, made once with uv below `environments/`.

    The resolver chooses what `extra` does not pin. With `inherit` what it lacks comes from this
    interpreter: torch does so or not at all. Packages named in `alone` come without what they
    require and are not imported here: the path that runs them knows how.

    Raises:
        UnavailableVersion: It cannot be installed or imported; the message is the end of what was printed.
    """
    wanted = [*map(_requirement, (f"{package}=={version}", *extra)), *WORKER]
    bare = [text for text in wanted if _name(text) in set(alone)]
    full = [text for text in wanted if text not in bare]
    key = digest(*wanted, sys.version, sys.prefix, HERE, inherit, _LAST, *bare)
    folder = cache.resolve() / "environments" / f"{package}-{version}-{key}"
    python, complete, launch = folder / "bin" / "python", folder / "complete", folder / "launch"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not complete.exists():
            shutil.rmtree(folder, ignore_errors=True)
            _run(_uv(), "venv", "--python", sys.executable, folder)
            never = folder / "override.txt"
            never.write_text("torch; sys_platform == 'never'\n", encoding="utf-8")
            install = (_uv(), "pip", "install", "--python", python)
            _run(*install, "--override", never, *full)
            if bare:
                _run(*install, "--no-deps", *bare)
            # This package without its dependencies, be it a checkout or an installed wheel.
            (folder / "own").mkdir()
            (folder / "own" / "parity").symlink_to(HERE, target_is_directory=True)
            last = [p for p in sys.path if p.endswith("-packages") and inherit]
            [site] = folder.glob("lib/python*/site-packages")
            (site / "parity.pth").write_text("\n".join([str(folder / "own"), *last, _LAST, ""]))
            _launcher(launch, python)
            if package not in set(alone):
                _run(launch, "-c", _IMPORT, package)
            listed = json.loads(_run(_uv(), "pip", "list", "--format=json", "--python", python))
            names = {row["name"]: row["version"] for row in listed}
            write_atomically(complete, json.dumps(names).encode())
        return Interpreter(launch, folder.name, json.loads(complete.read_text(encoding="utf-8")))


def pinned(spec: str, cache: Path) -> Interpreter:
    """The environment of `PATH@VERSION`: that release of the distribution which the path is about.

    Raises:
        UnavailableVersion: It cannot be installed.
    """
    name, _, version = spec.partition("@")
    kind = resolve(name)
    others = sorted(set(kind.packages) - {"torch", kind.release})
    inherit = kind.framework == "torch"
    return environment(kind.release, version, cache, others, inherit, kind.without_dependencies)


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
    except UnavailableVersion as error:
        raise UsageError(f"{repo}: {bad!r} does not come after {good!r}: {error}") from None
    return [first, *rest.split()]


def snapshot(repo: Path, commit: str, cache: Path) -> Interpreter:
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
        launch = folder / f"launch-{digest(sys.executable, path)}"
        if not launch.exists():
            _launcher(launch, Path(sys.executable), path)
        return Interpreter(launch, f"{commit}-{launch.name}", {})


def _requirement(text: str) -> str:
    """On Linux MLX has its backend in an extra."""
    return re.sub(r"^mlx(?![\w.\[-])", "mlx[cpu]", text) if sys.platform == "linux" else text


def _name(requirement: str) -> str:
    """The package of a requirement."""
    found = re.match(r"[A-Za-z0-9][\w.-]*", requirement)
    return canonicalize_name(found[0]) if found else ""


def digest(*parts: object) -> str:
    """A short content key."""
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
        raise UnavailableVersion(str(error)) from None
    if done.returncode:
        raise UnavailableVersion(
            " ".join((done.stderr or done.stdout or "it failed").split())[-600:]
        )
    return done.stdout


def compiled(project: Path, pins: Sequence[str], python: str, platform: str) -> list[str]:
    """The newest releases on the index that a project can be installed with, as `name==version`.

    Nothing is installed, and the platform need not be this one.

    Args:
        project: Its pyproject.toml.
        pins: Requirements that hold as well.
        python: Version of the interpreter.
        platform: As uv names them, such as `aarch64-apple-darwin`.

    Raises:
        UsageError: Nothing fits, or uv is not installed.
    """
    # MLX has wheels from macOS 14 on; uv assumes 13.
    env = {**os.environ, "MACOSX_DEPLOYMENT_TARGET": "15.0"}
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as file:
        file.write("\n".join(pins))
        file.flush()
        options = ("--quiet", "--no-header", "--no-annotate")
        words = (
            "--constraint",
            file.name,
            "--python-version",
            python,
            "--python-platform",
            platform,
        )
        try:
            listed = _run(_uv(), "pip", "compile", project, *options, *words, env=env)
        except UnavailableVersion as error:
            raise UsageError(f"{project}: no releases fit together: {error}") from None
    return [line for line in listed.splitlines() if "==" in line]
