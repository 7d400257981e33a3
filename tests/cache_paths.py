"""Paths whose KV cache is wrong in one way, for the tests of probe 10."""

from __future__ import annotations

from parity.paths.hf.path import HfPath
from parity.paths.mlx.path import MlxPath


class Wrapped:
    """A cache entry with something else done to it."""

    def __init__(self, inner):
        self.inner = inner
        self.calls = 0

    def __getattr__(self, name):
        return getattr(self.inner, name)


class Shifted(Wrapped):
    """From the second call on positions are one too far."""

    @property
    def offset(self):
        return self.inner.offset + (self.inner.offset > 0)


class Forgetful(Wrapped):
    """What the second call brings is seen by that call and then lost."""

    def update_and_fetch(self, keys, values):
        import copy

        self.calls += 1
        inner = copy.copy(self.inner) if self.calls == 2 else self.inner
        return inner.update_and_fetch(keys, values)


class ShiftedCache(MlxPath):
    """Rope goes on one position too far after the first turn."""

    name = "shifted-cache"

    def prompt_cache(self, model):
        return [Shifted(entry) for entry in super().prompt_cache(model)]


class StaleCache(MlxPath):
    """The second turn is not appended."""

    name = "stale-cache"

    def prompt_cache(self, model):
        return [Forgetful(entry) for entry in super().prompt_cache(model)]


class UncutCache(MlxPath):
    """Sliding layers keep everything and attend to all of it."""

    name = "uncut-cache"

    def prompt_cache(self, model):
        from mlx_lm.models.cache import KVCache

        class Uncut(KVCache):
            def make_mask(self, tokens, window_size=None, **options):
                return super().make_mask(tokens, window_size=None, **options)

        return [Uncut() for _ in model.layers]


class StaleTorchCache(HfPath):
    """The second turn is not appended."""

    name = "stale-torch-cache"

    def prompt_cache(self, model):
        from transformers import DynamicCache

        class Forgetful(DynamicCache):
            def update(self, keys, values, layer_idx, *args, **kwargs):
                import copy

                layer = self.layers[layer_idx]
                self.calls = getattr(self, "calls", {})
                self.calls[layer_idx] = self.calls.get(layer_idx, 0) + 1
                if self.calls[layer_idx] == 2:
                    return copy.copy(layer).update(keys, values)
                return super().update(keys, values, layer_idx, *args, **kwargs)

        return Forgetful(config=model.config)
