"""Faults in the adapter as it is put into the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.planted.registry import planted
from benchmarks.planted.tools import ChangedAdapter
from parity.paths.mlx.path import MlxPath


def adapters(model: Any) -> list[Any]:
    return [module for _, module in model.named_modules() if hasattr(module, "lora_a")]


def changed(change: Callable[[Any], None]) -> type[MlxPath]:
    """A path whose wired model is changed."""

    class Path(ChangedAdapter):
        def change(self, model: Any) -> None:
            change(model)

    return Path


def asked(**factors: Any) -> type[MlxPath]:
    """A path that wires another recipe than it is given."""

    class Path(MlxPath):
        def wire(self, model: Any, recipe: Any) -> None:
            changes = {name.replace("__", "."): value for name, value in factors.items()}
            super().wire(model, recipe.override(changes))

    return Path


@planted(
    "wiring",
    "lora_init",
    {"2": 2.0, "1.001": 1.001},
    parts="wiring",
    hints="lora_scale",
    settings="lora.scale",
)
def scale_times(factor: float) -> type[MlxPath]:
    """All adapters have another scale."""

    class Path(MlxPath):
        def wire(self, model: Any, recipe: Any) -> None:
            super().wire(model, recipe.override({"lora.scale": factor * recipe.lora.scale}))

    return Path


@planted(
    "wiring",
    "lora_init",
    parts="wiring",
    settings="lora.rank lora.parameters dtype.adapter",
    recipe={"lora.rank": 8},
)
def rank_halved() -> type[MlxPath]:
    """The rank is 4 instead of 8."""
    return asked(lora__rank=4)


@planted(
    "wiring",
    "lora_init",
    parts="wiring",
    hints="last_layers",
    modules=r"layers\.[01]\..*",
    settings="lora.layers lora.trainable lora.parameters dtype.adapter seed.rng",
)
def last_sixteen() -> type[MlxPath]:
    """Only the last 16 layers get an adapter."""
    return asked(lora__num_layers=16)


@planted(
    "wiring",
    "lora_init",
    parts="wiring",
    modules=r".*k_proj.*",
    settings="lora.modules lora.trainable lora.parameters dtype.adapter seed.rng",
)
def no_keys() -> type[MlxPath]:
    """k_proj gets no adapter."""
    return asked(
        lora__target_modules=["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )


@planted("wiring", "lora_init", parts="wiring", modules=r"layers\.\d+\..*lora_a")
def one_tensor_of_zeros() -> type[MlxPath]:
    """One `lora_a` is zero."""
    import mlx.core as mx

    def change(model: Any) -> None:
        one = adapters(model)[40]
        one.lora_a = mx.zeros_like(one.lora_a)

    return changed(change)


@planted("wiring", "lora_init", parts="wiring", modules=r"layers\.\d+\..*lora_a")
def three_at_half() -> type[MlxPath]:
    """Three `lora_a` are drawn half as wide."""

    def change(model: Any) -> None:
        for one in adapters(model)[10:13]:
            one.lora_a = one.lora_a / 2

    return changed(change)


@planted(
    "wiring",
    "lora_init",
    parts="wiring",
    modules=r"layers\.\d+\..*lora_a",
    settings="seed.rng",
)
def normal_instead_of_uniform() -> type[MlxPath]:
    """A is drawn from a normal distribution of the same width."""
    import mlx.core as mx

    def change(model: Any) -> None:
        for one in adapters(model):
            wide = one.lora_a.shape[0] ** -0.5 / 3**0.5
            one.lora_a = wide * mx.random.normal(one.lora_a.shape)

    return changed(change)


@planted("wiring", "lora_init", {"1e-2": 1e-2, "1e-6": 1e-6}, parts="wiring", modules=r".*lora_b")
def b_not_zero(amount: float) -> type[MlxPath]:
    """One `lora_b` does not start at zero."""

    def change(model: Any) -> None:
        one = adapters(model)[5]
        one.lora_b = one.lora_b + amount

    return changed(change)


@planted(
    "wiring",
    "lora_init",
    parts="wiring loop",
    hints="seed_placement repeats",
    references=("mlx-lm",),
    settings="seed.rng seed.value seed.placement",
    modules=r".*lora_a",
)
def seed_ignored() -> type[MlxPath]:
    """The adapter is drawn from seed 0, whatever is asked."""

    class Path(MlxPath):
        def seed(self, recipe: Any) -> None:
            super().seed(recipe.override({"seed.value": 0, "seed.data": recipe.seed.value}))

    return Path


@planted(
    "wiring",
    "lora_init",
    parts="wiring",
    settings="lora.trainable lora.parameters lora.kind lora.modules dtype.parameters dtype.adapter",
    modules=r".*norm.*",
)
def norm_left_trainable() -> type[MlxPath]:
    """One norm of the base is trained as well."""

    def change(model: Any) -> None:
        model.model.norm.unfreeze()

    return changed(change)


@planted("wiring", "lora_init", parts="wiring", hints="silent_cast", settings="dtype.adapter")
def adapter_in_bfloat16() -> type[MlxPath]:
    """The adapter is kept in bfloat16."""
    import mlx.core as mx

    def change(model: Any) -> None:
        for one in adapters(model):
            one.lora_a, one.lora_b = one.lora_a.astype(mx.bfloat16), one.lora_b.astype(mx.bfloat16)

    return changed(change)
