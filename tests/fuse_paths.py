"""Paths whose fuse does something else than it should, each in one way that people have reported."""

from __future__ import annotations

from parity.paths.mlx import MlxPath


class NothingFused(MlxPath):
    """The base is what comes out (mlx-examples#396)."""

    def merged(self, recipe, folder, dequantize):
        return self.base(recipe)[0]


class LostWhereQuantized(MlxPath):
    """The adapter is dropped where the base is quantized (mlx-lm#1172)."""

    def merged(self, recipe, folder, dequantize):
        if dequantize:
            return super().merged(recipe, folder, dequantize)
        return self.base(recipe)[0]


class AnotherScale(MlxPath):
    """The adapter is fused with 0.999 times its scale."""

    def merged(self, recipe, folder, dequantize):
        reloaded = super().reloaded

        def scaled(recipe, folder):
            model = reloaded(recipe, folder)
            for module in model.modules():
                if hasattr(module, "lora_a"):
                    module.scale *= 0.999
            return model

        self.reloaded = scaled
        try:
            return super().merged(recipe, folder, dequantize)
        finally:
            del self.reloaded
