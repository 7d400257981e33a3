"""What of a transformers model is trained: PEFT's configuration of a recipe, or the layers themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from parity import resources
from parity.errors import Unsupported
from parity.names import canonical, layer_of
from parity.paths.hf import conventions, tensors
from parity.paths.quantized import NOT_TRAINED
from parity.paths.targets import targets
from parity.recipe import Recipe

_JOINED = ("gate_proj", "up_proj")
"""Projections of experts that transformers keeps in one tensor, `gate_up_proj`."""


def lora_config(base: Any, recipe: Recipe) -> Any:
    """PEFT's configuration of the recipe's adapter.

    Weights of experts are parameters and no modules: PEFT has a list of its own for them.

    Raises:
        Unsupported: More layers, or other modules, than the model has, or what PEFT has no name for.
    """
    import torch
    from peft import LoraConfig

    lora, layers = recipe.lora, _layers(base, recipe)
    kinds = (torch.nn.Linear, torch.nn.Embedding, torch.nn.Conv1d)
    modules = [name for name, _ in base.named_modules()]
    adaptable = {
        name.rpartition(".")[2]: layer_of(canonical(name)) is not None
        for name, module in base.named_modules()
        if isinstance(module, kinds)
    }
    experts = _experts(base)
    others = {name.rpartition(".")[2]: False for name in experts}
    found = targets(recipe, [*modules, *experts], others | adaptable)
    if joined := sorted(name for name in set(found) & experts.keys() if experts[name] == "joined"):
        raise Unsupported(
            f"PEFT adapts gate and up projection of experts by one adapter of gate_up_proj, "
            f"mlx-lm each by its own: {joined[0]} has no counterpart (lora.target_modules)"
        )
    outside = [name for name in found if layer_of(canonical(name)) is None]
    if outside and lora.num_layers != -1:
        raise Unsupported(
            f"with some layers only (lora.num_layers) PEFT adapts nothing outside of the layers, "
            f"such as {outside[0]} (lora.target_modules)"
        )
    last = None if lora.num_layers == -1 else list(range(layers - lora.num_layers, layers))
    # PEFT applies `layers_to_transform` to modules alone: parameters are named one by one.
    first = last[0] if last else 0
    parameters = [n for n in found if n in experts and (layer_of(canonical(n)) or 0) >= first]
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.scale * lora.rank,
        lora_dropout=lora.dropout,
        use_dora=lora.kind == "dora",
        target_modules=[
            target
            for target in lora.target_modules
            if any(name.rpartition(".")[2] == target for name in set(found) - experts.keys())
        ],
        target_parameters=parameters or None,
        layers_to_transform=last,
    )


def unfrozen(base: Any, recipe: Recipe) -> Any:
    """The model with all weights of its last layers trainable and no others.

    Raises:
        Unsupported: More layers than the model has.
    """
    first = _layers(base, recipe) - recipe.lora.num_layers if recipe.lora.num_layers != -1 else 0
    base.requires_grad_(False)
    if getattr(base, "packed", {}):
        raise Unsupported(NOT_TRAINED)
    source = resources.model_dir(recipe.model.source)
    conventions.apply(base, source, conventions.stored_shapes(Path(source)) or None)
    for name, tensor in tensors.tensors(base).items():
        if (layer := layer_of(name)) is not None and layer >= first:
            tensor.parameter.requires_grad_(True)
    return base


def _layers(base: Any, recipe: Recipe) -> int:
    count = int(base.config.get_text_config().num_hidden_layers)
    if recipe.lora.num_layers > count:
        raise Unsupported(f"lora.num_layers={recipe.lora.num_layers}, the model has {count} layers")
    return count


def _experts(base: Any) -> dict[str, str]:
    """Live name, as a recipe's target would be called, of each weight of experts to how it is kept."""
    found: dict[str, str] = {}
    for name, _ in base.named_parameters():
        if match := tensors.EXPERTS.search(name):
            if match[1] == "gate_up_proj":
                stem = name.rpartition(".")[0]
                found |= {f"{stem}.{half}": "joined" for half in _JOINED}
            else:
                found[name] = "apart"
    return found
