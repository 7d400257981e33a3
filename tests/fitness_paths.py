"""Paths that are not fit to be judged, for the tests of `parity check-path`."""

from __future__ import annotations

from parity.paths.mlx.path import MlxPath


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
