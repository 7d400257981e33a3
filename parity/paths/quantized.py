"""Quantized weights as MLX packs them: which checkpoints hold them, and what they are worth.

The weight of element i is q_i * scale + bias of its group of `group_size` elements of a row, q_i an
unsigned integer of `bits` bits (MLX's `affine` mode). The integers of a row follow each other without
gaps, the lowest bits first, in 32-bit words.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from parity import resources
from parity.errors import Unsupported
from parity.recipe import Recipe
from parity.trace import Array

AFFINE = "affine"
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
    words = np.ascontiguousarray(weight).astype("<u4").view(np.uint8)
    integers = np.packbits(
        np.unpackbits(words, axis=-1, bitorder="little").reshape(*weight.shape[:-1], -1, bits),
        axis=-1,
        bitorder="little",
    )[..., 0]
    groups = integers.reshape(*scales.shape, group_size).astype(np.float64)
    values = groups * scales.astype(np.float64)[..., None] + biases.astype(np.float64)[..., None]
    return np.asarray(values.reshape(integers.shape))


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


def weights(
    tensors: Mapping[str, Array], quantization: Mapping[str, Any]
) -> Iterator[tuple[str, Array, bool]]:
    """Each tensor of a checkpoint: its name, its values, and whether it was packed.

    Args:
        tensors: By name, as they are stored; bfloat16 as float32.
        quantization: See `settings`; modules that are quantized otherwise are named in it.

    Raises:
        Unsupported: A mode that this module cannot unpack.
    """
    for name, value in tensors.items():
        module, _, last = name.rpartition(".")
        if last in ("scales", "biases") and f"{module}.weight" in tensors:
            continue
        if f"{module}.scales" not in tensors or last != "weight":
            yield name, value, False
            continue
        own = {**quantization, **(quantization.get(module) or {})}
        if own.get("mode", AFFINE) != AFFINE:
            raise Unsupported(f"weights quantized in mode {own['mode']!r} are not unpacked here")
        scales, biases = tensors[f"{module}.scales"], tensors[f"{module}.biases"]
        yield name, dequantized(value, scales, biases, own["bits"], own["group_size"]), True
