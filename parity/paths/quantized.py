"""Quantized weights as MLX packs them: which checkpoints hold them, and what they are worth.

The weight of element i is q_i * scale + bias of its group of `group_size` elements of a row, q_i an
unsigned integer of `bits` bits (MLX's `affine` mode). In the other modes it is q_i * scale, q_i a number in
four bits (e2m1) or eight (e4m3), the scale one of eight bits: a power of two (e8m0) or e4m3. What is packed
in a row follows each other without gaps, the lowest bits first, in 32-bit words.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from parity import resources
from parity.errors import Unsupported
from parity.recipe import Recipe
from parity.trace import Array

AFFINE = "affine"
PARTS = ("scales", "biases", "global_scale")
"""What stands beside the packed words of a module."""
NOT_TRAINED = (
    "packed weights have no gradient: a quantized model trains an adapter (lora.kind=full)"
)


def settings(folder: str | Path) -> dict[str, Any]:
    """What MLX's quantization of a checkpoint is called in its configuration; empty without one."""
    file = Path(folder, "config.json")
    found = json.loads(file.read_text("utf-8")).get("quantization") if file.is_file() else None
    return dict(found or {})


def computed_in(recipe: Recipe) -> str:
    """The dtype of the weights that are quantized, and so of scales and biases."""
    if recipe.model.weights != "stored":
        return recipe.model.weights
    return "float32" if recipe.model.dtype == "float64" else recipe.model.dtype


def folder(recipe: Recipe, cache: Path) -> Path:
    """Where the quantized checkpoint of a recipe is kept."""
    wanted = recipe.model
    parts = (wanted.quantization, wanted.bits, wanted.group_size, computed_in(recipe))
    name = "-".join(map(str, parts))
    return (
        cache / "quantized" / f"{resources.fingerprint(resources.model_dir(wanted.source))}-{name}"
    )


def words(recipe: Recipe) -> tuple[str, str, str, int, int]:
    """Source, dtype, mode, bits and group size: what a quantized checkpoint is made of."""
    wanted = recipe.model
    source = resources.model_dir(wanted.source)
    return source, computed_in(recipe), wanted.quantization, wanted.bits, wanted.group_size


def dequantized(weight: Array, scales: Array, biases: Array, bits: int, group_size: int) -> Array:
    """Packed words (..., words) of 32 bits as float64 (..., in); exact but for one rounding.

    Args:
        weight: uint32.
        scales: (..., in / group_size), of any float dtype.
        biases: As the scales.
        bits: 1 to 8.
        group_size: Elements that share a scale.
    """
    integers = _integers(weight, bits)
    groups = integers.reshape(*scales.shape, group_size).astype(np.float64)
    values = groups * scales.astype(np.float64)[..., None] + biases.astype(np.float64)[..., None]
    return np.asarray(values.reshape(integers.shape))


def _integers(weight: Array, bits: int) -> Array:
    """Words (..., words) as the integers (..., in) that are packed in them, uint8."""
    words = np.ascontiguousarray(weight).astype("<u4").view(np.uint8)
    return np.packbits(
        np.unpackbits(words, axis=-1, bitorder="little").reshape(*weight.shape[:-1], -1, bits),
        axis=-1,
        bitorder="little",
    )[..., 0]


def _small_floats(exponent: int, mantissa: int) -> Array:
    """What each code of a small float (sign, exponent, mantissa) is worth, without infinities."""
    codes = np.arange(2 ** (1 + exponent + mantissa))
    fraction = (codes % 2**mantissa) / 2**mantissa
    power = codes // 2**mantissa % 2**exponent
    size = np.where(power, 1 + fraction, fraction) * 2.0 ** (
        np.maximum(power, 1) - (2 ** (exponent - 1) - 1)
    )
    return np.asarray(np.where(codes >= len(codes) // 2, -size, size))


E2M1, E4M3 = _small_floats(2, 1), _small_floats(4, 3)
E4M3[[127, 255]] = np.nan
E8M0 = np.append(2.0 ** (np.arange(255) - 127), np.nan)
FLOATS = {"mxfp4": (E2M1, E8M0), "mxfp8": (E4M3, E8M0), "nvfp4": (E2M1, E4M3)}
"""Mode to what the codes of an element and of a scale are worth."""


def dequantized_floats(weight: Array, scales: Array, mode: str, group_size: int) -> Array:
    """As `dequantized`, in one of the modes of `FLOATS`; exact.

    Args:
        weight: uint32 (..., words).
        scales: uint8 (..., in / group_size).
        mode: A key of `FLOATS`.
        group_size: Elements that share a scale.
    """
    elements, factors = FLOATS[mode]
    codes = _integers(weight, len(elements).bit_length() - 1)
    groups = elements[codes].reshape(*scales.shape, group_size)
    return np.asarray((groups * factors[scales][..., None]).reshape(codes.shape))


_KINDS = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "U32": "<u4", "U8": "u1", "I32": "<i4"}


def stored(folder: Path) -> Iterator[tuple[str, Array]]:
    """Each tensor of a checkpoint by name, bfloat16 as float32.

    With NumPy: in a float64 run torch's own reader would take every float32 for a float64.
    """
    from safetensors import deserialize

    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in deserialize(file.read_bytes()):  # type: ignore[no-untyped-call]
            value = np.frombuffer(tensor["data"], _KINDS[tensor["dtype"]])
            if tensor["dtype"] == "BF16":
                value = (value.astype("<u4") << 16).view("<f4")
            yield name, value.reshape(tensor["shape"])


def described(mode: str, bits: int, group_size: int) -> str:
    """What a module is quantized with, in words."""
    return f"{mode}, {bits} bits, groups of {group_size}"


def parsed(words: str) -> tuple[str, int, int]:
    """Mode, bits and group size of `described`."""
    mode, bits, group_size = words.split(", ")
    return mode, int(bits.partition(" ")[0]), int(group_size.rpartition(" ")[2])


def by_setting(modules: Mapping[str, str]) -> dict[str, list[str]] | str:
    """Setting, as `described` has it, to the modules that are quantized so; `none` of no modules.

    Args:
        modules: Canonical name to setting.
    """
    found: dict[str, list[str]] = {}
    for name, words in sorted(modules.items()):
        found.setdefault(words, []).append(name)
    return dict(sorted(found.items())) or "none"


def weights(
    tensors: Mapping[str, Array], quantization: Mapping[str, Any]
) -> Iterator[tuple[str, Array, str]]:
    """Each tensor of a checkpoint: its name, its values, and how it was packed, as `described`, or "".

    Args:
        tensors: By name, as they are stored; bfloat16 as float32.
        quantization: See `settings`; modules that are quantized otherwise are named in it.

    Raises:
        Unsupported: A mode that this module cannot unpack.
    """
    for name, value in tensors.items():
        module, _, last = name.rpartition(".")
        if last in PARTS and f"{module}.scales" in tensors and f"{module}.weight" in tensors:
            continue
        if f"{module}.scales" not in tensors or last != "weight":
            yield name, value, ""
            continue
        own = {**quantization, **(quantization.get(module) or {})}
        mode, scales, size = own.get("mode", AFFINE), tensors[f"{module}.scales"], own["group_size"]
        if f"{module}.global_scale" in tensors:
            raise Unsupported(
                f"{module} has a scale of the whole tensor, which is not unpacked here"
            )
        if mode in FLOATS:
            values = dequantized_floats(value, scales, mode, size)
        elif mode == AFFINE:
            values = dequantized(value, scales, tensors[f"{module}.biases"], own["bits"], size)
        else:
            raise Unsupported(f"weights quantized in mode {mode!r} are not unpacked here")
        yield name, values, described(mode, own["bits"], size)


def made(recipe: Recipe, cache: Path, modules: Mapping[str, str] | None = None) -> Path:
    """The checkpoint that mlx-lm quantizes, in a process of its own: torch and MLX share none.

    Args:
        recipe: Names the model and what it is quantized with.
        cache: Where it is kept.
        modules: Canonical name to setting, as `described` has it: these modules are packed, and no others.

    Raises:
        Unsupported: mlx-lm does not make it.
    """
    place, given = folder(recipe, cache), ""
    if modules is not None:
        given = json.dumps(dict(sorted(modules.items())))
        place = place.with_name(f"{place.name}-{hashlib.sha256(given.encode()).hexdigest()[:16]}")
    if place.exists():
        return place
    command = [sys.executable, "-m", "parity.paths.mlx.quantized", *map(str, words(recipe))]
    done = subprocess.run(
        [*command, str(place)], input=given, capture_output=True, text=True, check=False
    )
    if not place.exists():
        reason = (done.stderr.strip() or done.stdout.strip()).rpartition("\n")[2]
        raise Unsupported(f"no weights quantized by mlx-lm (model.quantization): {reason}")
    return place
