"""The first divergent training step, and which half of it."""

from __future__ import annotations

from parity.bisect.place import Place, differs
from parity.judge.compare import compare_group
from parity.record import Record, Verdict
from parity.stages.context import Context
from parity.stages.loss_curve import aligned_training
from parity.trace import Array, Trace


def step(context: Context, record: Record) -> Place:
    """The first divergent step, and whether its gradient or its update differs at equal weights."""
    first = next(
        (m.step for m in record.metrics if m.step and m.gate and m.verdict is Verdict.DIVERGE), None
    )
    if first is None:
        return Place()
    said = f"first divergent step {first} of {context.recipe.train.steps}"
    # The loss of a step shows the weights that the step before left behind.
    batches = aligned_training(context).reference.group("batches")
    adapter = context.given("lora_init").group("adapter")
    for at in range(max(1, first - 1), first + 1):
        if at > 1:
            adapter = _after(context, at - 1)
        part = (at - 1) * context.recipe.train.accumulation
        rows = {"ids": batches[f"ids.{part}"], "lengths": batches[f"lengths.{part}"]}
        pair = context.pair("gradient", Trace(rows).with_group("adapter", adapter))
        tensors = pair.subject.group("gradient"), pair.reference.group("gradient")
        metric = compare_group("gradient", *tensors, pair.noise_of("gradient"))
        if differs(metric):
            said += f": at equal weights the gradient of step {at} differs, at {metric.where}"
            return Place(said, f"step {at}", "step")
    at = max(1, first - 1)
    said += f": at equal weights the gradients agree, so the update of step {at} differs"
    return Place(said, f"step {at}", "step")


def _after(context: Context, steps: int) -> dict[str, Array]:
    """The reference's adapter after some steps."""
    recipe = context.recipe.override({"train.steps": steps})
    inputs = Trace().with_group("adapter", context.given("lora_init").group("adapter"))
    return context.capture("reference", "train", recipe, inputs).group("adapter")
