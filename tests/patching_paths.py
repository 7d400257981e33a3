"""Paths that change the process they run in, for the tests of shared processes."""

from __future__ import annotations

import os

from parity.paths.mlx.path import MlxPath
from parity.paths.protocol import TrainingPath
from parity.trace import Trace


class Clean(MlxPath):
    """The path as it is."""

    name = "clean"


class _Patching(MlxPath):
    def tokenization(self, recipe, inputs):
        self.patch()
        return super().tokenization(recipe, inputs)


class Method(_Patching):
    """It wraps a method of a class of MLX."""

    name = "method"

    def patch(self):
        import mlx.nn as nn

        call = nn.Linear.__call__
        nn.Linear.__call__ = lambda layer, x: call(layer, x)


class Function(_Patching):
    """It replaces a function of mlx-lm."""

    name = "function"

    def patch(self):
        from mlx_lm.tuner import trainer

        loss = trainer.default_loss
        trainer.default_loss = lambda *arguments: loss(*arguments)


class Attribute(_Patching):
    """It adds an attribute to a class of MLX."""

    name = "attribute"

    def patch(self):
        import mlx.nn as nn

        nn.Module.patched = True


class Variable(_Patching):
    """It sets an environment variable."""

    name = "variable"

    def patch(self):
        os.environ["MLX_PARITY_TEST"] = "1"


class Unseeded(MlxPath):
    """It draws a number without having seeded anything."""

    name = "unseeded"

    def tokenization(self, recipe, inputs):
        import numpy as np

        trace = super().tokenization(recipe, inputs)
        return Trace(trace.arrays, {**trace.scalars, "decoded": [str(np.random.random())]})


class Declared(TrainingPath):
    """It says of itself that it patches."""

    name = "declared"
    framework = "numpy"
    patches = True

    def defaults(self, recipe, inputs):
        return Trace()
