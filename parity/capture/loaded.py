"""What a process has loaded, by content: whether a capture is of the code that would run now.

A worker lists each Python file outside the standard library and each binary with its hash in a
*manifest*, kept below the cache by its own hash. A capture is used again while every file of its
manifest is what a process would load now. Hashes are kept by size and time, so that the check is a
`stat` a file: about 15 ms for torch and transformers.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from parity import timing
from parity.files import write_atomically

FOLDER = "loaded"
_STARTED = time.time_ns()
_UNKNOWN = "changed while the process ran"
_BINARY = (".so", ".dylib", ".metallib", ".pyd")


class Hashes:
    """Content hashes of files, each computed anew only where size or time differ."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "hashes.json"
        self._known: dict[str, tuple[int, int, str]] = {}
        self._read = 0
        self._new = False

    def of(self, file: str) -> str:
        """The hash of a file, empty where there is none."""
        try:
            stat = os.stat(file)  # noqa: PTH116 a Path for each of 4,000 files doubles the time
        except OSError:
            return ""
        mark = stat.st_size, stat.st_mtime_ns
        if (known := self._known.get(file)) and known[:2] == mark:
            return known[2]
        self._load()
        if (known := self._known.get(file)) and known[:2] == mark:
            return known[2]
        try:
            with open(file, "rb") as stream:  # noqa: PTH123
                value = hashlib.file_digest(stream, "sha256").hexdigest()[:20]
        except OSError:
            return ""
        self._known[file], self._new = (*mark, value), True
        return value

    def take(self, other: Hashes) -> None:
        """Takes over what another one knows; a folder that has nothing gets it with the next `save`."""
        self._known, self._new = dict(other._known), not self._file.exists()

    def save(self) -> None:
        """Keeps what was computed; of two processes that save at once one computes again."""
        if self._new:
            write_atomically(self._file, json.dumps(self._known).encode())
            self._new = False

    def _load(self) -> None:
        try:
            if (written := self._file.stat().st_mtime_ns) == self._read:
                return
            found = json.loads(self._file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return
        self._read = written
        self._known = {**{name: tuple(mark) for name, mark in found.items()}, **self._known}


class _File(NamedTuple):
    """A loaded file: its top-level module (empty for a library), its root and its path below that."""

    top: str
    root: str
    path: str


def restarted() -> None:
    """This process was forked: what it loads from now on may have changed until now."""
    global _STARTED
    _STARTED = time.time_ns()


class Manifests:
    """The worker's end: writes what this process has loaded.

    Args:
        cache: Folder that workers share.
        before: What was looked at before the process was forked.
    """

    def __init__(self, cache: Path, before: Manifests | None = None) -> None:
        self._folder, self._hashes = cache / FOLDER, Hashes(cache / FOLDER)
        # Kernels that MLX compiles are products of what is loaded.
        self._made = str((cache / "kernels").resolve()) + os.sep
        self._values: dict[_File, str] = dict(before._values) if before else {}
        # Those that were looked at.
        self._modules: set[str] = set(before._modules) if before else set()
        if before:
            self._hashes.take(before._hashes)

    def look(self) -> None:
        """Hashes what is loaded and was not looked at yet."""
        for file in set(_loaded(self._modules)) - self._values.keys():
            whole = os.path.join(file.root, file.path)  # noqa: PTH118
            if not whole.startswith(self._made) and (value := self._hash(whole)):
                self._values[file] = value
        self._hashes.save()

    def unchanged(self) -> bool:
        """Whether what was looked at is what lies on disk now."""
        return all(
            self._hashes.of(os.path.join(file.root, file.path)) == value  # noqa: PTH118
            for file, value in self._values.items()
        )

    def write(self) -> str:
        """The digest of the manifest of this process as it is now."""
        self.look()
        roots = {os.path.abspath(root) for root in sys.path}  # noqa: PTH100
        below = {f.path: v for f, v in self._values.items() if f.root in roots}
        elsewhere = {
            os.path.join(f.root, f.path): [f.top, v]  # noqa: PTH118
            for f, v in self._values.items()
            if f.root not in roots
        }
        text = json.dumps({"below": below, "elsewhere": elsewhere}, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        if not (manifest := self._folder / f"{digest}.json").exists():
            write_atomically(manifest, text.encode())
        return digest

    def _hash(self, file: str) -> str:
        """Of a file that was changed since the process began nobody knows which state was loaded."""
        try:
            changed = os.stat(file).st_mtime_ns > _STARTED  # noqa: PTH116
        except OSError:
            return ""
        return _UNKNOWN if changed else self._hashes.of(file)


def _loaded(known: set[str]) -> Iterator[_File]:
    """Modules outside the standard library that are not known yet, and the libraries that are mapped."""
    paths = sysconfig.get_paths()
    standard = tuple(paths[key] + os.sep for key in ("stdlib", "platstdlib"))
    roots = sorted({os.path.abspath(root) for root in sys.path}, key=len, reverse=True)  # noqa: PTH100
    seen, folders = set(), set()

    def placed(top: str, file: str) -> _File:
        for root in roots:
            if file.startswith(root + os.sep):
                return _File(top, root, file[len(root) + 1 :])
        folder, _, name = file.rpartition(os.sep)
        return _File(top, folder or os.sep, name)

    for name, module in [item for item in sys.modules.items() if item[0] not in known]:
        known.add(name)
        file = getattr(module, "__file__", None)
        if not isinstance(file, str) or (file.startswith(standard) and "-packages" not in file):
            continue
        file = os.path.abspath(file)  # noqa: PTH100
        yield placed(name.partition(".")[0], file)
        if file.endswith(_BINARY):
            seen.add(os.path.realpath(file))
            folders.add(os.path.dirname(file))  # noqa: PTH120
    maps = Path("/proc/self/maps")
    if maps.exists():
        text = maps.read_text(encoding="utf-8", errors="replace")
        mapped = {line[line.index("/") :] for line in text.splitlines() if "/" in line}
        libraries = [f for f in mapped if ".so" in f and not f.endswith("(deleted)")]
    else:  # macOS: what lies beside the extension modules
        beside = [Path(folder, part) for folder in folders for part in ("", "lib", ".dylibs")]
        libraries = [str(f) for b in beside for f in b.glob("*") if f.suffix in _BINARY]
    for library in libraries:
        if library not in seen and not library.startswith(standard[0] + "lib-dynload"):
            yield placed("", library)


@lru_cache(maxsize=64)
def search_path(python: str, folder: str, pythonpath: str) -> tuple[str, ...]:
    """Where a process of an interpreter that is started in `folder` looks for modules."""
    script = "import json, os, sys; print(json.dumps([os.path.abspath(p) for p in sys.path]))"
    env = {**os.environ, "PYTHONPATH": pythonpath}
    done = subprocess.run(
        [python, "-c", script], cwd=folder, env=env, capture_output=True, text=True, check=False
    )
    return tuple(json.loads(done.stdout)) if not done.returncode else ()


class Check:
    """The engine's end: whether a manifest is of what a process would load now."""

    FRESH = 1.0  # seconds an answer holds: a cell reads dozens of captures of one manifest

    def __init__(self, cache: Path) -> None:
        self._folder, self._hashes = cache / FOLDER, Hashes(cache / FOLDER)
        self._manifests: dict[str, dict[str, Any]] = {}
        self._answers: dict[tuple[str, str], tuple[float, bool]] = {}
        self._seen: dict[
            str, str
        ] = {}  # file → hash, as long as it is fresh: manifests share files
        self._seen_since = 0.0
        self._lock = threading.Lock()

    def holds(self, digest: str, python: str) -> bool:
        """Whether a worker started now would load the same files."""
        with timing.span(timing.READ, "what is loaded"), self._lock:
            now, known = time.monotonic(), self._answers.get((digest, python))
            if known and now - known[0] < self.FRESH:
                return known[1]
            if now - self._seen_since >= self.FRESH:
                self._seen, self._seen_since = {}, now
            roots = search_path(python, str(Path.cwd()), os.environ.get("PYTHONPATH", ""))
            answer = self._unchanged(digest, roots)
            self._hashes.save()
            self._answers[digest, python] = now, answer
            return answer

    def _unchanged(self, digest: str, roots: Sequence[str]) -> bool:
        if (manifest := self._manifests.get(digest)) is None:
            try:
                text = (self._folder / f"{digest}.json").read_text(encoding="utf-8")
            except OSError:
                return False
            manifest = self._manifests[digest] = json.loads(text)
        listed = {root: _names(root) for root in roots}
        place: dict[str, str | None] = {}
        for path, value in manifest["below"].items():
            top = path.partition(os.sep)[0]
            name = top.partition(".")[0] if top == path else top
            if name not in place:
                place[name] = next((r for r in roots if _offers(r, name, listed[r])), None)
            root = place[name] or next(
                (r for r in roots if os.path.exists(os.path.join(r, path))),  # noqa: PTH110, PTH118
                "",
            )
            if self._hash(f"{root}{os.sep}{path}") != value:
                return False
        for file, (name, value) in manifest["elsewhere"].items():
            hidden = name and any(_offers(root, name, listed[root]) for root in roots)
            if hidden or self._hash(file) != value:
                return False
        return True

    def _hash(self, file: str) -> str:
        if (value := self._seen.get(file)) is None:
            value = self._seen[file] = self._hashes.of(file)
        return value


def _names(root: str) -> frozenset[str]:
    try:
        return frozenset(os.listdir(root))  # noqa: PTH208
    except OSError:
        return frozenset()


def _offers(root: str, name: str, names: frozenset[str]) -> bool:
    """Whether a folder of the search path has a module or regular package of a name."""
    if f"{name}.py" in names:
        return True
    if name in names and os.path.exists(os.path.join(root, name, "__init__.py")):  # noqa: PTH110, PTH118
        return True
    suffix = sysconfig.get_config_var("EXT_SUFFIX") or ".so"
    return f"{name}{suffix}" in names or f"{name}.abi3.so" in names
