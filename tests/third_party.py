"""A trainer that the harness knows nothing of, added as a third party would."""

from typing import ClassVar

import numpy as np

from parity.paths.protocol import TrainingPath
from parity.trace import Trace


class NumpyAdamW(TrainingPath):
    """AdamW by its paper (Loshchilov and Hutter 2019), in NumPy."""

    name = "numpy-adamw"
    framework = "numpy"
    packages = ("numpy",)
    honours = ("optim.lr", "optim.betas", "optim.eps", "optim.weight_decay")
    fixed: ClassVar = {"optim.name": "adamw"}

    def optimizer_step(self, recipe, inputs):
        o = recipe.optim
        b1, b2 = o.betas
        weights = inputs.group("weight")
        first = {name: np.zeros_like(w) for name, w in weights.items()}
        second = {name: np.zeros_like(w) for name, w in weights.items()}
        trace, step = Trace(), 0
        while gradient := inputs.group(f"gradient.{step}"):
            step += 1
            for name, g in gradient.items():
                first[name] = b1 * first[name] + (1 - b1) * g
                second[name] = b2 * second[name] + (1 - b2) * g * g
                direction = (first[name] / (1 - b1**step)) / (
                    np.sqrt(second[name] / (1 - b2**step)) + o.eps
                )
                weights[name] = weights[name] * (1 - o.lr * o.weight_decay) - o.lr * direction
            trace = trace.with_group(f"weight.{step - 1}", weights)
        return trace
