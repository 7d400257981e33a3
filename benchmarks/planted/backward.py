"""Faults on the way back: the forward pass is right, a gradient is not."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from benchmarks.planted.registry import planted
from benchmarks.planted.tools import ChangedAdapter, call, norms, on_way_back
from parity.paths.mlx.path import MlxPath


def changed(change: Callable[[Any], None]) -> type[MlxPath]:
    """A path whose wired model is changed."""

    class Path(ChangedAdapter):
        def change(self, model: Any) -> None:
            change(model)

    return Path


def louder(factor: float) -> Callable[[Any], Any]:
    return on_way_back(lambda gradient: factor * gradient)


@planted(
    "backward",
    "gradient",
    {"1 %": 1.01, "1e-4": 1.0001, "1e-6": 1.000001},
    parts="wiring",
    modules=r"layers\.9\.mlp\.down_proj.*",
)
def down_proj_louder(factor: float) -> type[MlxPath]:
    """The base linear of the down-projection of layer 9 passes on too large a gradient."""

    def change(model: Any) -> None:
        loud = louder(factor)
        call(model.layers[9].mlp.down_proj.linear, lambda own, linear, x: own(loud(x)))

    return changed(change)


@planted(
    "backward",
    "gradient",
    parts="wiring",
    modules=r"layers\.9\.(input|post_attention)_layernorm",
    settings="dtype.activations",
)
def norm_louder() -> type[MlxPath]:
    """A norm of layer 9 passes on twice the gradient."""

    def change(model: Any) -> None:
        loud = louder(2.0)
        call(norms(model.layers[9])[0], lambda own, norm, x: own(loud(x)))

    return changed(change)


@planted(
    "backward",
    "gradient",
    parts="wiring",
    modules=r"layers\.9\.self_attn(\.rope.*)?",
    settings="dtype.activations",
)
def rope_louder() -> type[MlxPath]:
    """The rotary embedding of layer 9 passes on 1.01 times the gradient."""

    def change(model: Any) -> None:
        loud = louder(1.01)
        call(model.layers[9].self_attn.rope, lambda own, rope, x, **k: own(loud(x), **k))

    return changed(change)


@planted(
    "backward",
    "gradient",
    parts="wiring",
    modules=r"layers\.9\.self_attn(\..*)?|between.*",
    settings="dtype.activations",
)
def attention_louder() -> type[MlxPath]:
    """Attention of layer 9 hands its queries too large a gradient."""

    def change(model: Any) -> None:
        loud = louder(1.01)

        def run(own: Any, attention: Any, *args: Any, **kwargs: Any) -> Any:
            module = sys.modules[type(attention).__mro__[1].__module__]
            attend = module.scaled_dot_product_attention
            module.scaled_dot_product_attention = lambda q, *a, **k: attend(loud(q), *a, **k)
            try:
                return own(*args, **kwargs)
            finally:
                module.scaled_dot_product_attention = attend

        call(model.layers[9].self_attn, run)

    return changed(change)


@planted(
    "backward",
    "gradient",
    parts="wiring",
    modules=r"layers\.4(\..*)?|between.*",
    settings="dtype.activations",
)
def residual_stopped() -> type[MlxPath]:
    """No gradient passes through the MLP of layer 4."""
    import mlx.core as mx

    def change(model: Any) -> None:
        call(model.layers[4].mlp, lambda own, mlp, x: own(mx.stop_gradient(x)))

    return changed(change)


@planted(
    "backward",
    "gradient",
    parts="wiring",
    modules=r"layers\.10\.self_attn\.v_proj.*|layers\.10\.self_attn",
)
def values_stopped() -> type[MlxPath]:
    """No gradient passes through the values of layer 10."""
    import mlx.core as mx

    def change(model: Any) -> None:
        call(
            model.layers[10].self_attn.v_proj.linear,
            lambda own, linear, x: own(mx.stop_gradient(x)),
        )

    return changed(change)


@planted("backward", "gradient", parts="wiring", modules=r"layers\.6\.mlp\.gate_proj.*")
def one_adapter_without_gradient() -> type[MlxPath]:
    """`lora_a` of one module gets no gradient."""
    import mlx.core as mx

    def change(model: Any) -> None:
        def run(own: Any, lora: Any, x: Any) -> Any:
            z = (lora.dropout(x) @ mx.stop_gradient(lora.lora_a)) @ lora.lora_b
            return lora.linear(x) + (lora.scale * z).astype(x.dtype)

        call(model.layers[6].mlp.gate_proj, run)

    return changed(change)


@planted(
    "backward",
    "gradient",
    {"1 %": 1.01, "1e-4": 1.0001},
    parts="wiring",
    modules=r"layers\.13\.self_attn\.v_proj.*",
)
def one_lora_b_louder(factor: float) -> type[MlxPath]:
    """`lora_b` of one module gets too large a gradient; nothing is passed on."""

    def change(model: Any) -> None:
        loud = louder(factor)

        def run(own: Any, lora: Any, x: Any) -> Any:
            z = (lora.dropout(x) @ lora.lora_a) @ loud(lora.lora_b)
            return lora.linear(x) + (lora.scale * z).astype(x.dtype)

        call(model.layers[13].self_attn.v_proj, run)

    return changed(change)


@planted(
    "backward",
    "gradient",
    parts="wiring",
    modules=r"layers\.8(\..*)?",
    settings="dtype.activations",
)
def gradient_in_bfloat16() -> type[MlxPath]:
    """What layer 8 passes on is rounded to bfloat16."""
    import mlx.core as mx

    def change(model: Any) -> None:
        rounded = on_way_back(lambda g: g.astype(mx.bfloat16).astype(g.dtype))
        call(model.layers[8], lambda own, layer, x, *a, **k: own(rounded(x), *a, **k))

    return changed(change)


@planted(
    "backward",
    "gradient",
    parts="wiring",
    modules=r"layers\.5(\..*)?",
    settings="dtype.activations",
)
def gradient_clipped_inside() -> type[MlxPath]:
    """What layer 5 passes on is clipped element by element."""
    import mlx.core as mx

    def change(model: Any) -> None:
        clipped = on_way_back(lambda g: mx.clip(g, -1e-3, 1e-3))
        call(model.layers[5], lambda own, layer, x, *a, **k: own(clipped(x), *a, **k))

    return changed(change)


@planted(
    "backward", "gradient", {"1 %": 1.01, "1e-5": 1.00001}, parts="loss", modules=r"the loss|logits"
)
def loss_louder(factor: float) -> type[MlxPath]:
    """The loss is right and its gradient too large."""

    class Path(MlxPath):
        def loss(self, recipe: Any) -> Any:
            inner, loud = super().loss(recipe), louder(factor)

            def loss(model: Any, batch: Any, lengths: Any) -> Any:
                value, tokens = inner(model, batch, lengths)
                return loud(value), tokens

            return loss

    return Path


@planted(
    "backward",
    "gradient",
    parts="wiring",
    modules=r"layers\.2\.self_attn\.k_proj.*|layers\.2\.self_attn",
    settings="dtype.activations",
)
def sign_of_keys() -> type[MlxPath]:
    """The gradient of the keys of layer 2 has the wrong sign."""

    def change(model: Any) -> None:
        turned = on_way_back(lambda g: -g)
        call(model.layers[2].self_attn.k_proj, lambda own, linear, x: turned(own(x)))

    return changed(change)


@planted(
    "backward", "gradient", parts="wiring", modules=r"layers\.\d+\..*", recipe={"lora.rank": 4}
)
def transposed_gradient_mean() -> type[MlxPath]:
    """Every `lora_a` gets a gradient 1 % too small."""

    def change(model: Any) -> None:
        quiet = louder(0.99)
        for _, module in model.named_modules():
            if hasattr(module, "lora_a"):

                def run(own: Any, lora: Any, x: Any) -> Any:
                    z = (lora.dropout(x) @ quiet(lora.lora_a)) @ lora.lora_b
                    return lora.linear(x) + (lora.scale * z).astype(x.dtype)

                call(module, run)

    return changed(change)
