"""Stage 11: an adapter saved from the live model and loaded into a fresh one, on each path."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import ClassVar

import numpy as np

from parity.errors import Unsupported
from parity.judge.compare import compare, compare_exact, nothing
from parity.judge.noise import PERTURBED, REFEREE, REPEATS, Noise
from parity.judge.updates import Updates, compare_modules, compare_updates
from parity.record import Metric, Verdict
from parity.stages.context import Comparison, Context, measured
from parity.stages.gradient import filled
from parity.stages.loss_curve import aligned_inputs
from parity.stages.pair import Pair
from parity.trace import Array, Trace

ROWS, WIDTH = 2, 40
STEPS = 2  # of training, before a trainer leaves its files


class RoundTrip:
    """What an adapter does to the model, before saving and after loading."""

    number: ClassVar[int] = 11
    name: ClassVar[str] = "round_trip"
    question: ClassVar[str] = "Does an adapter do after saving and loading what it did before?"

    def run(self, context: Context) -> Comparison:
        """Each path against what it was handed and against itself; the loaded models across paths."""
        inputs = self.inputs(context)
        pair = context.pair("round_trip", inputs)
        result = Comparison()
        for side, trace in (("subject", pair.subject), ("reference", pair.reference)):
            given = Updates(inputs.group("adapter"), context.recipes[side].lora.scale)
            result.metrics += loaded_adapter(side, given, trace, trace.scalars["files"])
            why = trace.scalars.get("operations", "")
            noise = own_noise(side, "live", trace.arrays, pair, why)
            result.metrics.append(loaded_logits(side, trace, trace.arrays["live"], noise))
            result.metrics.append(effect(context, side, trace, inputs))
        _across(pair, result)
        try:
            _trained(context, inputs.arrays["ids"], result)
        except Unsupported as error:
            result.findings.append(f"after training it was not asked: {error}")
        return result

    def inputs(self, context: Context) -> Trace:
        """Seeded `ids` (ROWS, WIDTH) and an adapter whose B is not zero."""
        rng = context.rng(self.number)
        init = context.given("lora_init").group("adapter")
        ids = rng.integers(1, context.vocabulary, (ROWS, WIDTH)).astype(np.int32)
        return Trace({"ids": ids}).with_group("adapter", filled(init, rng))


def loaded_adapter(side: str, given: Updates, trace: Trace, files: Iterable[str]) -> list[Metric]:
    """Which modules have an adapter after loading, and what each of them adds to its weight."""
    loaded = Updates(trace.group("adapter"), trace.scalars["scales"])
    note = f"{len(given)} modules, loaded from {', '.join(files)}"
    return [
        compare_modules(f"modules with an adapter, {side}", loaded, given, note),
        compare_updates(f"scale · A · B after loading, {side}", loaded, given),
    ]


def own_noise(
    side: str, name: str, arrays: Mapping[str, Array], pair: Pair, why: str = ""
) -> Noise:
    """Bits, unless the live or the loaded model cannot give the same bits; then the floor.

    Args:
        side: Whose live model it is.
        name: Of its live logits; those of the loaded model are `loaded`.
        arrays: Both.
        pair: Both sides' traces; that of `side` has the array `name`.
        why: Why the two cannot give the same bits, where that is declared.
    """
    live, loaded = arrays[name], arrays["loaded"]
    absent = dict.fromkeys((REFEREE, PERTURBED), "not asked for: bits decide")
    if not why and not np.array_equal(live, loaded):
        again = pair.measured(REPEATS[side]).trace
        if again is not None and not np.array_equal(live, again.arrays[name]):
            why = f"the {side} does not repeat itself bit for bit on this device"
    if why:
        return Noise(False, given={"loaded": pair.rounding(name)}, why_floor=why)
    return Noise(exact=True, absent=absent)


def loaded_logits(
    side: str, trace: Trace, live: Array, noise: Noise, name: str = "loaded"
) -> Metric:
    """The loaded model against a live one that has the adapter; `name` is what the noise has them by."""
    metric = compare(name, trace.arrays["loaded"], live, noise)
    update = {"name": f"logits after loading, {side}"}
    if metric.verdict is Verdict.DIVERGE and not metric.note:
        update["note"] = f"{metric.value:.3g} off from the live model's"
    return metric.model_copy(update=update)


def effect(context: Context, side: str, trace: Trace, inputs: Trace) -> Metric:
    """Whether the loaded adapter changes what the model gives: equal zeros prove nothing."""
    name, loaded = f"effect of the adapter, {side}", trace.arrays["loaded"]
    given = Trace({"ids.0": inputs.arrays["ids"]}, {"modules": False})
    base, reason = measured(context.capture, side, "logits", context.recipes[side], given)
    if base is None:
        return nothing(name).model_copy(update={"note": f"the base model has no logits: {reason}"})
    gap = np.abs(loaded.astype(np.float64) - base.arrays["logits.0"]).max()
    moved = np.array([bool(gap > 0)])
    metric = compare_exact(name, moved, np.array([True]), note=f"logits move by up to {gap:.3g}")
    if metric.verdict is Verdict.DIVERGE:
        note = "the logits after loading are those without an adapter"
        metric = metric.model_copy(update={"note": note})
    return metric


def _across(pair: Pair, result: Comparison) -> None:
    """Loaded model against loaded model."""
    ours, theirs = pair.subject.arrays, pair.reference.arrays
    metric = compare("loaded", ours["loaded"], theirs["loaded"], pair.noise)
    result.metrics.append(metric.model_copy(update={"name": "logits after loading, both"}))
    if metric.verdict is not Verdict.DIVERGE:
        return
    if compare("live", ours["live"], theirs["live"], pair.noise).verdict is Verdict.DIVERGE:
        result.findings.append(
            "the logits before saving differ as well: not saving and loading alone"
        )


def _trained(context: Context, ids: Array, result: Comparison) -> None:
    """The same after a few steps: the files that the trainer leaves, against its live model."""
    few = {"train.steps": STEPS}
    handed = aligned_inputs(replace(context, recipe=context.recipe.override(few)), batches_too=True)
    handed.arrays["ids"] = ids
    pair = context.pair("train_and_load", handed, few)
    for side, trace in (("subject", pair.subject), ("reference", pair.reference)):
        live = Updates(trace.group("trained"), trace.scalars["live_scales"])
        metrics = [_changed(side, handed.group("adapter"), trace.group("trained"))]
        metrics += loaded_adapter(side, live, trace, trace.scalars["files"])
        noise = own_noise(side, "live", trace.arrays, pair)
        metrics.append(loaded_logits(side, trace, trace.arrays["live"], noise))
        result.metrics += [
            m.model_copy(update={"name": f"{m.name}, trained for {STEPS} steps"}) for m in metrics
        ]


def _changed(side: str, start: Mapping[str, Array], end: Mapping[str, Array]) -> Metric:
    """Whether training changed the adapter: without that the rest proves nothing."""
    changed = [n for n in end if n not in start or not np.array_equal(start[n], end[n])]
    note = f"{len(changed)} of {len(end)} tensors changed"
    moved = np.array([bool(changed)])
    metric = compare_exact(f"training changes the adapter, {side}", moved, np.array([True]), note)
    return metric.model_copy(update={"note": note})
