"""Paths whose knobs do not do what they say, for the tests of the audit."""

from __future__ import annotations

from typing import ClassVar

from parity.errors import Unsupported
from parity.factors import Knobs
from parity.paths.documentation import documented
from parity.paths.mlx.path import MlxPath


class SwallowsLayers(MlxPath):
    """Whatever number of layers is asked for, all are adapted."""

    name = "swallows-layers"

    def wire(self, model, recipe):
        super().wire(model, recipe.override({"lora.num_layers": -1}))


class LoopWithoutClip(MlxPath):
    """Its clip is right, and its loop never calls it."""

    name = "loop-without-clip"

    def loop(self, recipe, setup, batches):
        setup.clip = None
        return super().loop(recipe, setup, batches)


class ClipsByValue(MlxPath):
    """Asked for a clip by norm it clips by value."""

    name = "clips-by-value"

    def clip(self, recipe):
        kind = "none" if recipe.optim.clip == "none" else "value"
        return super().clip(recipe.override({"optim.clip": kind}))


class DecayIsRate(MlxPath):
    """Its weight decay goes to the learning rate."""

    name = "decay-is-rate"

    def optimizer(self, recipe):
        moved = {"optim.lr": recipe.optim.lr * (1 + recipe.optim.weight_decay)}
        return super().optimizer(recipe.override({**moved, "optim.weight_decay": 0.0}))


class NeverCompiles(MlxPath):
    """It is told to compile, and does not."""

    name = "never-compiles"

    def loop(self, recipe, setup, batches):
        import mlx.core as mx

        mx.disable_compile()
        try:
            return super().loop(recipe, setup, batches)
        finally:
            mx.enable_compile()


class EchoesDecay(MlxPath):
    """It ignores the weight decay, and reports what the recipe says."""

    name = "echoes-decay"

    def optimizer(self, recipe):
        return super().optimizer(recipe.override({"optim.weight_decay": 0.0}))

    def config(self, recipe, inputs):
        trace = super().config(recipe, inputs)
        trace.scalars["optim.weight_decay"] = recipe.optim.weight_decay
        return trace


class OwnKnobs(Knobs):
    section: ClassVar[str] = "own"
    doubled: bool = False
    nothing: int = 3
    label: str = "free text"


class HasKnobs(MlxPath):
    """One of its knobs doubles the learning rate, one does nothing; of one no other value is known."""

    name = "has-knobs"
    knobs = OwnKnobs
    documented: ClassVar = {"lora.rank": 8, "train.accumulation": 4}

    def optimizer(self, recipe):
        rate = recipe.optim.lr * (2 if recipe.knobs(OwnKnobs).doubled else 1)
        return super().optimizer(recipe.override({"optim.lr": rate}))


class SaysNoClip(MlxPath):
    """As shipped it reports no clip and clips at 0.5."""

    name = "says-no-clip"

    def shipped(self):
        return {**super().shipped(), "optim.clip": "none"}

    def clip(self, recipe):
        return super().clip(recipe.override({"optim.clip": "norm", "optim.clip_value": 0.5}))


class NeverTheSame(MlxPath):
    """Its loop adds noise to what it reports and to its adapter."""

    name = "never-the-same"

    def train(self, recipe, inputs):
        import os

        import numpy as np

        trace = super().train(recipe, inputs)
        rng = np.random.default_rng(int.from_bytes(os.urandom(4), "big"))
        for name, value in trace.arrays.items():
            if value.dtype.kind == "f":
                noise = rng.normal(0, 1e-3, value.shape)
                trace.arrays[name] = (value + noise).astype(value.dtype)
        return trace


class FailsWhenMoved(MlxPath):
    """Its loop breaks with a clip."""

    name = "fails-when-moved"

    def clip(self, recipe):
        if recipe.optim.clip != "none":
            raise ZeroDivisionError("no clip was ever tried")
        return super().clip(recipe)


class RefusesClip(MlxPath):
    """It says that it has no clip."""

    name = "refuses-clip"

    def clip(self, recipe):
        if recipe.optim.clip != "none":
            raise Unsupported("there is no clip in this trainer")
        return super().clip(recipe)


class ReadsBackMore(MlxPath):
    """It reports twice the micro-batches that it takes, and not whether it compiles."""

    name = "reads-back-more"

    def config(self, recipe, inputs):
        trace = super().config(recipe, inputs)
        trace.scalars["seed.placement"] = "before_everything"
        del trace.scalars["train.compile"]
        return trace


class WithoutSettings(SwallowsLayers):
    """What it has in effect cannot be read, nor what it has by default."""

    name = "without-settings"

    def config(self, recipe, inputs):
        raise Unsupported("nothing is kept")

    def shipped(self):
        raise Unsupported("its defaults are on a server")


class DocumentsOtherwise(MlxPath):
    """Its docstring was not kept up with its code."""

    name = "documents-otherwise"

    def documents(self):
        return documented(
            ["rank (`int`, *optional*, defaults to 64): of the adapter"], {"rank": "lora.rank"}
        )
