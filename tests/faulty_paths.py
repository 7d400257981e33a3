"""Paths that go wrong, for the tests of the harness. They compute nothing a user would use."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import time

import numpy as np

from parity.errors import Unsupported
from parity.paths.mlx.path import MlxPath
from parity.paths.protocol import TrainingPath
from parity.trace import Trace
from tests.third_party import NumpyAdamW


class Faulty(TrainingPath):
    """Each method goes wrong in its own way."""

    name = "faulty"
    framework = "numpy"
    honours = ("model.", "data.", "seed.", "lora.", "mask.", "optim.", "train.", "decode.")

    def logits(self, recipe, inputs):
        print("the last words of a dying process", file=sys.stderr)
        os.kill(os.getpid(), signal.SIGKILL)

    def gradient(self, recipe, inputs):
        time.sleep(60)

    def train(self, recipe, inputs):
        raise RuntimeError("shapes (3,) and (4,) do not fit")

    def decode(self, recipe, inputs):
        raise Unsupported("it only trains")

    def lora_init(self, recipe, inputs):
        return Trace({"pid": np.array([os.getpid()])}, {"rank": "eight"})

    def optimizer_step(self, recipe, inputs):
        return {"weight.0": inputs.group("weight")}

    def defaults(self, recipe, inputs):
        print("noise on stdout that must not end up among the answers")
        return Trace(scalars={"pid": os.getpid(), "seed": recipe.seed.value})


class Leaving(TrainingPath):
    """It needs a package, says so and ends its process, as mlx-lm's olmo does."""

    name = "leaving"
    framework = "numpy"
    honours = Faulty.honours

    def lora_init(self, recipe, inputs):
        print("To run it install something-else", file=sys.stderr)
        sys.exit(1)

    def defaults(self, recipe, inputs):
        sys.exit("it has no defaults")


class Moody(TrainingPath):
    """Its optimizer step is right every other time it is asked."""

    name = "moody"
    framework = "numpy"
    honours = NumpyAdamW.honours
    fixed = NumpyAdamW.fixed

    def optimizer_step(self, recipe, inputs):
        mark = self.cache / "moody"
        trace = NumpyAdamW(self.cache).optimizer_step(recipe, inputs)
        if mark.exists():
            mark.unlink()
        else:
            mark.touch()
            for value in trace.arrays.values():
                value += 1.0
        return trace


class Twin(NumpyAdamW):
    """The same under another name."""

    name = "twin"


class FaultyStill(Faulty):
    """The same in a process of its own."""


class Packaging(TrainingPath):
    """It has releases, and says which one it runs."""

    name = "packaging"
    framework = "numpy"
    packages = ("packaging",)
    release = "packaging"

    def shipped(self):
        import packaging

        return {"version": packaging.__version__}

    def environment(self):
        from parity.paths.describe import describe_process

        return describe_process(self.packages)


class NoSettings(TrainingPath):
    """Fails when its defaults are read."""

    name = "no-settings"
    framework = "numpy"
    honours = ("model.", "data.", "seed.", "lora.", "mask.", "optim.", "train.", "decode.")

    def shipped(self):
        raise RuntimeError("no settings")


class Absent(TrainingPath):
    """Cannot run on this machine."""

    name = "absent"
    framework = "numpy"
    honours = ("model.", "data.", "seed.", "lora.", "mask.", "optim.", "train.", "decode.")

    def shipped(self):
        raise Unsupported("not on this machine")


class NotInstalled(MlxPath):
    """Its package is one that nobody has."""

    name = "not-installed"
    packages = (*MlxPath.packages, "a-trainer-of-mine")


class Asleep(TrainingPath):
    """Its settings take a minute; it leaves a file when its process ends."""

    name = "asleep"
    framework = "numpy"
    honours = Faulty.honours

    def config(self, recipe, inputs):
        (self.cache / "asleep").touch()
        time.sleep(60)
        return Trace()

    def defaults(self, recipe, inputs):
        atexit.register((self.cache / "ended").touch)
        return Trace()


class Dozing(TrainingPath):
    """Every answer takes half a second."""

    name = "dozing"
    framework = "numpy"
    honours = Faulty.honours

    def defaults(self, recipe, inputs):
        time.sleep(0.5)
        return Trace()
