"""Paths that are off in a way which a floor measured on the path itself would excuse."""

from __future__ import annotations

import numpy as np

from parity.paths.mlx.kv_cache import kv_cache_trace
from parity.paths.mlx.path import MlxPath


class LeakyFuture(MlxPath):
    """Every position sees the whole sequence."""

    name = "leaky-future"

    def kv_cache(self, recipe, inputs):
        import sys

        model = self.setup(recipe, inputs.group("adapter")).model.eval()
        module = sys.modules[type(model.layers[0]).__module__]
        original = module.create_attention_mask
        module.create_attention_mask = lambda *args, **options: None
        try:
            return kv_cache_trace(model, self.prompt_cache, inputs)
        finally:
            module.create_attention_mask = original


class DropoutLeftOn(MlxPath):
    """The model stays in training mode when it is decoded with."""

    name = "dropout-left-on"

    def kv_cache(self, recipe, inputs):
        model = self.setup(recipe, inputs.group("adapter")).model.train()
        return kv_cache_trace(model, self.prompt_cache, inputs)


class WideMargins(MlxPath):
    """The tokens are right, the margins by which they win are not."""

    name = "wide-margins"

    def decode(self, recipe, inputs):
        trace = super().decode(recipe, inputs)
        for name in [name for name in trace.arrays if name.startswith("margin.")]:
            trace.arrays[name] = trace.arrays[name] + np.float32(2)
        return trace


class OtherTokens(WideMargins):
    """The margins are off by 2, and the second token is another one."""

    name = "other-tokens"

    def decode(self, recipe, inputs):
        trace = super().decode(recipe, inputs)
        last = len(inputs.scalars["prompts"]) - 1
        if len(trace.arrays[f"ids.{last}"]) > 1:
            trace.arrays[f"ids.{last}"][1] += 1
        return trace


class ChangedAdapter(MlxPath):
    """The loop ends with one module's adapter 5 % too large; no loss shows it."""

    name = "changed-adapter"

    def loop(self, recipe, setup, batches):
        result = super().loop(recipe, setup, batches)
        module = setup.model.layers[7].mlp.up_proj
        module.lora_b = 1.05 * module.lora_b
        return result


class Unrepeatable(MlxPath):
    """Another gradient each time, by rounding."""

    name = "unrepeatable"
    size = 2.0**-23

    def gradient(self, recipe, inputs):
        trace = super().gradient(recipe, inputs)
        rng = np.random.default_rng()
        for name, value in trace.group("gradient").items():
            moved = value * (1 + self.size * rng.choice([-1, 0, 1], value.shape))
            trace.arrays[f"gradient/{name}"] = moved.astype(np.float32)
        return trace


class Random(Unrepeatable):
    """Another gradient each time, by far more than rounding."""

    name = "random"
    size = 0.05
