"""Traces: named arrays and scalars that one path emitted in one run.

On disk one safetensors file, whose header carries the scalars as JSON. Names are canonical
(`layers.3.self_attn.q_proj.lora_a`), grouped with slashes (`adapter/...`, `batches/ids.0`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from parity.errors import UsageError
from parity.files import dumps, loads, write_atomically

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
            value = self.arrays[name]
            h.update(f"{name}{_dtype_name(value.dtype)}{value.shape}".encode())
            h.update(np.ascontiguousarray(value).data)
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


_dtype_name = cache(str)  # NumPy takes longer to name a dtype than to hash a small tensor


def first_difference(a: Sequence[int] | Array, b: Sequence[int] | Array) -> int:
    """Index of the first element that differs; the shorter length where one is a prefix."""
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return index
    return min(len(a), len(b))
