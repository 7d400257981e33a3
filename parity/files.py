"""Files: written whole or not at all; JSON that keeps NaN and infinities."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


def write_atomically(file: Path, content: bytes) -> None:
    """Writes beside the target and renames, so that a kill leaves no half file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
        Path(name).chmod(0o644)
        Path(name).replace(file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


# NaN and infinities are no JSON; they travel as tagged strings, so that other readers can parse
# the file and ours gets the floats back.
_TAG = "float:"


def _tag(value: Any) -> Any:
    if isinstance(value, float) and not np.isfinite(value):
        return f"{_TAG}{float(value)}"
    if isinstance(value, Mapping):
        return {str(key): _tag(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_tag(item) for item in value]
    if isinstance(value, np.generic):
        return _tag(value.item())
    return value


def _untag(value: Any) -> Any:
    if isinstance(value, str) and re.fullmatch(r"float:(nan|inf|-inf)", value):
        return float(value.removeprefix(_TAG))
    if isinstance(value, dict):
        return {key: _untag(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_untag(item) for item in value]
    return value


def dumps(value: Any, **options: Any) -> str:
    """JSON text in which NaN and infinities survive as `"float:nan"` and the like."""
    return json.dumps(_tag(value), ensure_ascii=False, allow_nan=False, **options)


def loads(text: str) -> Any:
    """The inverse of `dumps`."""
    return _untag(json.loads(text))
