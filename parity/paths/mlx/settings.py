"""A recipe as mlx-lm takes it: its options, optimizer arguments, schedules and widths."""

from __future__ import annotations

from typing import Any

from parity.errors import Unsupported
from parity.recipe import Recipe


def lora_parameters(recipe: Recipe, model: Any) -> dict[str, Any]:
    """mlx-lm's `lora_parameters`, its keys being the names of the modules inside a layer."""
    wanted = set(recipe.lora.target_modules)
    keys = {
        name
        for layer in model.layers
        for name, _ in layer.named_modules()
        if name.rpartition(".")[2] in wanted
    }
    if missing := wanted - {key.rpartition(".")[2] for key in keys}:
        raise Unsupported(f"the model has no modules {sorted(missing)} (lora.target_modules)")
    return {
        "rank": recipe.lora.rank,
        "scale": recipe.lora.scale,
        "dropout": recipe.lora.dropout,
        "keys": sorted(keys),
    }


def optimizer_config(recipe: Recipe) -> dict[str, Any]:
    """Keyword arguments of the optimizer's class."""
    o = recipe.optim
    if o.name == "sgd":
        return {"momentum": o.momentum, "weight_decay": o.weight_decay}
    config: dict[str, Any] = {
        "betas": list(o.betas),
        "eps": o.eps,
        "bias_correction": o.bias_correction,
    }
    if o.name == "adamw":
        config["weight_decay"] = o.weight_decay
    elif o.weight_decay:
        raise Unsupported(f"Adam has no weight decay (optim.weight_decay={o.weight_decay})")
    return config


def one_step(recipe: Recipe) -> Recipe:
    """A recipe for a single gradient: before any clip, without a schedule and without dropout.

    The masks of dropout are drawn from generators that no two frameworks share.
    """
    return recipe.override(
        {
            "train.steps": 1,
            "train.accumulation": 1,
            "optim.schedule": "constant",
            "optim.warmup_steps": 0,
            "optim.clip": "none",
            "lora.dropout": 0.0,
        }
    )


def lr_schedule(recipe: Recipe) -> dict[str, Any] | None:
    """mlx-lm's `lr_schedule`, or None for a constant rate."""
    o, steps = recipe.optim, recipe.train.steps
    decay = max(1, steps - o.warmup_steps)
    if o.schedule == "constant" and not o.warmup_steps:
        return None
    name, arguments = {
        "constant": ("linear_schedule", [o.lr, o.lr, decay]),
        "linear": ("linear_schedule", [o.lr, 0.0, decay]),
        "cosine": ("cosine_decay", [o.lr, decay]),
    }[o.schedule]
    return {"name": name, "arguments": arguments, "warmup": o.warmup_steps}


def pad(ids: Any, lengths: Any, recipe: Recipe) -> Any:
    """A batch of mlx-lm's at the width the recipe asks for."""
    import mlx.core as mx

    multiple, extra = recipe.data.pad_multiple, recipe.data.pad_extra
    if (multiple, extra) == (32, 1):
        return ids
    longest = int(lengths[:, 1].max())
    width = min(extra + -(-longest // multiple) * multiple, recipe.data.max_length)
    cut = ids[:, :width]
    return mx.pad(cut, [(0, 0), (0, width - cut.shape[1])])
