"""The questions that are asked of each model: the stages of the probes, with short inputs of the sweep's own."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import ClassVar

import numpy as np

from parity.judge.compare import compare, compare_exact, compare_group, nothing
from parity.names import canonical, layer_of
from parity.record import Metric
from parity.stages.context import Comparison, Context, Stage
from parity.stages.decode import MARGINS, ids_metric, margins_of
from parity.stages.gradient import Gradient, filled, loss_and_norm
from parity.stages.inputs import common_rows
from parity.stages.kv_cache import TRIMMED, TURNS, KvCache
from parity.stages.logits import Logits
from parity.stages.pair import Pair
from parity.sweep.models import text
from parity.sweep.shrink import VOCABULARY
from parity.trace import Trace

LOADS, LOGITS, GRADIENT, CACHE, TOKENS = "loads", "logits", "gradient", "KV cache", "tokens"
QUESTIONS = (LOADS, LOGITS, GRADIENT, CACHE, TOKENS)
"""In the order of the columns of the table."""
PROMPTS = ("Hello there, ", "The quick brown fox jumps over the lazy dog. " * 3)
"""The second is longer than every window of the traps."""


class SweepLogits(Logits):
    """The logits of the base model on random ids, longer than every window."""

    def run(self, context: Context) -> Comparison:
        """Logits that are constant over the text prove nothing: then the cell is not green."""
        pair = context.pair("logits", self.inputs(context))
        ours, theirs = (trace.arrays["logits.0"] for trace in (pair.subject, pair.reference))
        metric = compare("logits.0", ours, theirs, pair.noise)
        if theirs.shape[-1] != VOCABULARY or float(np.ptp(theirs)) == 0.0:
            metric = nothing("logits.0")
        result = Comparison(metrics=[metric.model_copy(update={"name": LOGITS})])
        result.facts["spread"] = float(theirs.std())
        return result

    def inputs(self, context: Context) -> Trace:
        """`ids.0` and `ids.1` (2, 80) int32 of the same distribution."""
        other = text()[:, ::-1].copy()
        return Trace({"ids.0": text(), "ids.1": other}, {"modules": False})


class SweepGradient(Gradient):
    """One batch with B ≠ 0."""

    def inputs(self, context: Context) -> Iterator[tuple[Trace, str]]:
        """Rows longer than every window."""
        init = context.given("lora_init").group("adapter")
        rng = context.rng(self.number)
        rows = common_rows(rng, VOCABULARY, [33, 57], 65)
        yield rows.with_group("adapter", filled(init, rng)), "B ≠ 0"

    def run(self, context: Context) -> Comparison:
        """Loss, norm, supervised tokens and every tensor."""
        result = Comparison()
        for pair, what in self.pairs(context):
            a, b = pair.subject, pair.reference
            result.metrics += loss_and_norm(pair, what)
            counts = np.array([a.scalars["tokens"]]), np.array([b.scalars["tokens"]])
            result.metrics.append(compare_exact("supervised tokens", *counts))
            result.metrics.append(_tensors(pair))
        return result


def _tensors(pair: Pair) -> Metric:
    tensors = pair.subject.group("gradient"), pair.reference.group("gradient")
    return compare_group("gradient", *tensors, pair.noise_of("gradient"))


class SweepCache(KvCache):
    """The conversation without an adapter: its own probe has one."""

    def inputs(self, context: Context, findings: list[str]) -> Trace:
        """Turns that reach, cross and are longer than every window."""
        rng = context.rng(self.number)
        turns = {
            f"turn.{index}": rng.integers(3, VOCABULARY, length).astype(np.int32)
            for index, length in enumerate(TURNS)
        }
        return Trace(turns, {"trim": TRIMMED})

    def run(self, context: Context) -> Comparison:
        """What the reference's own cache does otherwise than its forward pass decides nothing."""
        result = super().run(context)
        off = [m for m in result.metrics if m.name.endswith(", reference") and not m.verdict.green]
        if not off:
            return result
        modes = {m.name.removesuffix(", reference").removeprefix("greedy tokens, ") for m in off}
        result.findings.append(
            f"the cache of transformers disagrees with its own forward pass ({', '.join(sorted(modes))}): "
            "there the subject is held against its own forward pass alone"
        )
        result.metrics = [
            m.model_copy(update={"gate": False})
            if m in off or any(m.name == f"{mode}, both through their caches" for mode in modes)
            else m
            for m in result.metrics
        ]
        return result


class SweepTokens:
    """Greedy tokens after a short and a long prompt, with the adapter of the gradient."""

    number: ClassVar[int] = 8
    name: ClassVar[str] = "greedy_decode"
    question: ClassVar[str] = "Does the model give the same tokens?"

    def run(self, context: Context) -> Comparison:
        """Ids, margins, and the loss of a given completion."""
        init = context.given("lora_init").group("adapter")
        adapter = filled(init, context.rng(self.number))
        scalars = {"prompts": list(PROMPTS), "expected": "and so on"}
        inputs = Trace(scalars=scalars).with_group("adapter", adapter)
        pair = context.pair("decode", inputs)
        result = Comparison()
        margins, noise = margins_of(pair, len(PROMPTS))
        for index, what in enumerate(("a short prompt", "a long prompt")):
            result.metrics.append(ids_metric(f"ids after {what}", index, pair, noise))
        found = compare(MARGINS, *margins, noise) if margins[0].size else nothing(MARGINS)
        result.metrics.append(found)
        key = "completion_loss"
        metric = compare(key, pair.subject.arrays[key], pair.reference.arrays[key], pair.noise)
        result.metrics.append(metric.model_copy(update={"name": "loss of a given completion"}))
        return result


STAGES: Mapping[str, Stage] = {
    LOGITS: SweepLogits(), GRADIENT: SweepGradient(), CACHE: SweepCache(), TOKENS: SweepTokens(),
}  # fmt: skip


def targets(modules: Mapping[str, str], present: Iterable[str]) -> list[str]:
    """Last parts of the names of linear modules that both sides have, under the same names.

    Args:
        modules: Name → class of the reference's modules; `linear` are torch's own.
        present: Canonical names of the subject's modules.
    """
    theirs: dict[str, dict[str, str]] = {}
    for name, kind in modules.items():
        named = canonical(name)
        theirs.setdefault(named.rpartition(".")[2], {})[named] = kind
    ours: dict[str, set[str]] = {}
    for name in present:
        ours.setdefault(name.rpartition(".")[2], set()).add(name)
    found = []
    for last, kinds in theirs.items():
        inside = all(layer_of(name) is not None for name in kinds)
        linear = set(kinds.values()) == {"linear"}
        chosen = re.fullmatch(r".*(gate|router|classifier|head)", last) is None
        if inside and linear and chosen and ours.get(last) == set(kinds):
            found.append(last)
    return sorted(found)
