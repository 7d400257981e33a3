"""An adapter on its way through files, on MLX: saved by mlx-lm's trainer, read from live modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from parity.paths.mlx import live as _mlx
from parity.paths.mlx.live import Setup, to_numpy
from parity.trace import Array, Trace


def save_by_train(setup: Setup, settings: dict[str, Any], folder: Path) -> None:
    """What mlx-lm's `train` leaves, of no iterations: it ends with saving the live adapter.

    Args:
        setup: The live objects; its model is in training mode afterwards.
        settings: What the command line writes beside it, of which loading reads `fine_tune_type`,
            `num_layers` and `lora_parameters`.
        folder: Takes `adapters.safetensors` and `adapter_config.json`.
    """
    from mlx_lm.tuner.trainer import TrainingArgs, train
    from mlx_lm.utils import save_config

    save_config(settings, folder / "adapter_config.json")
    args = TrainingArgs(iters=0, adapter_file=str(folder / "adapters.safetensors"))
    train(setup.model, setup.optimizer, setup.dataset, args=args)


def forward(model: Any, ids: Array) -> Any:
    """Logits (B, T, V) in evaluation mode, evaluated."""
    import mlx.core as mx

    logits = model.eval()(mx.array(ids))
    mx.eval(logits)
    return logits


def round_trip_trace(live: Any, model: Any, ids: Array, folder: Path) -> Trace:
    """See `parity contract round_trip`.

    Args:
        live: Logits of the live model.
        model: The one that the adapter in the folder was loaded into.
        ids: (B, T) int32.
        folder: What was saved.
    """
    import mlx.core as mx

    loaded, modules = forward(model, ids), _mlx.lora_modules(model)
    arrays = {
        "live": to_numpy(live.astype(mx.float32)),
        "loaded": to_numpy(loaded.astype(mx.float32)),
    }
    scalars = {
        "dtype": _mlx.dtype_name(loaded.dtype),
        "scales": {name: float(module.scale) for name, module in modules.items()},
        "files": sorted(str(file.relative_to(folder)) for file in folder.rglob("*")),
    }
    adapter = {
        f"{name}.{factor}": to_numpy(getattr(module, factor))
        for name, module in modules.items()
        for factor in ("lora_a", "lora_b")
    }
    return Trace(arrays, scalars).with_group("adapter", adapter)
