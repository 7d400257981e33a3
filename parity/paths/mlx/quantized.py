"""Quantized models: made by mlx-lm's own functions, kept as a checkpoint, and read back.

`python -m parity.paths.mlx.quantized SOURCE DTYPE MODE BITS GROUP_SIZE FOLDER` makes a checkpoint for a
process that has no MLX; its input may name the modules, as JSON.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from parity.names import canonical
from parity.paths.quantized import by_setting, described, parsed
from parity.recipe import Recipe


def quantize(model: Any, config: dict[str, Any], recipe: Recipe) -> Any:
    """The live model with its weights quantized as the recipe says."""
    from mlx_lm.utils import quantize_model

    wanted = recipe.model
    return quantize_model(model, config, wanted.group_size, wanted.bits, mode=wanted.quantization)[
        0
    ]


def make(
    source: str,
    dtype: str,
    mode: str,
    bits: int,
    group_size: int,
    folder: Path,
    modules: Mapping[str, str] | None = None,
) -> None:
    """Writes a quantized checkpoint by `mlx_lm.convert`, complete or not at all.

    With `modules`, canonical name to setting, these are packed so and no others.
    """
    from mlx_lm import convert

    def packed(path: str, *_: Any) -> bool | dict[str, Any]:
        if canonical(path) not in chosen:
            return False
        own = parsed(chosen[canonical(path)])
        return dict(zip(("mode", "bits", "group_size"), own, strict=True))

    chosen = modules or {}
    if chosen:  # a width that no group divides is judged by this one
        group_size = min(parsed(words)[2] for words in chosen.values())
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = tempfile.mkdtemp(dir=folder.parent)
    made = Path(beside, "checkpoint")
    try:
        convert(
            source, str(made), quantize=True, q_group_size=group_size, q_bits=bits, q_mode=mode,
            dtype=dtype, quant_predicate=packed if modules is not None else None,
        )  # fmt: skip
        if not folder.exists():
            made.replace(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def facts(model: Any) -> dict[str, Any]:
    """What the live modules are quantized with: mode, bits and group size to their canonical names."""
    return {
        "model.quantization": by_setting(
            {
                # an adapted module holds the packed one
                canonical(f"{name}.weight").removesuffix(".weight"): described(
                    module.mode, module.bits, module.group_size
                )
                for name, module in model.named_modules()
                if "scales" in module and hasattr(module, "bits")
            }
        )
    }


def elements(model: Any) -> dict[str, tuple[int, Any]]:
    """Live name of each packed weight to the elements that it stands for and the dtype of its scales."""
    return {
        f"{name}.weight": (module.weight.size * 32 // module.bits, module.scales.dtype)
        for name, module in model.named_modules()
        if "scales" in module and hasattr(module, "bits")
    }


if __name__ == "__main__":
    words = sys.argv[1:]
    text = sys.stdin.read().strip()
    make(
        words[0], words[1], words[2], int(words[3]), int(words[4]), Path(words[5]),
        json.loads(text) if text else None,
    )  # fmt: skip
