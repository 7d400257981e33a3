"""Mistakes in how an adapter starts, where it stands and what reaches it."""

from __future__ import annotations

from typing import Any

from benchmarks.planted.registry import planted
from benchmarks.planted.tools import ChangedAdapter, call
from parity.paths.mlx.path import MlxPath


@planted(
    "backward",
    "gradient",
    parts="wiring",
    modules=r"layers\.8\.mlp(\..*)?",
    settings="dtype.activations",
)
def gate_without_gradient() -> type[MlxPath]:
    """No gradient passes through the gate of layer 8."""

    class Path(ChangedAdapter):
        def change(self, model: Any) -> None:
            import mlx.core as mx

            call(model.layers[8].mlp.gate_proj, lambda own, gate, x: mx.stop_gradient(own(x)))

    return Path


@planted(
    "wiring",
    "lora_init",
    parts="wiring",
    hints="lora_scale",
    settings="lora.scale",
)
def scale_by_the_root_of_the_rank() -> type[MlxPath]:
    """The scale is alpha / sqrt(rank), as rsLoRA has it."""

    class Path(MlxPath):
        def wire(self, model: Any, recipe: Any) -> None:
            scale = recipe.lora.scale * recipe.lora.rank**0.5
            super().wire(model, recipe.override({"lora.scale": scale}))

    return Path


@planted("wiring", "lora_init", parts="wiring", modules=r"layers\.\d+\..*lora_[ab]")
def b_is_drawn_and_a_is_zero() -> type[MlxPath]:
    """A starts at zero and B is drawn."""

    class Path(MlxPath):
        def wire(self, model: Any, recipe: Any) -> None:
            import mlx.core as mx

            super().wire(model, recipe)
            for _, module in model.named_modules():
                if hasattr(module, "lora_a"):
                    bound = module.lora_a.shape[0] ** -0.5
                    module.lora_a = mx.zeros_like(module.lora_a)
                    module.lora_b = mx.random.uniform(-bound, bound, module.lora_b.shape)

    return Path


@planted("wiring", "lora_init", parts="wiring", modules=r"layers\.\d+\..*lora_a")
def bound_by_the_rank() -> type[MlxPath]:
    """A is drawn between ±1 / sqrt(rank) instead of ±1 / sqrt(inputs)."""

    class Path(MlxPath):
        def wire(self, model: Any, recipe: Any) -> None:
            super().wire(model, recipe)
            for _, module in model.named_modules():
                if hasattr(module, "lora_a"):
                    inputs, rank = module.lora_a.shape
                    module.lora_a = module.lora_a * (inputs / rank) ** 0.5

    return Path


@planted(
    "wiring",
    "lora_init",
    parts="wiring",
    recipe={"lora.num_layers": 9},
    modules=r"layers\.\d+\..*",
    settings="lora.layers lora.trainable",
)
def first_half_instead_of_last() -> type[MlxPath]:
    """The first nine layers get the adapter instead of the last nine."""

    class Path(MlxPath):
        def wire(self, model: Any, recipe: Any) -> None:
            layers = model.model.layers
            model.model.layers = layers[::-1]
            super().wire(model, recipe)
            model.model.layers = layers

    return Path


@planted("harmless")
def embedding_without_gradient() -> type[MlxPath]:
    """No gradient passes into the embedding, which is frozen."""

    class Path(ChangedAdapter):
        def change(self, model: Any) -> None:
            import mlx.core as mx

            call(
                model.model.embed_tokens,
                lambda own, table, ids: mx.stop_gradient(own(ids)),
            )

    return Path
