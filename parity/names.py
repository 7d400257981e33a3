"""One name for each module, parameter and array, whatever a framework calls it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

Value = TypeVar("Value")


def canonical(name: str) -> str:
    """One name for a module or parameter, whatever the framework wraps around it.

    `base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight` and
    `model.layers.0.self_attn.q_proj.lora_a` are both `layers.0.self_attn.q_proj.lora_a`.
    """
    for theirs, ours in _ADAPTER.items():
        name = re.sub(theirs, ours, name)
    name = name.replace(".base_layer", "").replace(".linear.weight", ".weight")
    return re.sub(r"^(?:(?:base_model|model|language_model|backbone)\.)+", "", name)


# What PEFT calls the tensors of its one adapter; embeddings hold bare parameters.
_ADAPTER = {
    r"\.lora_(?:embedding_)?A\.default(?:\.weight)?$": ".lora_a",
    r"\.lora_(?:embedding_)?B\.default(?:\.weight)?$": ".lora_b",
    r"\.lora_magnitude_vector\.default\.weight$": ".m",
}


def is_factor(name: str) -> bool:
    """Whether a tensor is one of LoRA's two matrices."""
    return name.endswith((".lora_a", ".lora_b"))


def inputs_of(lora_a: Any) -> int:
    """How many inputs a module has whose A is (in, r), or of experts (experts, r, in)."""
    return int(lora_a.shape[-1] if lora_a.ndim == 3 else lora_a.shape[0])


LOGITS = "logits"
"""What the whole model returns, where modules are named."""


def called(name: str, call: int) -> str:
    """The name of a module at its first, second, ... call: `rope`, `rope#2`."""
    return name if call == 1 else f"{name}#{call}"


def layer_of(name: str) -> int | None:
    """Layer index in a canonical name, or None for what stands outside the layers."""
    match = re.match(r"layers\.(\d+)\.", name)
    return int(match[1]) if match else None


def each(arrays: Mapping[str, Value], stem: str) -> Iterator[Value]:
    """`stem.0`, `stem.1`, ... for as long as they exist."""
    index = 0
    while (name := f"{stem}.{index}") in arrays:
        yield arrays[name]
        index += 1
