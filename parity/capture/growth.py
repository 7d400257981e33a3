"""A cache that is filled while a command runs: kept below its limit, and what a full disk means."""

from __future__ import annotations

import contextlib
import shutil
import threading
from pathlib import Path

from filelock import FileLock

from parity.capture import storage

SHARE = 100  # a cache is measured when it has grown by this part of its limit
FULL = 20_000_000  # bytes that are free on a disk on which nothing more can be kept


class Growth:
    """Keeps a cache below its limit while it is filled.

    Args:
        cache: Its folder.
    """

    def __init__(self, cache: Path) -> None:
        self._cache, self._most = cache, storage.limit()
        self.said: dict[str, None] = {}
        """What was removed, in sentences."""
        self._new, self._lock = 0, threading.Lock()

    def add(self, size: int) -> None:
        """Some bytes more."""
        with self._lock:
            self._new += size
            if self._new * SHARE < self._most:
                return
        self.settle()

    def settle(self) -> None:
        """Adds up with what other commands have added since the cache was measured; prunes if it is time."""
        with self._lock:
            new, self._new = self._new, 0
        if not new:
            return
        file = self._cache / "grown"
        with FileLock(self._cache / "prune.lock"):
            with contextlib.suppress(OSError, ValueError):
                new += int(file.read_text())
            measured = new * SHARE >= self._most
            file.write_text("0" if measured else str(new))
        if measured and (sentence := storage.keep_below(self._cache, self._most)):
            self.said[sentence] = None


def full(cache: Path) -> str:
    """Says so where the disk of a cache is full; else nothing."""
    if (free := shutil.disk_usage(cache).free) > FULL:
        return ""
    return (
        f"the disk of the cache {cache} is full ({storage.shown(free)} are free): `parity cache prune --limit SIZE` or "
        "`--all` makes room, and what is finished is kept"
    )
