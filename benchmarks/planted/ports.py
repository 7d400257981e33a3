"""Mistakes of ports: what is got wrong where a model is written again for another framework."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.planted.registry import planted
from benchmarks.planted.tools import ChangedModel, call
from parity.paths.mlx.path import MlxPath


def ported(change: Callable[[Any], None]) -> type[MlxPath]:
    """A path whose base model is changed as it is loaded."""

    class Path(ChangedModel):
        def change(self, model: Any) -> None:
            change(model)

    return Path


def rounded(value: Any) -> Any:
    import mlx.core as mx

    return value.astype(mx.bfloat16).astype(value.dtype)


@planted(
    "forward",
    "logits",
    {"all": tuple(range(18)), "layer 8": (8,)},
    parts="loader",
    modules=r"layers\.[08]\.self_attn(\..*)?",
    model="tiny-llama",
    settings="rope.kind",
)
def rope_interleaved(layers: tuple[int, ...]) -> type[MlxPath]:
    """Rotary embeddings turn neighbours instead of halves."""

    def change(model: Any) -> None:
        for index in layers:
            model.layers[index].self_attn.rope.traditional = True

    return ported(change)


@planted(
    "forward",
    "logits",
    {"1e-3": 1e-3, "1e-5": 1e-5},
    parts="loader",
    modules=r"layers\.6\.input_layernorm",
)
def eps_of_one_norm(eps: float) -> type[MlxPath]:
    """The first norm of layer 6 has another eps."""

    def change(model: Any) -> None:
        model.layers[6].input_layernorm.eps = eps

    return ported(change)


@planted(
    "forward",
    "logits",
    parts="loader",
    modules=r"layers\.9(\.self_attn)?",
    settings="dtype.activations",
)
def sees_one_token_ahead() -> type[MlxPath]:
    """The mask of layer 9 is off by one: a position attends to the next as well."""

    def change(model: Any) -> None:
        import mlx.core as mx

        def run(own: Any, attention: Any, x: Any, mask: Any = None, cache: Any = None) -> Any:
            width = x.shape[1]
            if width == 1 or (cache is not None and cache.offset):
                return own(x, mask, cache)
            return own(x, mx.tri(width, width, 1, dtype=mx.bool_), cache)

        call(model.layers[9].self_attn, run)

    return ported(change)


@planted(
    "forward",
    "logits",
    parts="loader",
    modules=r"layers\.5\.self_attn(\..*)?",
    model="tiny-llama",
    settings="dtype.activations",
)
def groups_tiled() -> type[MlxPath]:
    """In layer 5 key heads are tiled over the query heads instead of repeated."""

    def change(model: Any) -> None:
        import sys

        import mlx.core as mx

        def run(own: Any, attention: Any, *args: Any, **kwargs: Any) -> Any:
            module = sys.modules[type(attention).__mro__[1].__module__]
            kept = module.scaled_dot_product_attention

            def attend(q: Any, k: Any, v: Any, **named: Any) -> Any:
                times = q.shape[1] // k.shape[1]
                k, v = (mx.concatenate([heads] * times, axis=1) for heads in (k, v))
                return kept(q, k, v, **named)

            module.scaled_dot_product_attention = attend
            try:
                return own(*args, **kwargs)
            finally:
                module.scaled_dot_product_attention = kept

        call(model.layers[5].self_attn, run)

    return ported(change)


@planted(
    "forward",
    "logits",
    parts="loader",
    modules=r"layers\.4\.self_attn(\.[qk]_norm)?",
    model="tiny-qwen3",
    settings="dtype.activations",
)
def no_norm_of_queries() -> type[MlxPath]:
    """Layer 4 forgets the norm of its queries."""

    def change(model: Any) -> None:
        call(model.layers[4].self_attn.q_norm, lambda own, norm, x: x)

    return ported(change)


@planted("forward", "logits", parts="loader", modules=r"layers\.5", settings="dtype.activations")
def residual_in_bfloat16() -> type[MlxPath]:
    """What layer 5 hands on is rounded to bfloat16."""

    def change(model: Any) -> None:
        call(model.layers[5], lambda own, layer, *a, **k: rounded(own(*a, **k)))

    return ported(change)


@planted("forward", "logits", parts="loader", modules=r"norm|after.*", settings="dtype.activations")
def logits_rounded_to_bfloat16() -> type[MlxPath]:
    """Logits are rounded to bfloat16 where they leave the model."""

    def change(model: Any) -> None:
        call(model, lambda own, whole, *a, **k: rounded(own(*a, **k)))

    return ported(change)


@planted(
    "forward",
    "logits",
    parts="loader",
    modules=r"layers\.10\.mlp(\..*)?",
    settings="dtype.activations",
)
def gate_and_up_swapped() -> type[MlxPath]:
    """In layer 10 the activation stands at the up-projection instead of the gate."""

    def change(model: Any) -> None:
        mlp = model.layers[10].mlp
        gate, up = mlp.gate_proj.weight, mlp.up_proj.weight

        def run(own: Any, mlp: Any, x: Any) -> Any:
            mlp.gate_proj, mlp.up_proj = mlp.up_proj, mlp.gate_proj
            try:
                return own(x)
            finally:
                mlp.gate_proj, mlp.up_proj = mlp.up_proj, mlp.gate_proj

        assert gate.shape == up.shape
        call(mlp, run)

    return ported(change)


@planted(
    "forward",
    "logits",
    parts="loader",
    modules=r"layers\.2\.(input_layernorm|post_attention_layernorm)",
    settings="dtype.activations",
)
def norm_subtracts_the_mean() -> type[MlxPath]:
    """A norm of layer 2 subtracts the mean, as layer norms do."""

    def change(model: Any) -> None:
        call(
            model.layers[2].input_layernorm,
            lambda own, norm, x: own(x - x.mean(axis=-1, keepdims=True)),
        )

    return ported(change)


@planted("cache", "kv_cache", parts="loop", hints="cache")
def third_turn_one_too_far() -> type[MlxPath]:
    """From the third call with a cache on positions are one too far."""

    class Path(MlxPath):
        def prompt_cache(self, model: Any) -> Any:
            from benchmarks.planted.cache import Entry

            class Late(Entry):
                def update_and_fetch(self, keys: Any, values: Any) -> Any:
                    self.calls += 1
                    return self.inner.update_and_fetch(keys, values)

                @property
                def offset(self) -> Any:
                    return self.inner.offset + (self.calls > 1)

            return [Late(entry) for entry in super().prompt_cache(model)]

    return Path


@planted("harmless", references=("hf",))
def positions_from_one() -> type[MlxPath]:
    """Positions are counted from one: rotary embeddings know distances only."""

    def change(model: Any) -> None:
        for layer in model.layers:
            call(layer.self_attn.rope, lambda own, rope, x, offset=0: own(x, offset=offset + 1))

    return ported(change)
