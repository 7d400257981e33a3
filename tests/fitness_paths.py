"""Paths that are not fit to be judged, for the tests of `parity check-path`."""

from __future__ import annotations

from parity.paths.mlx.path import MlxPath
from parity.paths.protocol import TrainingPath


class SetsUpByItself(MlxPath):
    """Its `setup` makes an optimizer that is no part of it."""

    name = "sets-up-by-itself"
    own_parts = ("loader", "wiring", "batching", "loss", "clip", "optimizer", "loop")
    takes_parts = ("loader", "wiring", "batching", "loss", "clip", "optimizer")

    def setup(self, recipe, adapter=None):
        from unittest import mock

        with mock.patch.object(
            self, "part", lambda name: self if name == "optimizer" else part(name)
        ):
            part = type(self).part.__get__(self)
            return super().setup(recipe, adapter)


class BreaksTheContract(MlxPath):
    """Its adapter lacks the rank."""

    name = "breaks-the-contract"

    def lora_init(self, recipe, inputs):
        trace = super().lora_init(recipe, inputs)
        del trace.scalars["rank"]
        return trace


class WatchedOtherwise(MlxPath):
    """Watched, it trains a little further."""

    name = "watched-otherwise"

    def train(self, recipe, inputs):
        trace = super().train(recipe, inputs)
        trace.arrays |= {
            name: value * 1.001 for name, value in trace.arrays.items() if name.endswith("lora_b")
        }
        return trace


class Nothing(TrainingPath):
    """It has no method at all."""

    name = "nothing"
    framework = "numpy"


class OneOrder(MlxPath):
    """Its rows come in the order of the file, whatever the seed."""

    name = "one-order"

    def batches(self, recipe, inputs):
        return super().batches(recipe.override({"seed.value": 0, "seed.data": 0}), inputs)


class DrawsAnew(MlxPath):
    """Its adapter is another one each time."""

    name = "draws-anew"

    def seed(self, recipe):
        import secrets

        import mlx.core as mx

        super().seed(recipe)
        mx.random.seed(secrets.randbelow(2**31))


class FailingSettings(MlxPath):
    """Its settings cannot be read, and its loss cannot be asked for in a hybrid."""

    name = "failing-settings"
    own_parts = ("loader", "wiring", "batching", "loss", "clip", "optimizer", "loop")
    takes_parts = ("loss",)

    def config(self, recipe, inputs):
        raise ZeroDivisionError("no settings")

    def loss(self, recipe):
        return super().loss(recipe)

    def train(self, recipe, inputs):
        if self.donors:
            raise ZeroDivisionError("no hybrid")
        return super().train(recipe, inputs)
