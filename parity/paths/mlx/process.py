"""What a process on MLX imports before any path runs in it."""

from __future__ import annotations

import importlib

MODULES = ("mlx.nn", "mlx.optimizers", "mlx_lm.lora", "mlx_lm.generate")
"""What every path on MLX uses."""


def prepare() -> None:
    """Imports MLX and mlx-lm as far as every path on them uses them."""
    for module in MODULES:
        importlib.import_module(module)
