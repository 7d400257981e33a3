"""Stage 08: greedy decoding, the end-to-end canary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import numpy as np

from parity.judge.compare import compare, compare_exact, nothing
from parity.judge.noise import HEADROOM, Noise, largest, listed
from parity.record import Metric, Verdict
from parity.stages.context import Comparison, Context
from parity.stages.loss_curve import aligned_training
from parity.stages.pair import Extent, Pair
from parity.stages.prompts import LONG, decode_inputs
from parity.trace import Array, Trace, first_difference

MARGINS = "top-1/top-2 margins"


class GreedyDecode:
    """The same trained adapter decoded by both, and each path's own adapter by itself."""

    number: ClassVar[int] = 8
    name: ClassVar[str] = "greedy_decode"
    question: ClassVar[str] = "Does the trained model say the same?"

    def run(self, context: Context) -> Comparison:
        """Gates on ids, margins and the teacher-forced loss, not on how text looks."""
        training = aligned_training(context)
        adapter = training.reference.group("adapter")
        inputs = decode_inputs(context, adapter)
        prompts = inputs.scalars["prompts"]
        pair = context.pair("decode", inputs)
        result = Comparison()
        margins, noise = margins_of(pair, len(prompts))
        for index, prompt in enumerate(prompts):
            what = (
                repr(prompt) if index < len(prompts) - 1 else f"a prompt of {LONG} tokens and more"
            )
            result.metrics.append(ids_metric(f"ids after {what}", index, pair, noise))
            texts = [t.scalars["text"][index] for t in (pair.subject, pair.reference)]
            same = "both say" if texts[0] == texts[1] else "the subject says"
            result.findings.append(f"after {what} {same} {texts[0]!r}")
            if texts[0] != texts[1]:
                result.findings.append(f"after {what} the reference says {texts[1]!r}")
        result.metrics.append(
            compare(MARGINS, *margins, noise) if margins[0].size else nothing(MARGINS)
        )
        if len(pair.reference.arrays[f"ids.{len(prompts) - 1}"]) < 2:
            result.findings.append(
                "the long prompt is answered with one token: no cache was read beyond the window"
            )
        key = "completion_loss"
        metric = compare(key, pair.subject.arrays[key], pair.reference.arrays[key], pair.noise)
        result.metrics.append(metric.model_copy(update={"name": "teacher-forced completion loss"}))
        if context.extent is Extent.RECORD:
            self._own(context, training, result)
        return result

    def _own(self, context: Context, training: Pair, result: Comparison) -> None:
        """Each path with the adapter it trained itself: its own pass, prompt by prompt."""
        decode = context.recipe.decode
        for side, trained in (("subject", training.subject), ("reference", training.reference)):
            inputs = decode_inputs(context, trained.group("adapter"))
            own = context.capture(side, "decode", context.recipes[side], inputs)
            passes = {
                prompt: decode.expected.strip() in prompt + text
                for prompt, text in zip(decode.prompts, own.scalars["text"], strict=False)
            }
            loss = float(own.arrays["completion_loss"][0])
            passes["teacher-forced"] = loss <= decode.max_completion_loss
            result.passes[side] = passes


def margins_of(pair: Pair, prompts: int) -> tuple[tuple[Array, Array], Noise]:
    """Margins of both sides at the tokens on which they agree, and the noise of margins.

    A margin of another run tells something of rounding only up to the first token in which that run
    differs from the reference.
    """
    reference = pair.reference

    def common(other: Trace) -> list[int]:
        return [
            first_difference(other.arrays[f"ids.{i}"], reference.arrays[f"ids.{i}"])
            for i in range(prompts)
        ]

    def joined(trace: Trace, counts: list[int]) -> Array:
        parts = [trace.arrays[f"margin.{i}"][:count] for i, count in enumerate(counts)]
        return np.concatenate(parts).astype(np.float64)

    shared = common(pair.subject)
    values = joined(pair.subject, shared), joined(reference, shared)
    noise = pair.noise
    if noise.exact:
        return values, noise
    # Where another run takes another way the reference stands for it: no difference is known there.
    floors = {f"margin.{i}": reference.arrays[f"margin.{i}"] for i in range(prompts)}

    def cut(arrays: Mapping[str, Array]) -> dict[str, Array]:
        kept = {}
        for i in range(prompts):
            key = f"margin.{i}"
            if key not in arrays:
                continue
            count = first_difference(arrays[f"ids.{i}"], reference.arrays[f"ids.{i}"])
            kept[key] = floors[key].astype(np.float64)
            kept[key][:count] = arrays[key][:count]
        return kept

    measured = replace(
        noise,
        reduction=0.0,  # no margin depends on a sum over the vocabulary
        referee=cut(noise.referee),
        rounded=cut(noise.rounded),
        perturbed=cut(noise.perturbed),
    )
    each = [measured.sources(key, value) for key, value in floors.items() if value.size]
    whole: dict[str, Array | str] = {}
    for source in dict.fromkeys(source for found in each for source in found):
        there = [found[source] for found in each if source in found]
        numbers = [np.max(value, initial=0.0) for value in there if not isinstance(value, str)]
        whole[source] = np.full(values[0].shape, max(numbers)) if numbers else there[0]
    return values, replace(noise, given={MARGINS: whole})


def ids_metric(name: str, index: int, pair: Pair, noise: Noise) -> Metric:
    """The tokens; where they first differ the reference's margin must be one that rounding turns."""
    ours, theirs = (t.arrays[f"ids.{index}"] for t in (pair.subject, pair.reference))
    metric = compare_exact(name, ours, theirs)
    if metric.verdict is not Verdict.DIVERGE:
        return metric
    at = first_difference(ours, theirs)
    margins = pair.reference.arrays[f"margin.{index}"]
    margin = float(margins[at]) if at < min(len(margins), len(ours)) else float("inf")
    note = f"first difference at token {at + 1}; top-1/top-2 margin there {margin:.3g}"
    update = {"step": at + 1, "note": note}
    if noise.exact:
        return metric.model_copy(update=update)
    sources = noise.given[MARGINS]
    floor = largest(sources)
    near = margin <= HEADROOM * floor
    verdict = Verdict.AGREE if near else Verdict.DIVERGE
    if near:
        note += ": a near tie, decided by rounding; the tokens after it are not compared"
    elif reason := noise.lacking(sources):
        verdict = Verdict.INCONCLUSIVE
        note += f"; the floor lacks the {noise.main}: {reason}"
    return metric.model_copy(
        update={
            "step": at + 1,
            "note": note,
            "verdict": verdict,
            "value": margin,
            "tolerance": HEADROOM * floor,
            "minimum_required_tolerance": margin,
            "floor": floor,
            "sources": listed(sources),
            "why_floor": noise.why_floor,
        }
    )
