"""Tensors of a safetensors file, found from its header. Nothing is allocated before it is checked.

Format: https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from parity.errors import UsageError
from parity.trace import Array

DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2",
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "|u1", "BOOL": "|b1",
    "F8_E4M3": "|u1", "F8_E5M2": "|u1", "F8_E8M0": "|u1",
}  # fmt: skip
"""Name in a header to how NumPy holds its bytes; bfloat16 and 8-bit floats are held as their bits."""
NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""The floats that can be computed with here."""
LONGEST_HEADER = 100_000_000
LONGEST_SETTINGS = 10_000_000


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file, not read yet.

    Attributes:
        name: As it is written in the file.
        dtype: A key of `DTYPES`.
        shape: As it is stored.
        file: Where it is.
        offset: First byte in the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def dtype_name(self) -> str:
        """The dtype as NumPy and the frameworks call it."""
        return NAMES.get(self.dtype, self.dtype)

    @property
    def is_float(self) -> bool:
        """Whether it can be computed with here."""
        return self.dtype in NAMES

    def read(self) -> Array:
        """Its values; bfloat16 as float32, which is exact."""
        stored = np.dtype(DTYPES[self.dtype])
        if not self.size:
            return np.zeros(self.shape, stored)
        raw = np.memmap(self.file, stored, "r", self.offset, self.shape)
        if self.dtype == "BF16":
            return (raw.astype(np.uint32) << 16).view(np.float32)
        return np.array(raw)


def tensors_of(file: Path) -> dict[str, Tensor]:
    """The tensors that a safetensors file holds, by name.

    Raises:
        UsageError: It is cut off, damaged, or no such file.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, LONGEST_HEADER):
                raise UsageError(
                    f"{file}: not a whole safetensors file: its header should have {length:,} bytes, "
                    f"the file has {size:,}"
                )
            text = stream.read(length)
    except OSError as error:
        raise UsageError(f"{file}: cannot be read: {error.strerror}") from None
    header = _object(text, f"{file}: its header")
    start, found = 8 + length, dict[str, Tensor]()
    ends = list[tuple[int, int, str]]()
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype, shape, begin, end = _entry(file, name, entry)
        found[name] = Tensor(name, dtype, shape, file, start + begin)
        ends.append((begin, end, name))
    at = 0
    for begin, end, name in sorted(ends):
        if begin != at:
            raise UsageError(
                f"{file}: damaged: tensor {shown(name)} starts at byte {begin:,}, not at {at:,}"
            )
        at = end
    if start + at != size:
        raise UsageError(
            f"{file}: damaged or cut off: its tensors need {start + at:,} bytes, it has {size:,}"
        )
    return found


def _entry(file: Path, name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    where = f"{file}: damaged: tensor {shown(name)}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise UsageError(f"{where} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UsageError(f"{where} has dtype {json.dumps(dtype)}, which is none of safetensors'")
    for what, numbers in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(numbers, list) or not all(type(n) is int and n >= 0 for n in numbers):
            raise UsageError(f"{where} has {what} {_short(numbers)}")
    needed = math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
    if len(offsets) != 2 or offsets[1] - offsets[0] != needed:
        raise UsageError(
            f"{where}, {dtype} of shape {_short(shape)}, needs {_count(needed)} bytes, its "
            f"data_offsets are {_short(offsets)}"
        )
    return dtype, tuple(shape), offsets[0], offsets[1]


def read_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UsageError: It cannot be read, is not JSON, not an object, or has a key twice.
    """
    try:
        if file.stat().st_size > LONGEST_SETTINGS:
            raise UsageError(f"{file}: {file.stat().st_size:,} bytes are too many for settings")
        text = file.read_bytes()
    except OSError as error:
        raise UsageError(f"{file}: cannot be read: {error.strerror}") from None
    return _object(text, str(file))


def _object(text: bytes, where: str) -> dict[str, Any]:
    twice = list[str]()

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in items]
        twice.extend(name for name in dict.fromkeys(names) if names.count(name) > 1)
        return dict(items)

    def once(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        return found if len(found) == len(items) else pairs(items)

    try:
        value = json.loads(text.decode(), object_pairs_hook=once)
        json.dumps(value, ensure_ascii=False).encode()  # lone surrogates are no text
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where} is not JSON: {error}") from None
    if twice:
        raise UsageError(f"{where} has the key {shown(twice[0])} twice")
    if not isinstance(value, dict):
        raise UsageError(f"{where} holds {_kind(value)}, not an object")
    return value


def _kind(value: Any) -> str:
    kinds = {list: "a list", str: "a string", type(None): "null", bool: "true or false"}
    return kinds.get(type(value), "a number")


def shown(name: str) -> str:
    """A name as a message has it, on one line."""
    short = name if len(name) <= 200 else f"{name[:200]}…"
    return short if short.isprintable() and short else repr(short)


def _short(value: Any) -> str:
    try:
        return shown(json.dumps(value))
    except ValueError:  # a number of thousands of digits
        return "with a number too large to print"


def _count(number: int) -> str:
    return f"{number:,}" if number < 10**30 else "too many"
