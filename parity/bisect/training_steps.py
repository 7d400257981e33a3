"""Both sides' training, opened up step by step."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from parity.stages.context import Context
from parity.stages.pair import Pair
from parity.trace import Array, Trace

SIDES = ("subject", "reference")


class NotCompared(Exception):
    """A comparison that could not be made; the message says why."""


@dataclass
class TrainingSteps:
    """Both sides' training, opened up step by step with runs of fewer steps."""

    context: Context
    inputs: Trace
    pair: Pair
    _adapters: dict[tuple[str, int], dict[str, Array]] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Optimizer steps of the recipe."""
        return self.context.recipe.train.steps

    def parts(self, side: str) -> int:
        """Micro-batches a step."""
        return self.context.recipes[side].train.accumulation

    def adapter(self, side: str, steps: int) -> dict[str, Array]:
        """A side's own adapter after some steps."""
        if steps == 0:
            return self.inputs.group("adapter")
        if steps == self.steps:
            return getattr(self.pair, side).group("adapter")  # type: ignore[no-any-return]
        if (side, steps) not in self._adapters:
            recipe = self.context.recipes[side]
            if recipe.optim.schedule != "constant":
                raise NotCompared("a shorter run follows another learning rate schedule")
            shorter = recipe.override({"train.steps": steps})
            trace = self.context.capture(side, "train", shorter, self.inputs)
            self._adapters[side, steps] = trace.group("adapter")
        return self._adapters[side, steps]

    @cached_property
    def drawn(self) -> dict[str, list[tuple[Array, Array]]]:
        """Ids and lengths of the micro-batches that each side drew, in their order."""
        found: dict[str, list[tuple[Array, Array]]] = {}
        for side in SIDES:
            batches, found[side] = getattr(self.pair, side).group("batches"), []
            while (ids := batches.get(f"ids.{len(found[side])}")) is not None:
                found[side].append((ids, batches[f"lengths.{len(found[side])}"]))
        return found

    def rows(self, side: str, step: int) -> list[Trace]:
        """The micro-batches of a step, as `gradient` takes them."""
        parts = self.parts(side)
        batches = self.drawn[side][(step - 1) * parts : step * parts]
        if len(batches) < parts:
            raise NotCompared(f"the {side} drew no batch for step {step}")
        return [Trace({"ids": ids, "lengths": lengths}) for ids, lengths in batches]

    def gradients(self, side: str, rows: list[Trace], adapter: dict[str, Array]) -> list[Trace]:
        """A side's gradients of micro-batches at given weights."""
        recipe = self.context.recipes[side]
        if recipe.lora.dropout:
            raise NotCompared("dropout draws another mask in each run")
        given = [row.with_group("adapter", adapter) for row in rows]
        return [self.context.capture(side, "gradient", recipe, row) for row in given]

    def whole(self, side: str, parts: list[Trace]) -> dict[str, Array]:
        """The gradient of a step from those of its micro-batches, weighted as the recipe says."""
        weights = np.ones(len(parts))
        if self.context.recipes[side].train.accumulation_weighting == "token":
            weights = np.array([part.scalars["tokens"] for part in parts], float)
        groups = [part.group("gradient") for part in parts]
        if len(groups) == 1:
            return groups[0]
        return {
            name: np.average([g[name] for g in groups], axis=0, weights=weights).astype(np.float32)
            for name in groups[0]
        }

    def fed(self, steps: int, side: str = "reference") -> Trace:
        """The adapter at the start and a side's gradients of so many steps, at its own weights."""
        inputs = Trace().with_group("weight", self.adapter(side, 0))
        for index in range(1, steps + 1):
            parts = self.gradients(side, self.rows(side, index), self.adapter(side, index - 1))
            inputs = inputs.with_group(f"gradient.{index - 1}", self.whole(side, parts))
        return inputs
