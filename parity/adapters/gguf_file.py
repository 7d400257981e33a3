"""A GGUF file: its settings and tensors, by the package `gguf`, once its header is known to be sound.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import importlib.util
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from parity.errors import UsageError
from parity.trace import Array

SUFFIX = ".gguf"
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Type of a value to its bytes; 8 is a string, 9 an array."""
_STRING, _ARRAY = 8, 9
_LEAST_FIELD, _LEAST_TENSOR = 13, 24  # bytes that the shortest of each needs


@dataclass(frozen=True)
class Exported:
    """What a GGUF file holds.

    Attributes:
        file: Where it is.
        settings: Key to value.
        tensors: Name to the reader's tensor: shape (slowest dimension last), tensor_type, data.
    """

    file: Path
    settings: Mapping[str, Any]
    tensors: Mapping[str, Any]

    @property
    def architecture(self) -> str:
        """The name of the architecture, empty where there is none."""
        return str(self.settings.get("general.architecture", ""))

    def setting(self, name: str) -> Any:
        """A setting of the architecture, such as `rope.freq_base`; None where there is none."""
        return self.settings.get(f"{self.architecture}.{name}")

    def values(self, name: str) -> Array:
        """A tensor as float32, (out, in) as PyTorch stores it."""
        from gguf.quants import dequantize

        tensor = self.tensors[name]
        shape = tuple(int(n) for n in reversed(tensor.shape))
        values: Array = dequantize(tensor.data, tensor.tensor_type).reshape(shape)
        return values


def read(file: Path) -> Exported:
    """The settings and tensors of a file.

    Raises:
        UsageError: The package is missing; the file is missing, cut off or damaged.
    """
    if importlib.util.find_spec("gguf") is None:
        raise UsageError(f"{file}: reading it needs the package gguf: pip install gguf")
    try:
        with file.open("rb") as stream:
            _check_header(stream, file)
    except OSError as error:
        raise UsageError(f"{file}: cannot be read: {error.strerror}") from None
    import gguf

    try:
        reader = gguf.GGUFReader(file)
        settings = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {tensor.name: tensor for tensor in reader.tensors}
    except Exception as error:  # of any kind, where a file is damaged
        line = " ".join(f"{type(error).__name__}: {error}".split())
        raise UsageError(f"{file}: damaged or cut off: {line}") from None
    if not tensors:
        raise UsageError(f"{file}: holds no tensor")
    return Exported(file, settings, tensors)


def _check_header(stream: BinaryIO, file: Path) -> None:
    """Counts and lengths against the size of the file: the package believes them, and runs for ever."""
    size = file.stat().st_size

    def take(what: str, code: str) -> int:
        read = stream.read(struct.calcsize(code))
        if len(read) < struct.calcsize(code):
            raise UsageError(f"{file}: damaged or cut off: it ends within {what}")
        return int(struct.unpack(code, read)[0])

    def skip(what: str, length: int) -> None:
        if length > size - stream.tell():
            raise UsageError(f"{file}: damaged or cut off: {what} needs {length:,} bytes more")
        stream.seek(length, 1)

    def value(kind: int, what: str) -> None:
        if kind == _STRING:
            skip(what, take(what, "<Q"))
        elif kind == _ARRAY:
            inner, count = take(what, "<I"), take(what, "<Q")
            if inner in _SIZES:
                skip(what, count * _SIZES[inner])
                return
            if inner != _STRING or count * 8 > size:
                raise UsageError(f"{file}: damaged: {what} is {count:,} values of type {inner}")
            for _ in range(count):
                value(inner, what)
        elif kind in _SIZES:
            skip(what, _SIZES[kind])
        else:
            raise UsageError(f"{file}: damaged: {what} has type {kind}, which GGUF does not have")

    if stream.read(4) != b"GGUF":
        raise UsageError(f"{file}: no GGUF file: it does not begin with the letters GGUF")
    if (version := take("its version", "<I")) not in (2, 3):
        raise UsageError(f"{file}: GGUF version {version}: versions 2 and 3 are read")
    tensors, fields = take("its counts", "<Q"), take("its counts", "<Q")
    if tensors * _LEAST_TENSOR + fields * _LEAST_FIELD > size:
        raise UsageError(
            f"{file}: damaged or cut off: {tensors:,} tensors and {fields:,} settings in {size:,} bytes"
        )
    for number in range(fields):
        what = f"setting {number + 1} of {fields}"
        skip(what, take(what, "<Q"))
        value(take(what, "<I"), what)
    for number in range(tensors):
        what = f"tensor {number + 1} of {tensors}"
        skip(what, take(what, "<Q"))
        if (dimensions := take(what, "<I")) > 4:
            raise UsageError(f"{file}: damaged: {what} has {dimensions:,} dimensions, 4 at most")
        skip(what, 8 * dimensions + 4 + 8)
