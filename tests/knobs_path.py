"""A trainer of a user with a knob of its own."""

from __future__ import annotations

from typing import ClassVar

from parity.factors import Knobs
from tests.third_party import NumpyAdamW


class HalfKnobs(Knobs):
    section: ClassVar[str] = "half"
    factor: float = 1.0


class Half(NumpyAdamW):
    """Its learning rate is multiplied by the knob."""

    name = "half"
    knobs = HalfKnobs

    def optimizer_step(self, recipe, inputs):
        factor = recipe.knobs(HalfKnobs).factor
        return super().optimizer_step(
            recipe.override({"optim.lr": factor * recipe.optim.lr}), inputs
        )
