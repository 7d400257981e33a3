"""Files: written whole or not at all; JSON with NaN and infinities."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np


@contextmanager
def atomic(file: Path) -> Iterator[Path]:
    """A path beside the target, renamed to it in the end, so that a kill leaves no half file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    os.close(handle)
    part = Path(name)
    try:
        yield part
        part.chmod(0o644)
        part.replace(file)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def unwritable(folder: Path) -> str:
    """Why nothing can be written below a folder, there or still to be made; empty if it can."""
    nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not nearest.is_dir():
        return f"{nearest} is a file"
    if os.access(nearest, os.W_OK | os.X_OK):
        return ""
    return f"{nearest} cannot be written"


def write_atomically(file: Path, content: bytes) -> None:
    """Writes a file whole or not at all."""
    with atomic(file) as part:
        part.write_bytes(content)


def dumps(value: Any, **options: Any) -> str:
    """JSON for this package alone: `loads` gives back exactly the same numbers.

    NaN and infinities are written as the constants that Python's `json` and pydantic read and other
    readers refuse. `options` are those of `json.dumps`.
    """
    return json.dumps(value, ensure_ascii=False, default=_plain, **options)


loads = json.loads


def to_json(value: Any) -> bytes:
    """Indented JSON that any reader can parse: "NaN", "Infinity" and "-Infinity" are strings.

    Takes dataclasses, named tuples (as arrays), pydantic models and NumPy scalars as well.
    """
    from pydantic_core import to_json as serialize

    return serialize(value, indent=1, inf_nan_mode="strings", fallback=_plain)


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} is not JSON: {value!r}")


def file_digest(file: Path) -> str:
    """SHA-256 of a file's content, as hex."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
