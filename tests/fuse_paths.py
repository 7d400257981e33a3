"""Paths whose fuse does something else than it should, each in one way that people have reported."""

from __future__ import annotations

from parity.paths.mlx import MlxPath


class NothingFused(MlxPath):
    """The base is what comes out (mlx-examples#396)."""

    def merge(self, recipe, folder, read, dequantize):
        return self.base(recipe)[0]


class LostWhereQuantized(MlxPath):
    """The adapter is dropped where the base is quantized (mlx-lm#1172)."""

    def merge(self, recipe, folder, read, dequantize):
        if dequantize:
            return super().merge(recipe, folder, read, dequantize)
        return self.base(recipe)[0]


class AnotherScale(MlxPath):
    """The adapter is fused with 0.999 times its scale."""

    def merge(self, recipe, folder, read, dequantize):
        def scaled():
            model = read() if read else self.reloaded(recipe, folder)
            for module in model.modules():
                if hasattr(module, "lora_a"):
                    module.scale *= 0.999
            return model

        return super().merge(recipe, folder, scaled, dequantize)
