"""Stage 03: each path's real loss on the same logits, targets and lengths."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from parity.judge.compare import compare, compare_exact, nothing
from parity.record import Metric, Verdict
from parity.stages.context import Comparison, Context
from parity.stages.inputs import LENGTHS, loss_cases
from parity.stages.pair import Pair

TOKEN_LOSS = "token_loss"

LEAST = 1e-3
"""Losses below it are not divided by each other."""


class CrossEntropy:
    """Reduction, masking and per-token cross-entropy."""

    number: ClassVar[int] = 3
    name: ClassVar[str] = "cross_entropy"
    question: ClassVar[str] = "Is the same loss made of the same logits?"

    def run(self, context: Context) -> Comparison:
        """Compares the supervised set exactly, losses under the floor."""
        inputs = context.loss_inputs()
        pair = context.pair("cross_entropy", inputs)
        a, b = pair.subject, pair.reference
        result = Comparison(facts={"vocabulary": inputs.arrays["logits"].shape[-1]})
        masks = a.arrays["supervised"], b.arrays["supervised"]
        result.metrics.append(compare_exact("supervised positions", *masks))
        counts = np.array([a.scalars["tokens"]]), np.array([b.scalars["tokens"]])
        result.metrics.append(compare_exact("supervised tokens", *counts))
        both = masks[0] & masks[1] if masks[0].shape == masks[1].shape else masks[0][:0, :0]
        if both.any():
            targets = a.arrays["targets"][both], b.arrays["targets"][both]
            result.metrics.append(compare_exact("target ids", *targets))
        result.metrics += losses(pair)
        pairs = [pair]
        rng = np.random.default_rng([context.seed, self.number, 1])
        for case, logits in loss_cases(rng, context.vocabulary).items():
            if context.decided(result):
                break
            pairs.append(context.pair("cross_entropy", logits))
            result.metrics += losses(pairs[-1], f", {case}")
        result.facts |= padding_facts(pairs)
        if result.metrics[0].verdict is Verdict.DIVERGE:
            result.findings.append(describe_mask(*masks, LENGTHS))
            result.facts |= mask_facts(*masks, LENGTHS)
        return result


def losses(pair: Pair, case: str = "") -> list[Metric]:
    """The loss of each token by itself, as each path's own loss gives it, and the reduced one."""
    a, b, metrics = pair.subject, pair.reference, []
    name = f"cross-entropy per token{case}"
    absent = [
        f"the {side} has no loss of a single token: {trace.scalars.get('no_token_loss', 'no reason given')}"
        for side, trace in (("subject", a), ("reference", b))
        if TOKEN_LOSS not in trace.arrays
    ]
    if absent:
        metrics.append(nothing(name).model_copy(update={"note": "; ".join(absent)}))
    else:
        metric = compare(TOKEN_LOSS, a.arrays[TOKEN_LOSS], b.arrays[TOKEN_LOSS], pair.noise)
        metrics.append(metric.model_copy(update={"name": name}))
    metric = compare("loss", a.arrays["loss"], b.arrays["loss"], pair.noise)
    return [*metrics, metric.model_copy(update={"name": f"reduced loss{case}"})]


def padding_facts(pairs: list[Pair]) -> dict[str, float]:
    """How many cases show that one side divides by all positions, padding included; > 0: the subject.

    There its loss is the other's times supervised tokens / all positions, whatever that share is.
    """
    cases = []
    for pair in pairs:
        masks = pair.subject.arrays["supervised"], pair.reference.arrays["supervised"]
        values = [float(trace.arrays["loss"]) for trace in (pair.subject, pair.reference)]
        if not np.array_equal(*masks) or not all(np.isfinite(values)):
            return {}
        if min(map(abs, values)) > LEAST:
            cases.append((values[0] / values[1], float(masks[0].mean())))
    if len({share for _, share in cases}) < 2:
        return {}
    for sign in (1, -1):
        if all(np.isclose(ratio, share**sign, rtol=1e-4) for ratio, share in cases):
            return {"cases that average over padding": float(sign * len(cases))}
    return {}


def mask_facts(subject: np.ndarray, reference: np.ndarray, lengths: list[int]) -> dict[str, float]:
    """Positions that the subject supervises more (+) or fewer (-), where all rows agree in it.

    A row's start ends at the first position that both supervise; its end is its last token.
    """
    if subject.shape != reference.shape or not (subject & reference).any(axis=1).all():
        return {}
    more = subject.astype(int) - reference
    starts = (subject & reference).argmax(axis=1)
    ends = np.array(lengths) - 1
    at = np.arange(more.shape[1])
    parts = {
        "positions per row at the start": set((more * (at < starts[:, None])).sum(axis=1).tolist()),
        "positions per row past the end": set((more * (at >= ends[:, None])).sum(axis=1).tolist()),
    }
    found = {what: counts.pop() for what, counts in parts.items() if len(counts) == 1}
    total, rows = int(np.abs(more).sum()), len(more)
    # Whether that is all: positions that differ in another way.
    left = {
        f"left, {what.removeprefix('positions per row ')}": float(total - rows * abs(count))
        for what, count in found.items()
        if count
    }
    return found | left


def describe_mask(subject: np.ndarray, reference: np.ndarray, lengths: list[int]) -> str:
    """Two supervised sets in words."""
    if subject.shape != reference.shape:
        return f"masks have shapes {subject.shape} and {reference.shape}"
    more, fewer = subject & ~reference, reference & ~subject
    parts = []
    for extra, what in ((more, "more"), (fewer, "fewer")):
        if not extra.any():
            continue
        rows = extra.sum(axis=1)
        each = f"{rows[0]} {what} in every row" if len(set(rows)) == 1 else f"{extra.sum()} {what}"
        position = int(np.argwhere(extra)[0][1])
        row = int(np.argwhere(extra)[0][0])
        real = lengths[row] - 1
        place = (
            "past the end of the row (a padding position)" if position >= real else "inside the row"
        )
        parts.append(f"{each}, e.g. target {position + 1} of row {row}, {place}")
    return "the subject supervises " + "; ".join(parts)
