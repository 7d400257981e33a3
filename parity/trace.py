"""Traces: named arrays and scalars that one path emitted in one run.

On disk one safetensors file, whose header carries the scalars as JSON. Names are canonical
(`layers.3.self_attn.q_proj.lora_a`), grouped with slashes (`adapter/...`, `batches/ids.0`).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from parity.errors import UsageError

SCHEMA = 1
Array = np.ndarray[Any, np.dtype[Any]]


@dataclass
class Trace:
    """Named NumPy arrays and JSON-able scalars.

    bfloat16 arrays are held as float32 (exact); their dtype is a scalar of the emitting path.
    """

    arrays: dict[str, Array] = field(default_factory=dict)
    scalars: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    file: str = ""
    """Where it was read from."""

    def group(self, prefix: str) -> dict[str, Array]:
        """Arrays below `prefix/`, with the prefix taken off."""
        start = prefix + "/"
        return {k[len(start) :]: v for k, v in self.arrays.items() if k.startswith(start)}

    def with_group(self, prefix: str, arrays: Mapping[str, Array]) -> Trace:
        """A copy with the arrays added below `prefix/`."""
        added = {f"{prefix}/{name}": value for name, value in arrays.items()}
        return Trace({**self.arrays, **added}, dict(self.scalars), dict(self.environment))

    def digest(self) -> str:
        """Content hash (hex, 16 digits) of arrays and scalars; the environment does not count."""
        h = hashlib.sha256(dumps(self.scalars, sort_keys=True).encode())
        for name in sorted(self.arrays):
            value = np.require(self.arrays[name], requirements="C")
            h.update(f"{name}{value.dtype}{value.shape}".encode())
            h.update(value.tobytes())
        return h.hexdigest()[:16]

    def save(self, file: Path) -> None:
        """Writes atomically: a reader sees the whole file or none."""
        from safetensors.numpy import save

        header = {
            "schema": str(SCHEMA),
            "scalars": dumps(self.scalars),
            "environment": dumps(self.environment),
        }
        arrays = {name: np.require(value, requirements="C") for name, value in self.arrays.items()}
        write_atomically(file, save(arrays, metadata=header))

    @classmethod
    def load(cls, file: Path) -> Trace:
        """Reads a trace.

        Raises:
            UsageError: Not a trace, or written by a newer version of this tool.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, framework="numpy") as handle:
                header = handle.metadata() or {}
                arrays = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UsageError(f"{file}: not a trace: {error}") from None
        if "schema" not in header:
            raise UsageError(f"{file}: a safetensors file, but not a trace of `parity capture`")
        if int(header["schema"]) > SCHEMA:
            raise UsageError(
                f"{file}: trace schema {header['schema']} is newer than this tool's {SCHEMA}: "
                "upgrade mlx-parity"
            )
        return cls(arrays, loads(header["scalars"]), loads(header["environment"]), str(file))


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


def canonical(name: str) -> str:
    """One name for a module or parameter, whatever the framework wraps around it.

    `base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight` and
    `model.layers.0.self_attn.q_proj.lora_a` are both `layers.0.self_attn.q_proj.lora_a`.
    """
    name = name.replace(".lora_A.default.weight", ".lora_a")
    name = name.replace(".lora_B.default.weight", ".lora_b")
    name = name.replace(".base_layer", "").replace(".linear.weight", ".weight")
    return re.sub(r"^(?:(?:base_model|model|language_model)\.)+", "", name)


LOGITS = "logits"
"""What the whole model returns, where modules are named."""


def called(name: str, call: int) -> str:
    """The name of a module at its first, second, ... call: `rope`, `rope#2`."""
    return name if call == 1 else f"{name}#{call}"


def layer_of(name: str) -> int | None:
    """Layer index in a canonical name, or None for what stands outside the layers."""
    match = re.match(r"layers\.(\d+)\.", name)
    return int(match[1]) if match else None


def each(arrays: Mapping[str, Array], stem: str) -> Iterator[Array]:
    """`stem.0`, `stem.1`, ... for as long as they exist."""
    index = 0
    while (name := f"{stem}.{index}") in arrays:
        yield arrays[name]
        index += 1
