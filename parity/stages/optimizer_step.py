"""Stage 06: the real clip and optimizer on the same weights and hand-fed gradients."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from parity.errors import Unsupported
from parity.judge.compare import compare_group
from parity.judge.noise import largest
from parity.judge.optimizers import in_effect
from parity.record import Verdict
from parity.stages.context import Comparison, Context
from parity.stages.pair import Pair
from parity.trace import Array, Trace

STEPS = 5
SHAPES = {
    "layers.0.self_attn.q_proj.lora_a": (64, 8),
    "layers.0.self_attn.q_proj.lora_b": (8, 64),
    "layers.1.mlp.down_proj.lora_a": (128, 8),
    "layers.1.mlp.down_proj.lora_b": (8, 64),
}
DECAY = 0.1


class OptimizerStep:
    """Five steps, with the recipe's weight decay and with a plain one."""

    number: ClassVar[int] = 6
    name: ClassVar[str] = "optimizer_step"
    question: ClassVar[str] = "Does the same gradient move the same weights equally?"

    def run(self, context: Context) -> Comparison:
        """Compares the weights after each step."""
        rng = context.rng(self.number)
        weights = {k: rng.normal(0, 0.1, shape).astype(np.float32) for k, shape in SHAPES.items()}
        inputs = Trace().with_group("weight", weights)
        for step in range(STEPS):
            # Magnitudes from 1e-3 to 10: a clip at 1 bites on some tensors and not on others.
            fed = {
                k: (rng.normal(0, 1, s) * 10.0 ** rng.uniform(-3, 1)).astype(np.float32)
                for k, s in SHAPES.items()
            }
            inputs = inputs.with_group(f"gradient.{step}", fed)
        result = Comparison()
        own = context.recipe.optim.weight_decay
        for decay, changes in ((own, {}), (DECAY, {"optim.weight_decay": DECAY})):
            if context.decided(result):
                break
            try:
                if decided := [name for name in changes if name in context.own_factors]:
                    raise Unsupported(f"the code of a side decides {decided[0]}")
                self._steps(context, inputs, decay, changes, result)
            except Unsupported as error:
                if not changes:
                    raise
                result.findings.append(f"weight decay {decay} was not compared: {error}")
        return result

    def _steps(
        self,
        context: Context,
        inputs: Trace,
        decay: float,
        changes: dict[str, float],
        result: Comparison,
    ) -> None:
        pair = context.pair("optimizer_step", inputs, changes)
        agreed = all(metric.verdict.green for metric in result.metrics)
        for step in range(STEPS):
            group = f"weight.{step}"
            tensors = pair.subject.group(group), pair.reference.group(group)
            name = f"weights after step {step + 1}, weight decay {decay:g}"
            metric = compare_group(name, *tensors, pair.noise_of(group))
            result.metrics.append(metric.model_copy(update={"step": step + 1}))
            if step == 0 and metric.verdict is Verdict.DIVERGE:
                result.findings += first_update(inputs.group("weight"), *tensors, name)
        # Of the first decay that diverges: the recipe's own says more than the plain one.
        if agreed and not all(metric.verdict.green for metric in result.metrics):
            result.facts |= update_facts(inputs, pair.subject, pair.reference)
            result.facts |= adam_facts(context, inputs, pair, changes, result.facts)


def adam_facts(
    context: Context, inputs: Trace, pair: Pair, changes: dict[str, float], facts: dict[str, float]
) -> dict[str, float]:
    """What Adam does on either side, found by computing it."""
    recipes = {side: context.recipes[side].override(changes) for side in ("subject", "reference")}
    gradients = [inputs.group(f"gradient.{step}") for step in (0, 1)]
    sides = {
        side: (getattr(pair, side).group("weight.1"), recipe.factors())
        for side, recipe in recipes.items()
    }
    rate = recipes["reference"].optim.lr
    slope = abs(facts.get("first gap / weight", 0.0)) / rate if rate else 0.0
    least = min(recipe.optim.weight_decay for recipe in recipes.values())
    last = f"weight.{len(gradients) - 1}/"
    names = [name for name in pair.reference.arrays if name.startswith(last)]
    rounding = max((largest(pair.rounding(name)) for name in names), default=0.0)
    return in_effect(inputs.group("weight"), gradients, sides, slope + least, rounding)


def first_update(
    start: dict[str, Array], subject: dict[str, Array], reference: dict[str, Array], name: str
) -> list[str]:
    """The ratio of the first updates, which is a constant for some well-known differences."""
    if subject.keys() != reference.keys():
        return []
    moves = [
        np.concatenate([(tensors[k] - start[k]).ravel() for k in sorted(start)]).astype(np.float64)
        for tensors in (subject, reference)
    ]
    if not moves[1].any():
        return [f"{name}: the reference does not move"]
    ratio = float(np.median(np.abs(moves[0])) / np.median(np.abs(moves[1])))
    return [f"{name}: the subject's update is {ratio:.4g}× the reference's (median over elements)"]


def update_facts(inputs: Trace, subject: Trace, reference: Trace) -> dict[str, float]:
    """Numbers of the first update by which well-known differences are told apart."""
    names = sorted(SHAPES)

    def flat(trace: Trace, group: str) -> Array:
        tensors = trace.group(group)
        return np.concatenate([tensors[k].ravel() for k in names]).astype(np.float64)

    try:
        start = flat(inputs, "weight")
        ours, theirs = (flat(trace, "weight.0") for trace in (subject, reference))
    except KeyError:  # names that do not match: the metrics say so
        return {}
    sizes = [float(np.median(np.abs(side - start))) for side in (ours, theirs)]
    if not all(sizes):
        return {}
    gap = ours - theirs
    return {
        "first update ratio": sizes[0] / sizes[1],
        "first gap / weight": float(gap @ start / (start @ start)),
    }
