"""A recipe as mlx-lm takes it: its options, optimizer arguments, schedules and widths."""

from __future__ import annotations

from typing import Any

from parity.errors import Unsupported
from parity.paths.mlx.quantized import elements
from parity.paths.quantized import NOT_TRAINED
from parity.paths.targets import targets
from parity.recipe import Recipe


def lora_parameters(recipe: Recipe, model: Any) -> dict[str, Any]:
    """mlx-lm's `lora_parameters`.

    Its keys are names of modules: inside of a layer those in it, elsewhere those in the model.

    Raises:
        Unsupported: A target that no module is called, with the names that there are.
    """
    modules = dict(model.named_modules())
    inside = {id(m) for layer in model.layers for _, m in layer.named_modules()}
    names = {n for layer in model.layers for n, _ in layer.named_modules()}
    names |= {n for n, module in modules.items() if id(module) not in inside}
    return {
        "rank": recipe.lora.rank,
        "scale": recipe.lora.scale,
        "dropout": recipe.lora.dropout,
        "keys": targets(recipe, filter(None, names), adaptable(model)),
    }


def as_trained(model: Any, recipe: Recipe) -> Any:
    """A model whose weights were trained and loaded back, these trainable again and no others."""
    if recipe.lora.kind == "full":
        wire(model, recipe)
    return model


def fine_tuning(recipe: Recipe, model: Any) -> dict[str, Any]:
    """mlx-lm's options that say what is trained, for a model with an adapter or without."""
    kind = recipe.lora.kind
    if kind == "full" and elements(model):
        raise Unsupported(NOT_TRAINED)
    return {
        "fine_tune_type": kind,
        "num_layers": recipe.lora.num_layers,
        "lora_parameters": None if kind == "full" else lora_parameters(recipe, model),
    }


def adaptable(model: Any) -> dict[str, bool]:
    """Last parts of the names of the modules that mlx-lm has an adapter for; whether in a layer."""
    import mlx.nn as nn
    from mlx_lm.models import switch_layers

    kinds = [nn.Linear, nn.QuantizedLinear, nn.Embedding, nn.QuantizedEmbedding]
    kinds += [switch_layers.SwitchLinear, switch_layers.QuantizedSwitchLinear]
    layers = {id(module) for layer in model.layers for _, module in layer.named_modules()}
    return {
        name.rpartition(".")[2]: id(module) in layers
        for name, module in model.named_modules()
        if isinstance(module, tuple(kinds)) or hasattr(module, "to_lora")
    }


def wire(model: Any, recipe: Recipe) -> None:
    """Freezes the base and makes trainable what `lora.kind` says, as mlx-lm's command line does.

    Raises:
        Unsupported: More layers than the model has, or what mlx-lm cannot adapt.
    """
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model.freeze()
    count, layers = recipe.lora.num_layers, len(model.layers)
    if count > layers:
        raise Unsupported(f"lora.num_layers={count}, but the model has {layers} layers")
    if recipe.lora.kind == "full":
        fine_tuning(recipe, model)
        for layer in model.layers[-max(count, 0) :]:
            layer.unfreeze()
        return
    parameters = lora_parameters(recipe, model)
    try:
        linear_to_lora_layers(model, count, parameters, use_dora=recipe.lora.kind == "dora")
    except ValueError as error:
        raise Unsupported(f"mlx-lm: {error}") from None


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
