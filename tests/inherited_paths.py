"""Paths that inherit parts which their training does not use."""

from __future__ import annotations

from parity.paths.mlx.path import MlxPath
from tests.settings_paths import AveragesOverPadding


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


class OwnTrain(MlxPath):
    """Trains by itself: on each micro-batch alone, with a loss that averages over padding."""

    name = "own-train"

    def train(self, recipe, inputs):
        inner = AveragesOverPadding(self.cache)
        return inner.train(recipe.override({"train.accumulation": 1}), inputs)
