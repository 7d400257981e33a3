"""The place inside a stage: the first bad module, tensor or training step."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

from parity.cell import Cell
from parity.engine import Engine
from parity.errors import CaptureError, UnmatchedNames, Unsupported
from parity.numerics import compare_group, distance
from parity.record import Metric, Record, Verdict
from parity.stages.base import Context, Pair
from parity.stages.gradient import Gradient
from parity.stages.logits import Logits
from parity.stages.loss_curve import aligned_training
from parity.trace import Array, Trace, layer_of


def locate(engine: Engine, cell: Cell, record: Record) -> str:
    """Names the place, in words; empty where the stage has none to name."""
    context = engine.context(cell)
    try:
        if cell.stage.name == "logits":
            return module(context)
        if cell.stage.name == "gradient":
            return backward(context)
        if cell.stage.name == "loss_curve":
            return step(context, record)
    except (Unsupported, CaptureError, UnmatchedNames, KeyError) as error:
        return f"the place could not be named: {error}"
    return ""


def module(context: Context) -> str:
    """The first module whose output differs though what came before agrees.

    Confirmed in two ways by substitution: with the reference's output in its place the divergence
    downstream must vanish; and with every layer's output replaced, so that no error is passed on, the
    modules that are off by themselves are counted.
    """
    inputs = Logits().inputs(context)
    for index in range(2):
        rows = Trace({"ids.0": inputs.arrays[f"ids.{index}"]}, {"modules": True})
        pair = context.pair("logits", rows)
        bad = bad_modules(pair)
        if not bad:
            continue
        first = bad[0]
        theirs = pair.reference.group("module.0")
        return (
            f"first bad module {first.name}: greatest |Δ| {first.value:.3g}, rounding explains "
            f"{first.floor:.2g}; {_downstream(context, rows, pair, first.name, theirs)}"
            f"{_by_layer(context, rows, pair, theirs)}"
        )
    return "no common module differs beyond its floor: the difference is after them"


def bad_modules(pair: Pair, subject: Trace | None = None) -> list[Metric]:
    """Modules whose outputs differ beyond their floors, in the order of calls."""
    subject = subject or pair.subject
    ours, theirs = subject.group("module.0"), pair.reference.group("module.0")
    noise = pair.noise_of("module.0")
    common = [
        n for n in subject.scalars["order"] if n in theirs and ours[n].shape == theirs[n].shape
    ]
    metrics = [compare_group(n, {n: ours[n]}, {n: theirs[n]}, noise) for n in common]
    return [metric for metric in metrics if metric.verdict is Verdict.DIVERGE]


def _replaced(context: Context, rows: Trace, outputs: Mapping[str, Array]) -> Trace:
    inputs = rows.with_group("replace", outputs)
    return context.capture("subject", "logits", context.recipes["subject"], inputs)


def _downstream(
    context: Context, rows: Trace, pair: Pair, name: str, theirs: Mapping[str, Array]
) -> str:
    fixed = _replaced(context, rows, {name: theirs[name]})
    expected = pair.reference.arrays["logits.0"]
    before = distance(pair.subject.arrays["logits.0"], expected)
    after = distance(fixed.arrays["logits.0"], expected)
    said = f"with the reference's output in its place the error of the logits goes from {before:.3g} to {after:.3g}"
    return f"confirmed, {said}" if after < before / 10 else f"not the only one, {said}"


def _by_layer(context: Context, rows: Trace, pair: Pair, theirs: Mapping[str, Array]) -> str:
    layers = {name: value for name, value in theirs.items() if re.fullmatch(r"layers\.\d+", name)}
    if not layers:
        return ""
    bad = bad_modules(pair, _replaced(context, rows, layers))
    firsts: dict[int, str] = {}
    for metric in bad:
        if (layer := layer_of(metric.name)) is not None:
            firsts.setdefault(layer, metric.name.split(".", 2)[2])
    kinds = Counter(firsts.values())
    counted = [
        f"{kind} in {n} of {len(layers)} layers" + (f" ({_only(firsts, kind)})" if n <= 3 else "")
        for kind, n in kinds.most_common(3)
    ]
    return (
        f"; each layer given the reference's input, off are: {', '.join(counted)}"
        if counted
        else ""
    )


def _only(firsts: Mapping[int, str], kind: str) -> str:
    return ", ".join(str(layer) for layer, name in firsts.items() if name == kind)


def backward(context: Context) -> str:
    """Where gradients begin to differ on the way from the loss back to the input.

    Modules are walked in the reverse order of their calls, by the gradients of their adapters.
    """
    order = context.capture(
        "reference",
        "logits",
        context.recipes["reference"],
        Trace(Logits().inputs(context).arrays, {"modules": True}),
    ).scalars["order"]
    for pair, what in Gradient().pairs(context):
        ours, theirs = pair.subject.group("gradient"), pair.reference.group("gradient")
        noise = pair.noise_of("gradient")
        fine = "the loss"
        for module_name in reversed(order):
            names = [f"{module_name}.lora_{part}" for part in "ab"]
            if not all(name in ours and name in theirs for name in names):
                continue
            metric = compare_group(
                module_name, {n: ours[n] for n in names}, {n: theirs[n] for n in names}, noise
            )
            if metric.verdict is Verdict.DIVERGE:
                return (
                    f"backwards from the loss ({what}) gradients agree down to {fine} and differ "
                    f"from {module_name} on: greatest |Δ| {metric.value:.3g}, rounding explains "
                    f"{metric.floor:.2g}"
                )
            fine = module_name
    return ""


def step(context: Context, record: Record) -> str:
    """The first divergent step, and whether its gradient or its update differs at equal weights."""
    first = next(
        (m.step for m in record.metrics if m.step and m.gate and m.verdict is Verdict.DIVERGE), None
    )
    if first is None:
        return ""
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
        if metric.verdict is Verdict.DIVERGE:
            return f"{said}: at equal weights the gradient of step {at} differs, at {metric.where}"
    return f"{said}: at equal weights the gradients agree, so the update of step {max(1, first - 1)} differs"


def _after(context: Context, steps: int) -> dict[str, Array]:
    """The reference's adapter after some steps."""
    recipe = context.recipe.override({"train.steps": steps})
    inputs = Trace().with_group("adapter", context.given("lora_init").group("adapter"))
    return context.capture("reference", "train", recipe, inputs).group("adapter")
