"""An adapter saved by mlx-lm's trainer, read back from live modules, and what the model gives with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from parity.paths.mlx import live as _mlx
from parity.paths.mlx.live import Setup, to_numpy
from parity.paths.round_trip import Logits
from parity.trace import Array


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


def forward(model: Any, ids: Array) -> Logits:
    """What a model gives in evaluation mode."""
    import mlx.core as mx

    logits = model.eval()(mx.array(ids))
    return Logits(to_numpy(logits.astype(mx.float32)), _mlx.dtype_name(logits.dtype))


def adapter_of(model: Any) -> tuple[dict[str, Array], dict[str, float]]:
    """A (in, r) and B (r, out) of each module, or (experts, r, in) and (experts, out, r); its scale.

    DoRA's magnitude is (out).
    """
    modules = _mlx.lora_modules(model)
    adapter = {
        f"{name}.{factor}": to_numpy(getattr(module, factor))
        for name, module in modules.items()
        for factor in ("lora_a", "lora_b", "m")
        if factor in module
    }
    return adapter, {name: float(module.scale) for name, module in modules.items()}
