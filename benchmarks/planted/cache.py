"""Faults in the KV cache and in decoding."""

from __future__ import annotations

import copy
from typing import Any

from benchmarks.planted.registry import planted
from parity.paths.mlx.path import MlxPath


class Entry:
    """A cache entry with something else done to it."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.calls = inner, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def cached(kind: type[Entry]) -> type[MlxPath]:
    """A path whose cache entries are wrapped."""

    class Path(MlxPath):
        def prompt_cache(self, model: Any) -> Any:
            return [kind(entry) for entry in super().prompt_cache(model)]

    return Path


@planted("cache", "kv_cache", parts="loop", hints="cache")
def positions_one_too_far() -> type[MlxPath]:
    """From the second call on positions are one too far."""

    class Shifted(Entry):
        @property
        def offset(self) -> Any:
            return self.inner.offset + (self.inner.offset > 0)

    return cached(Shifted)


@planted("cache", "kv_cache", parts="loop", hints="cache")
def second_turn_lost() -> type[MlxPath]:
    """What the second call brings is seen by that call and then lost."""

    class Forgetful(Entry):
        def update_and_fetch(self, keys: Any, values: Any) -> Any:
            self.calls += 1
            inner = copy.copy(self.inner) if self.calls == 2 else self.inner
            return inner.update_and_fetch(keys, values)

    return cached(Forgetful)


@planted("cache", "kv_cache", parts="loop")
def keys_in_bfloat16() -> type[MlxPath]:
    """Keys are kept in bfloat16."""

    class Rounded(Entry):
        def update_and_fetch(self, keys: Any, values: Any) -> Any:
            import mlx.core as mx

            rounded = keys.astype(mx.bfloat16).astype(keys.dtype)
            return self.inner.update_and_fetch(rounded, values)

    return cached(Rounded)


@planted("cache", "kv_cache", {"1e-2": 1.01, "1e-4": 1.0001}, parts="loop")
def values_scaled(factor: float) -> type[MlxPath]:
    """Values that come out of the cache are scaled."""

    class Scaled(Entry):
        def update_and_fetch(self, keys: Any, values: Any) -> Any:
            keys, values = self.inner.update_and_fetch(keys, values)
            return keys, factor * values

    return cached(Scaled)


@planted("cache", "kv_cache", parts="loop", model="tiny-gemma3", hints="cache")
def window_never_cut() -> type[MlxPath]:
    """Sliding layers keep everything and attend to all of it."""

    class Path(MlxPath):
        def prompt_cache(self, model: Any) -> Any:
            from mlx_lm.models.cache import KVCache

            class Uncut(KVCache):  # type: ignore[misc]
                def make_mask(self, tokens: Any, window_size: Any = None, **options: Any) -> Any:
                    return super().make_mask(tokens, window_size=None, **options)

            return [Uncut() for _ in model.layers]

    return Path


@planted("cache", "kv_cache", parts="loop", model="tiny-gemma3", hints="cache")
def window_one_short() -> type[MlxPath]:
    """Sliding layers keep one token less than their window."""

    class Path(MlxPath):
        def prompt_cache(self, model: Any) -> Any:
            from mlx_lm.models.cache import RotatingKVCache

            return [
                RotatingKVCache(max_size=entry.max_size - 1)
                if isinstance(entry, RotatingKVCache)
                else entry
                for entry in super().prompt_cache(model)
            ]

    return Path


@planted("cache", "greedy_decode", parts="loop")
def decodes_without_the_adapter() -> type[MlxPath]:
    """Decoding halves the scale of the adapter."""

    class Path(MlxPath):
        def decode(self, recipe: Any, inputs: Any) -> Any:
            return super().decode(recipe.override({"lora.scale": recipe.lora.scale / 2}), inputs)

    return Path
