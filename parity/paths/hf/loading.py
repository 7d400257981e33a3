"""The base model in torch: from a checkpoint, or from what a quantized one is worth."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from parity import resources
from parity.errors import Unsupported
from parity.names import canonical
from parity.paths import quantized
from parity.paths.hf import conventions, tensors
from parity.paths.hf import live as _torch
from parity.recipe import Recipe
from parity.trace import Array

OPTIONS = {"attn_implementation": "eager", "experts_implementation": "eager"}
"""sdpa dropped Gemma 2's soft-capping in 4.57; grouped products of experts have no float64."""


def load(recipe: Recipe, cache: Path) -> Any:
    """The base model with eager attention and experts.

    Torch has no product with MLX's packed weights: it computes with what they are worth.

    Raises:
        Unsupported: float64 on a device without it; quantized weights that cannot be had.
        RuntimeError: Weights that are not in the checkpoint.
    """
    import torch

    device, dtype = _torch.device(), getattr(torch, recipe.model.dtype)
    if device.type == "mps" and dtype is torch.float64:
        raise Unsupported("MPS has no float64")
    source = resources.model_dir(recipe.model.source)
    packed = bool(quantized.settings(source))
    if packed and recipe.model.quantization != "stored":
        raise Unsupported(
            f"the checkpoint is quantized already (model.quantization={recipe.model.quantization})"
        )
    model = _empty(source, dtype) if packed else _loaded(source, dtype)
    if recipe.model.weights != "stored" and not packed:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(getattr(torch, recipe.model.weights)).to(dtype)
    if packed:
        conventions.apply(model, source, conventions.live_shapes(model))
        _fill(model, _values(Path(source), recipe), every=True)
    elif recipe.model.quantization != "stored":
        _fill(model, _values(quantized.made(recipe, cache), recipe), every=False)
    return model.to(device).eval()


def _loaded(source: str, dtype: Any) -> Any:
    from transformers import AutoModelForCausalLM

    file = {"gguf_file": name} if (name := resources.exported(source)) else {}
    model, report = AutoModelForCausalLM.from_pretrained(
        source, dtype=dtype, output_loading_info=True, **OPTIONS, **file
    )
    # transformers fills them with random numbers and goes on
    if absent := sorted(report["missing_keys"]):
        raise RuntimeError(f"{len(absent)} weights are not in the checkpoint: {absent[0]}, ...")
    return model


def _empty(source: str, dtype: Any) -> Any:
    """A model of a configuration, without MLX's quantization, which transformers does not know."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    config = AutoConfig.from_pretrained(source)
    for name in ("quantization", "quantization_config"):
        if hasattr(config, name):
            delattr(config, name)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, **OPTIONS)
    if Path(source, "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(source)
    return model


def _values(folder: Path, recipe: Recipe) -> dict[str, tuple[Array, str]]:
    """Canonical name → values in float64 if they were packed, and how they were."""
    import torch

    dtype = getattr(torch, quantized.computed_in(recipe))

    def rounded(value: Array) -> Array:
        if value.dtype.kind != "f":
            return value
        return np.asarray(torch.tensor(value).to(dtype).double().numpy())

    stored = {name: rounded(value) for name, value in quantized.stored(folder)}
    found = quantized.weights(stored, quantized.settings(folder))
    return {canonical(name): (value, packed) for name, value, packed in found}


def _fill(model: Any, values: Mapping[str, tuple[Array, str]], every: bool) -> None:
    """Writes values into a model: those that were packed, or every one.

    How each was packed is kept with the model: they cannot be trained.
    """
    live = tensors.tensors(model)
    wanted = {name: value for name, (value, packed) in values.items() if every or packed}
    if every:
        tensors.check_names(live, wanted)
    elif lone := sorted(wanted.keys() - live.keys()):
        raise Unsupported(f"transformers has no weight {lone[0]!r} (model.quantization)")
    for name, value in wanted.items():
        live[name].write(value)
    packed = {name.removesuffix(".weight"): how for name, (_, how) in values.items() if how}
    model.packed = packed
