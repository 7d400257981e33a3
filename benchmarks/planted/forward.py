"""Faults in what a base model computes: weights as loaded, and each kind of module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.planted.registry import LAYERS, planted
from benchmarks.planted.tools import ChangedAdapter, ChangedModel, call, norms
from parity.paths.mlx.path import MlxPath


def changed(change: Callable[[Any], None]) -> type[MlxPath]:
    """A path whose base model is changed as it is loaded."""

    class Path(ChangedModel):
        def change(self, model: Any) -> None:
            change(model)

    return Path


@planted(
    "forward",
    "logits",
    {"50 %": 1.5, "1e-2": 1.01, "1e-4": 1.0001, "1e-6": 1.000001},
    parts="loader",
    modules=r"layers\.7\.mlp\.up_proj",
)
def one_row_of_up_proj(factor: float) -> type[MlxPath]:
    """One row of the up-projection of layer 7 is scaled."""
    import mlx.core as mx

    def change(model: Any) -> None:
        up = model.layers[7].mlp.up_proj
        rows = mx.arange(up.weight.shape[0])[:, None]
        up.weight = mx.where(rows == 3, factor * up.weight, up.weight)

    return changed(change)


@planted(
    "forward",
    "logits",
    {"layer 5": (5,), "all layers": tuple(range(LAYERS))},
    parts="loader",
    modules=r"layers\.(5|0)\.self_attn(\.rope.*)?",
    hints="rope",
    settings="rope.theta rope.frequencies",
)
def rope_base_doubled(layers: tuple[int, ...]) -> type[MlxPath]:
    """The base of the rotary embedding is doubled."""

    def change(model: Any) -> None:
        for layer in layers:
            rope = model.layers[layer].self_attn.rope
            rope.base = 2 * rope.base

    return changed(change)


@planted(
    "forward",
    "logits",
    {"1 %": 1.01, "1e-5": 1.00001},
    parts="loader",
    modules=r"layers\.11\.self_attn.*",
)
def attention_scale(factor: float) -> type[MlxPath]:
    """Attention of layer 11 divides by another root."""

    def change(model: Any) -> None:
        attention = model.layers[11].self_attn
        attention.scale = factor * attention.scale

    return changed(change)


@planted(
    "forward",
    "logits",
    {"1e-2": 1e-2, "1e-5": 1e-5},
    parts="loader",
    modules=r"layers\.4\.(input|post_attention)_layernorm",
)
def norm_offset(amount: float) -> type[MlxPath]:
    """An offset is added to the weight of one norm of layer 4."""

    def change(model: Any) -> None:
        norm = norms(model.layers[4])[0]
        norm.weight = norm.weight + amount

    return changed(change)


@planted(
    "forward",
    "logits",
    {"1e-3": 1e-3, "1e-5": 1e-5},
    parts="loader",
    modules=r"layers\.[01]\..*norm.*|norm",
)
def norm_eps(eps: float) -> type[MlxPath]:
    """All norms have another eps."""

    def change(model: Any) -> None:
        for _, module in model.named_modules():
            if hasattr(module, "eps"):
                module.eps = eps

    return changed(change)


@planted("forward", "logits", parts="loader", modules=r"layers\.2(\..*)?")
def layers_swapped() -> type[MlxPath]:
    """Layers 2 and 3 have changed places in their MLP weights."""

    def change(model: Any) -> None:
        second, third = model.layers[2].mlp, model.layers[3].mlp
        one, other = second.parameters(), third.parameters()
        second.update(other)
        third.update(one)

    return changed(change)


@planted("forward", "logits", parts="loader", modules=r"embed_tokens|layers\.0(\..*)?", settings="")
def embedding_row() -> type[MlxPath]:
    """One row of the embedding, and so of the tied head, is scaled."""
    import mlx.core as mx

    def change(model: Any) -> None:
        table = model.model.embed_tokens
        rows = mx.arange(table.weight.shape[0])[:, None]
        table.weight = mx.where(rows == 300, 1.1 * table.weight, table.weight)

    return changed(change)


@planted(
    "forward",
    "logits",
    {"bfloat16": "bfloat16", "float16": "float16"},
    parts="loader",
    modules=r"embed_tokens|layers\.0(\..*)?",
)
def weights_rounded(dtype: str) -> type[MlxPath]:
    """Weights are rounded to 16 bits and cast back."""
    import mlx.core as mx

    def change(model: Any) -> None:
        model.set_dtype(getattr(mx, dtype))
        model.set_dtype(mx.float32)

    return changed(change)


@planted(
    "forward", "logits", parts="loader", modules=r"layers\.3\.mlp(\..*)?|between layers\.3\.mlp.*"
)
def another_activation() -> type[MlxPath]:
    """The MLP of layer 3 uses ReLU between its projections."""

    def change(model: Any) -> None:
        import mlx.nn as nn

        def run(own: Any, mlp: Any, x: Any) -> Any:
            return mlp.down_proj(nn.relu(mlp.gate_proj(x)) * mlp.up_proj(x))

        call(model.layers[3].mlp, run)

    return changed(change)


@planted("forward", "logits", parts="loader", modules=r"layers\.6\.self_attn(\..*)?")
def heads_averaged() -> type[MlxPath]:
    """In layer 6 one key head has the values of another."""

    def change(model: Any) -> None:
        attention = model.layers[6].self_attn
        weight = attention.v_proj.weight
        attention.v_proj.weight = weight[::-1]

    return changed(change)


@planted(
    "forward",
    "logits",
    parts="loader",
    modules=r"layers\.\d+(\.self_attn.*)?|between.*",
    model="tiny-gemma3",
)
def window_ignored() -> type[MlxPath]:
    """Sliding layers attend to everything."""

    def change(model: Any) -> None:
        model.model.window_size = 4096

    return changed(change)


@planted(
    "forward",
    "logits",
    parts="loader",
    modules=r"layers\.12(\..*)?|between.*",
    settings="dtype.activations",
)
def residual_lost() -> type[MlxPath]:
    """Layer 12 forgets a thousandth of what went past it."""

    def change(model: Any) -> None:
        call(model.layers[12], lambda own, layer, x, *a, **k: own(x, *a, **k) - 1e-3 * x)

    return changed(change)


@planted("forward", "logits", parts="loader", modules=r"norm|after.*", settings="dtype.activations")
def final_norm_scaled() -> type[MlxPath]:
    """The last norm is scaled by 1.002."""

    def change(model: Any) -> None:
        call(model.model.norm, lambda own, norm, x: 1.002 * own(x))

    return changed(change)


@planted(
    "forward",
    "logits",
    parts="loader",
    modules=r"layers\.9(\..*)?|between.*",
    settings="dtype.activations",
)
def attends_to_the_future() -> type[MlxPath]:
    """Layer 9 attends without a causal mask."""

    def change(model: Any) -> None:
        call(
            model.layers[9].self_attn,
            lambda own, attention, x, mask=None, cache=None, **k: own(x, None, cache, **k),
        )

    return changed(change)


@planted(
    "forward",
    "gradient",
    {"10 %": 1.1, "1e-4": 1.0001},
    parts="wiring",
    modules=r"layers\.7\.self_attn\.q_proj.*",
    hints="lora_scale",
    settings="dtype.activations",
)
def scale_of_one_adapter(factor: float) -> type[MlxPath]:
    """One adapter multiplies by another scale than it says."""

    class Path(ChangedAdapter):
        def change(self, model: Any) -> None:
            def run(own: Any, lora: Any, x: Any) -> Any:
                base = lora.linear(x)
                return base + factor * (own(x) - base)

            call(model.layers[7].self_attn.q_proj, run)

    return Path
