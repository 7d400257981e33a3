"""Stage 08: greedy decoding, the end-to-end canary."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from parity.judge.numerics import HEADROOM, compare, compare_exact, distance
from parity.record import Metric, Verdict
from parity.stages.context import Comparison, Context, Pair
from parity.stages.loss_curve import aligned_training, decode_inputs
from parity.trace import Trace, first_difference


class GreedyDecode:
    """The same trained adapter decoded by both, and each path's own adapter by itself."""

    number: ClassVar[int] = 8
    name: ClassVar[str] = "greedy_decode"
    question: ClassVar[str] = "Does the trained model say the same?"

    def run(self, context: Context) -> Comparison:
        """Gates on ids and on the teacher-forced loss of the completion, not on how text looks."""
        training = aligned_training(context)
        adapter = training.reference.group("adapter")
        pair = context.pair("decode", decode_inputs(context, adapter))
        result = Comparison()
        for index, prompt in enumerate(context.recipe.decode.prompts):
            result.metrics.append(_ids(index, prompt, pair))
            texts = [t.scalars["text"][index] for t in (pair.subject, pair.reference)]
            same = "both say" if texts[0] == texts[1] else "the subject says"
            result.findings.append(f"after {prompt!r} {same} {texts[0]!r}")
            if texts[0] != texts[1]:
                result.findings.append(f"after {prompt!r} the reference says {texts[1]!r}")
        key = "completion_loss"
        metric = compare(key, pair.subject.arrays[key], pair.reference.arrays[key], pair.noise)
        result.metrics.append(metric.model_copy(update={"name": "teacher-forced completion loss"}))
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
                for prompt, text in zip(decode.prompts, own.scalars["text"], strict=True)
            }
            loss = float(own.arrays["completion_loss"][0])
            passes["teacher-forced"] = loss <= decode.max_completion_loss
            result.passes[side] = passes


def _ids(index: int, prompt: str, pair: Pair) -> Metric:
    name = f"ids after {prompt!r}"
    ours, theirs = (t.arrays[f"ids.{index}"] for t in (pair.subject, pair.reference))
    metric = compare_exact(name, ours, theirs)
    if metric.verdict is not Verdict.DIVERGE:
        return metric
    at = first_difference(ours, theirs)
    margin = _margin(pair.reference, index, at)
    near = not pair.exact and margin <= HEADROOM * margin_noise(pair)
    return metric.model_copy(
        update={
            "verdict": Verdict.AGREE if near else Verdict.DIVERGE,
            "accepted": "a near tie, decided by rounding" if near else "",
            "step": at + 1,
            "note": f"first difference at token {at + 1}; top-1/top-2 margin there {margin:.3g}"
            + (": a near tie, decided by rounding" if near else ""),
        }
    )


def _margin(trace: Trace, index: int, at: int) -> float:
    margins = trace.arrays[f"margin.{index}"]
    return float(margins[at]) if at < len(margins) else float(np.inf)


def margin_noise(pair: Pair) -> float:
    """How far the margins of two sides are apart at tokens on which they still agree."""
    noise = 0.0
    for other in (pair.subject, pair.referee):
        if other is None:
            continue
        index = 0
        while (name := f"ids.{index}") in pair.reference.arrays:
            common = first_difference(other.arrays[name], pair.reference.arrays[name])
            ours, theirs = (t.arrays[f"margin.{index}"][:common] for t in (other, pair.reference))
            noise = max(noise, distance(ours, theirs))
            index += 1
    return noise
