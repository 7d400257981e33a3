"""Paths that inherit parts which their training does not use."""

from __future__ import annotations

from parity.paths.mlx.path import MlxPath
from parity.paths.mlx_lm import MlxLmPath


class OwnSetup(MlxPath):
    """Sets up its training by itself, with an optimizer that is no method of its own."""

    name = "own-setup"

    def setup(self, recipe, adapter=None):
        import mlx.optimizers as optim

        setup = super().setup(recipe, adapter)
        setup.optimizer = optim.SGD(learning_rate=recipe.optim.lr)
        return setup

    def loss(self, recipe):
        return super().loss(recipe)


class OwnTrain(MlxLmPath):
    """Trains by itself, so that of nothing it inherits anybody knows whether it trains with it."""

    name = "own-train"

    def train(self, recipe, inputs):
        return super().train(recipe, inputs)
