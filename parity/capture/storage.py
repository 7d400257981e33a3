"""What the cache holds, and what of it can go: the captures used least recently, and what killed runs left.

Every command that captures holds a lock below `live/` as long as it runs. What was used since the oldest of
them began, but for what none has used for a quarter of an hour, and what belongs to a capture under way, is
never removed.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from parity.errors import UsageError
from parity.files import unwritable

VARIABLE, DEFAULT = "PARITY_CACHE_LIMIT", "20GB"
LIVE, CAPTURES, MANIFESTS, LOGS = "live", "captures", "loaded", "logs"
RECORDS = "records"
ELSEWHERE = "elsewhere"
"""Holds a cache of its own for each set of other interpreters, whose captures count as well."""
KINDS = {
    CAPTURES: "captures",
    ELSEWHERE: "captures of releases and commits",
    "bundles": "captures out of bundles",
    RECORDS: "finished records",
    MANIFESTS: "manifests of what was loaded",
    "derived": "figures and statistics",
    "kernels": "compiled kernels",
    "checkpoints": "converted checkpoints",
    "quantized": "quantized checkpoints",
    "models": "models out of packages",
    "adapters": "adapters that were handed over",
    "sweep": "models and finished cells of sweeps",
    "environments": "environments of releases",
    "snapshots": "snapshots of commits",
    "bisect": "ledgers of searches",
    LOGS: "logs",
}
"""Folders of the cache and what lies in them; others are no part of it and are left alone."""
PRUNED = (CAPTURES, ELSEWHERE, "bundles", RECORDS)
"""What goes by itself when the cache is above its limit."""
LOCKED = (
    "kernels",
    "checkpoints",
    "quantized",
    "models",
    "adapters",
    "sweep",
    "environments",
    "snapshots",
    "bisect",
)
"""Of these it is not known which a live command uses: they stay as long as there is one."""
_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{end}": base ** (power + 1)
    for end, base in (("B", 1000), ("iB", 1024))
    for power, prefix in enumerate(("k", "M", "G", "T"))
}
KEPT = 900.0  # seconds for which a live command is sure of what it used
_WRITING = 3600.0  # seconds after which a file that was being written is left behind


class Entry(NamedTuple):
    """One capture, kernel, environment, … in the cache."""

    path: Path
    """A file or folder."""
    size: int
    """Bytes."""
    used: float
    """When it was used last, in seconds since 1970."""


@dataclass(frozen=True)
class Contents:
    """What a cache holds, by folder, and what killed commands left behind in it."""

    folder: Path
    entries: dict[str, list[Entry]]
    left: list[Entry]

    @property
    def size(self) -> int:
        """Bytes of all of it."""
        lists = (*self.entries.values(), self.left)
        return sum(entry.size for entries in lists for entry in entries)


@dataclass(frozen=True)
class Pruned:
    """What was removed."""

    count: int
    size: int
    """Bytes."""
    kept: int
    """Bytes that are there still."""


def limit(text: str | None = None) -> int:
    """Bytes that the cache may hold: `5GB`, `500 MB`, `2GiB` or bytes; by default the variable's or 20 GB.

    Raises:
        UsageError: No such size.
    """
    name = "--limit" if text is not None else VARIABLE
    value = text if text is not None else os.environ.get(VARIABLE) or DEFAULT
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", value)
    units = {unit.lower(): size for unit, size in _UNITS.items()}
    if not match or match[2].lower() not in units:
        raise UsageError(f"{name} {value!r} is no size: give one such as 5GB, 500MB or 2GiB")
    return int(float(match[1]) * units[match[2].lower()])


def shown(size: float) -> str:
    """`1.2 GB`."""
    for unit in ("TB", "GB", "MB", "kB"):
        if size >= 0.9995 * _UNITS[unit]:
            return f"{size / _UNITS[unit]:.3g} {unit}"
    return f"{size:.0f} B"


def check_writable(cache: Path) -> None:
    """Finds a cache that captures cannot be kept in.

    Raises:
        UsageError: With the reason.
    """
    if why := unwritable(cache):
        raise UsageError(
            f"the cache {cache}: {why}: set PARITY_CACHE to a folder that can be written"
        )


@contextlib.contextmanager
def in_use(cache: Path) -> Iterator[None]:
    """Keeps what is used from now on from being removed by another process."""
    # Its name says since when: to try a lock changes the file's times.
    file = cache / LIVE / f"{os.getpid()}-{time.time_ns()}.lock"
    lock = FileLock(file, thread_local=False)  # an engine may be closed by another thread
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / "prune.lock"):  # nobody begins while somebody removes
            lock.acquire()
    except OSError:  # what cannot be written cannot be pruned
        yield
        return
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        lock.release()


def made(file: Path) -> int:
    """When a capture was written, in nanoseconds since 1970; 0 where it is gone."""
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return 0


def used(file: Path) -> bool:
    """Notes that a capture is used now, in its time of access; False where it is gone."""
    try:
        os.utime(file, ns=(time.time_ns(), file.stat().st_mtime_ns))
    except PermissionError:  # somebody else's cache
        return True
    except OSError:
        return False
    return True


def contents(cache: Path) -> Contents:
    """Looks through a cache. One that does not exist holds nothing."""
    entries: dict[str, list[Entry]] = {}
    left = [*_left_behind(cache)]
    gone = {entry.path for entry in left}
    for kind in KINDS:
        found: Iterator[Entry]
        if kind == ELSEWHERE:
            found = (entry for root in _roots(cache)[1:] for entry in _files(root / CAPTURES))
        elif kind in (CAPTURES, "bundles", RECORDS, "derived"):
            found = _files(cache / kind)
        else:
            found = _items(cache / kind)
        entries[kind] = [
            entry
            for entry in found
            if entry.path not in gone and entry.path.suffix not in (".lock", ".inputs", ".output")
        ]
    return Contents(cache, entries, left)


def prune(cache: Path, most: float, everything: bool = False) -> Pruned:
    """Removes what was left behind and the captures used least recently, until at most `most` bytes are left.

    What a live command used goes as well where that was more than `KEPT` seconds ago: it can be captured again.

    Args:
        cache: Its folder.
        most: Bytes.
        everything: Remove all that no live command uses, not captures alone.
    """
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / "prune.lock"):
        found, since = contents(cache), _sure_since(cache)
        removed = [entry for entry in found.left if _remove(entry)]
        size = found.size - sum(entry.size for entry in removed)
        kinds = [kind for kind in KINDS if everything or kind in PRUNED]
        if since < inf:
            kinds = [kind for kind in kinds if kind not in LOCKED]
        candidates = [e for k in kinds for e in found.entries[k] if e.used < since]
        for entry in sorted(candidates, key=lambda entry: entry.used):
            if not everything and size <= most:
                break
            if _remove(entry):
                removed.append(entry)
                size -= entry.size
        for entry in _unneeded_manifests(cache, since):
            if _remove(entry):
                removed.append(entry)
                size -= entry.size
    return Pruned(len(removed), sum(entry.size for entry in removed), size)


def keep_below(cache: Path, most: int) -> str:
    """Prunes captures where the cache holds more than `most` bytes; says so in a line, else nothing."""
    if contents(cache).size <= most:
        return ""
    done = prune(cache, most)
    if not done.count:
        return (
            f"the cache holds {shown(done.kept)}, more than {shown(most)}, and no captures that "
            "could go: `parity cache prune --all` empties it"
        )
    return (
        f"removed {done.count} files from the cache ({shown(done.size)}, those used least "
        f"recently): it may hold {shown(most)} ({VARIABLE})"
    )


def _roots(cache: Path) -> list[Path]:
    """Folders that hold captures: the cache, and one for each set of other interpreters."""
    nested = sorted((cache / ELSEWHERE).iterdir()) if (cache / ELSEWHERE).is_dir() else []
    return [cache, *nested]


def _files(folder: Path) -> Iterator[Entry]:
    """Every file below a folder."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from _files(Path(entry.path))
            continue
        with contextlib.suppress(OSError):  # gone meanwhile
            stat = entry.stat(follow_symlinks=False)
            yield Entry(Path(entry.path), stat.st_size, _used(stat))


def _items(folder: Path) -> Iterator[Entry]:
    """Each file and folder in a folder, a folder with all that is in it."""
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        inside = [*_files(path)] if path.is_dir() and not path.is_symlink() else []
        with contextlib.suppress(OSError):
            stat = path.lstat()
            own = 0 if inside else stat.st_size
            times = [entry.used for entry in inside] or [stat.st_mtime]
            yield Entry(path, own + sum(entry.size for entry in inside), max(times))


def _used(stat: os.stat_result) -> float:
    return max(stat.st_atime, stat.st_mtime)


def _left_behind(cache: Path) -> Iterator[Entry]:
    """What no process will use: of captures never finished, of files never written whole, of dead processes."""
    alone = _sure_since(cache) == inf
    roots = _roots(cache)
    for entry in (entry for root in roots for entry in _files(root / CAPTURES)):
        name = entry.path.name
        if name.startswith("."):
            if time.time() - entry.used > _WRITING:
                yield entry
        elif entry.path.suffix == ".lock":
            if alone:  # a live command may be about to take it; who removes it tries it first
                yield entry
        elif entry.path.suffix in (".inputs", ".output") and _free(entry.path.with_suffix(".lock")):
            yield entry
    for entry in (entry for root in roots for entry in _items(root / LOGS)):
        if (pid := re.search(r"-(\d+)\.log$", entry.path.name)) and not _alive(int(pid[1])):
            yield entry
    for entry in (entry for root in roots for entry in _items(root / LIVE)):
        if _free(entry.path):
            yield entry
    if alone:  # kernels are compiled in the temporary folder of MLX's workers
        yield from (e for e in _items(cache / "kernels") if e.path.name.startswith("tmp"))


def _sure_since(cache: Path) -> float:
    """Since when live commands are sure of what they used, in seconds since 1970; infinite where there is none."""
    held = [entry.path.stem for entry in _items(cache / LIVE) if not _free(entry.path)]
    began = min((int(name.rpartition("-")[2]) / 1e9 for name in held), default=inf)
    return began if began == inf else max(began, time.time() - KEPT)


def _free(file: Path) -> bool:
    """Whether nobody holds a lock."""
    if not file.exists():
        return True
    try:
        with FileLock(file, timeout=0):
            return True
    except Timeout:
        return False


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _unneeded_manifests(cache: Path, since: float) -> Iterator[Entry]:
    """Manifests of no capture."""
    captures = (entry for root in _roots(cache) for entry in _files(root / CAPTURES))
    needed = {"hashes"} | {entry.path.stem.rpartition("-")[2] for entry in captures}
    for entry in _items(cache / MANIFESTS):
        if entry.path.stem not in needed and entry.used < since:
            yield entry


def _remove(entry: Entry) -> bool:
    """Removes a file or folder unless its lock is held."""
    lock = entry.path if entry.path.suffix == ".lock" else _lock_of(entry.path)
    try:
        with FileLock(lock, timeout=0) if lock.exists() else contextlib.nullcontext():
            if entry.path.is_dir() and not entry.path.is_symlink():
                shutil.rmtree(entry.path, ignore_errors=True)
            elif entry.path.suffix == ".safetensors" and _used(entry.path.stat()) > entry.used:
                return False  # used since it was looked at
            else:
                entry.path.unlink(missing_ok=True)
            return not entry.path.exists()
    except (Timeout, OSError):
        return False


def _lock_of(path: Path) -> Path:
    """The lock under which a capture, or a folder, is made."""
    if path.suffix == ".safetensors":
        return path.with_name(f"{path.stem.rpartition('-')[0] or path.stem}.lock")
    if path.suffix in (".inputs", ".output"):
        return path.with_suffix(".lock")
    return path.with_name(f"{path.name}.lock")
