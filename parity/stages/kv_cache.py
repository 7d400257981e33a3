"""Stage 10: a conversation with a KV cache and without one, on each path and across them."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from parity.errors import Unsupported
from parity.judge.compare import compare, compare_exact, side_off
from parity.judge.noise import Noise, distance
from parity.record import Metric, Verdict
from parity.stages.context import Comparison, Context
from parity.stages.gradient import filled
from parity.stages.pair import Pair
from parity.trace import Array, Trace

TURNS = (11, 5, 30, 7, 8, 9, 70, 6)
"""Tokens of each turn, replies being the odd ones. The sliding window of the tiny models (64) is
reached in a reply, crossed again and again, and shorter than one turn."""
ENDS = tuple(int(end) for end in np.cumsum(TURNS))
TRIMMED = 2
"""The turn that is taken out of the cache and fed again."""
MODES = {
    "prefill": "turns fed at once",
    "steps": "replies token by token",
    "trimmed": "cache trimmed and fed again",
}


class KvCache:
    """Cached against uncached logits on each path; cached logits across the paths."""

    number: ClassVar[int] = 10
    name: ClassVar[str] = "kv_cache"
    question: ClassVar[str] = (
        "Does decoding with a cache give what decoding without one gives, turn by turn?"
    )

    def run(self, context: Context) -> Comparison:
        """On one path and across them alike, what rounding explains is measured on the reference."""
        result = Comparison()
        pair = context.pair("kv_cache", self.inputs(context, result.findings))
        for side, trace in (("subject", pair.subject), ("reference", pair.reference)):
            _within(side, trace, pair, result)
        _across(pair, result)
        return result

    def inputs(self, context: Context, findings: list[str]) -> Trace:
        """The conversation; why it goes without an adapter is added to the findings."""
        return conversation(context, findings)


def conversation(context: Context, findings: list[str] | None = None) -> Trace:
    """Seeded random ids in turns, and an adapter whose B is not zero.

    Where the recipe's adapter cannot be had the base is asked alone, which the findings say.
    """
    rng = context.rng(KvCache.number)
    try:
        init = context.given("lora_init").group("adapter")
    except Unsupported as error:
        init = {}
        if findings is not None:
            findings.append(f"without an adapter: {error}")
    turns = {
        f"turn.{index}": rng.integers(1, context.vocabulary, length).astype(np.int32)
        for index, length in enumerate(TURNS)
    }
    return Trace(turns, {"trim": TRIMMED}).with_group("adapter", filled(init, rng))


def positions(trace: Trace, mode: str) -> Array:
    """Where in the conversation the logits of a mode stand."""
    if mode == "steps":
        return trace.arrays["positions"]
    if mode == "trimmed":
        return np.arange(ENDS[TRIMMED - 1], ENDS[TRIMMED])
    return np.arange(ENDS[-1])


def turn_of(position: int) -> int:
    """The turn, from 1, in which a position stands."""
    return int(np.searchsorted(ENDS, position, side="right")) + 1


def _within(side: str, trace: Trace, pair: Pair, result: Comparison) -> None:
    """One path against itself.

    What rounding explains is measured on the reference's logits without a cache, for either side.
    """
    uncached = trace.arrays["uncached"]
    sources = pair.rounding("uncached")
    name = f"logits when the forward goes on, {side}"
    lengthened = trace.arrays["lengthened"]
    noise = Noise(False, given={name: sources})
    result.metrics.append(compare(name, lengthened, np.zeros_like(lengthened), noise))
    for mode, what in MODES.items():
        if mode not in trace.arrays:
            result.findings.append(f"{side}: {what}: {trace.scalars['untrimmed']}")
            continue
        at = positions(trace, mode)
        noise = Noise(False, given={mode: sources})
        metric = compare(mode, trace.arrays[mode], uncached[at], noise)
        metric, first = _placed(metric, f"{what}, {side}", trace.arrays[mode], uncached[at], at)
        result.metrics.append(metric)
        result.metrics.append(_greedy(f"greedy tokens, {what}, {side}", trace, mode, at, metric))
        # The earliest of all modes: a later mode may be off before the first one is.
        if first is not None and first < result.facts.get(f"{side} cache: position", np.inf):
            result.facts |= {
                f"{side} cache: turn": turn_of(first),
                f"{side} cache: position": first,
                f"{side} cache: start of the turn": (0, *ENDS)[turn_of(first) - 1],
                f"{side} cache: window": trace.scalars["window"] or 0,
            }
    if f"{side} cache: turn" in result.facts:
        window = trace.scalars["window"]
        result.findings.append(
            f"the {side}'s cache: {', '.join(trace.scalars['caches'])}"
            + (f", sliding window {window}" if window else "")
        )


def _across(pair: Pair, result: Comparison) -> None:
    """Logits that came through a cache, path against path."""
    off = False
    for mode in ("prefill", "steps"):
        at, theirs = (positions(trace, mode) for trace in (pair.subject, pair.reference))
        same = compare_exact(f"positions, {MODES[mode]}", at, theirs)
        if same.verdict is not Verdict.IDENTICAL:
            result.metrics.append(same)
            continue
        values = pair.subject.arrays[mode], pair.reference.arrays[mode]
        metric = compare(mode, *values, pair.noise)
        name = f"{MODES[mode]}, both through their caches"
        metric, first = _placed(metric, name, *values, at)
        result.metrics.append(_held_to_uncached(metric, pair, *values, at))
        off |= first is not None
    if off:
        values = pair.subject.arrays["uncached"], pair.reference.arrays["uncached"]
        if compare("uncached", *values, pair.noise).verdict is Verdict.DIVERGE:
            result.findings.append(
                "the logits without a cache differ as well: not the caches alone"
            )


def _held_to_uncached(
    metric: Metric, pair: Pair, subject: Array, reference: Array, at: Array
) -> Metric:
    """Which side is off by the float64 run without a cache: with one it shares the reference's faults."""
    truth = pair.noise.referee.get("uncached")
    if metric.verdict is not Verdict.DIVERGE or truth is None or truth[at].shape != subject.shape:
        return metric
    errors = distance(subject, truth[at]), distance(reference, truth[at])
    return metric.model_copy(
        update={
            "error_subject": errors[0],
            "error_reference": errors[1],
            "off": side_off(*errors, metric.floor),
        }
    )


def _placed(
    metric: Metric, name: str, subject: Array, reference: Array, at: Array
) -> tuple[Metric, int | None]:
    """The metric with the turn and position at which it first diverges, and that position."""
    if metric.verdict is not Verdict.DIVERGE or subject.shape != reference.shape:
        return metric.model_copy(update={"name": name}), None
    gaps = np.abs(subject.astype(np.float64) - reference).max(axis=-1)
    over = ~(gaps <= metric.tolerance)  # not a number is over, too
    first = int(at[over.argmax()])
    turns = {turn_of(int(position)) for position in at[over]}
    gap = float(gaps[over.argmax()])  # the value stays the greatest of all
    where = f"turn {turn_of(first)}, position {first}"
    note = (
        f"first off at {where}, by {gap:.3g}, later by up to {np.nanmax(gaps):.3g}; "
        f"{int(over.sum())} of {len(at)} positions in {len(turns)} turns"
    )
    update = {"name": name, "where": where, "note": note}
    return metric.model_copy(update=update), first


def _greedy(name: str, trace: Trace, mode: str, at: Array, metric: Metric) -> Metric:
    """The most likely tokens, which may differ where two are nearer than rounding can tell."""
    uncached = trace.arrays["uncached"][at]
    ours, theirs = trace.arrays[mode].argmax(-1), uncached.argmax(-1)
    found = compare_exact(name, ours, theirs)
    if found.verdict is not Verdict.DIVERGE:
        return found
    top = np.sort(uncached[ours != theirs], axis=-1)
    margin = float((top[:, -1] - top[:, -2]).max())
    tolerance = 2 * metric.tolerance  # both of two logits may move
    near = margin <= tolerance
    where = int(at[(ours != theirs).argmax()])
    place = f"turn {turn_of(where)}, position {where}"
    return found.model_copy(
        update={
            "verdict": Verdict.AGREE if near else Verdict.DIVERGE,
            "value": margin,
            "tolerance": tolerance,
            "minimum_required_tolerance": margin,
            "floor": 2 * metric.floor,
            "sources": metric.sources,
            "where": place,
            "note": f"{int((ours != theirs).sum())} tokens differ, first at {place}; greatest "
            f"margin {margin:.3g}" + (": near ties, decided by rounding" if near else ""),
        }
    )
