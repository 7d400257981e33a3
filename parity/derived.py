"""Texts that follow from their input alone and take long to make, kept below the cache.

What is kept is found by all that it depends on, so it is never out of date; removing it costs time alone.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable

from parity import resources
from parity.files import write_atomically

FOLDER = "derived"


def kept(kind: str, parts: tuple[object, ...], make: Callable[[], str]) -> str:
    """What `make` returns, or returned before for the same parts.

    Args:
        kind: Name of its folder.
        parts: All that the text depends on, the release of the library that computes it included;
            `repr` must tell them apart.
        make: Makes the text.
    """
    key = hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
    file = resources.cache() / FOLDER / kind / key
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return file.read_text(encoding="utf-8")
    text = make()
    with contextlib.suppress(OSError):  # a cache that cannot be written makes it slower, not wrong
        write_atomically(file, text.encode())
    return text
