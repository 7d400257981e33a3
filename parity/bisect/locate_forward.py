"""The first place that differs on the way from the input to the logits: a module, or between two."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from parity.bisect.activation import formula
from parity.bisect.locate_earlier import made_earlier
from parity.bisect.pattern import AXES, shape_of
from parity.bisect.place import Mark, Place, counted, differs, how_much
from parity.bisect.settings import suspected_setting
from parity.judge.compare import compare, compare_group
from parity.judge.noise import HEADROOM, distance
from parity.names import layer_of
from parity.record import Metric
from parity.stages.context import Context
from parity.stages.logits import Logits
from parity.stages.pair import Pair
from parity.trace import Array, Trace

Event = tuple[str, str]
"""("in" or "out", name): the first argument of a module, or its output."""
GROUPS = {"in": "input.0", "out": "module.0"}
AFTER = (
    "at all modules of both sides inputs and outputs agree: the difference is between the last of them "
    "and the logits"
)
SHOWN = 0.01
"""Least share of the error of the logits that is a place of its own: less would not show in the two errors
that the sentence gives with three digits."""
BEHIND = 5
"""How many differences of one layer that hardly show may hide another, which does."""
TRIED = 3
"""Places that are tried behind them: what further layers have is like these."""
MOST = ("confirmed", "most of it")
"""How a sentence begins of a place without which the rest is rounding, or a tenth of the error at most."""


@dataclass(frozen=True)
class ForwardComparison:
    """One forward pass of the subject against the reference's, event by event."""

    pair: Pair
    subject: Trace

    @cached_property
    def metrics(self) -> dict[Event, Metric]:
        """What both sides have in one shape, in the order of the subject's calls."""
        reference, found = self.pair.reference, dict[Event, Metric]()
        noise = {event: self.pair.noise_of(group) for event, group in GROUPS.items()}
        for event, name in _events(self.subject):
            ours, theirs = (
                t.arrays.get(f"{GROUPS[event]}/{name}") for t in (self.subject, reference)
            )
            if ours is not None and theirs is not None and ours.shape == theirs.shape:
                metric = compare_group(name, {name: ours}, {name: theirs}, noise[event])
                found[event, name] = metric
        return found

    @property
    def bad(self) -> list[Event]:
        """Events that differ, in their order."""
        return [event for event, metric in self.metrics.items() if differs(metric)]

    def own(self, layer: int | None) -> list[Event]:
        """Those inside one layer, or outside of all."""
        return [event for event in self.bad if _layer(event[1]) == layer]

    def before(self, event: Event) -> list[Event]:
        """Events before this one inside the same module, which all agree if it is the first."""
        around, order = self.around(event), list(self.metrics)
        inside = [e for e in order[: order.index(event)] if e[1].startswith(around)]
        return [e for e in inside if not differs(self.metrics[e])]

    def around(self, event: Event) -> str:
        """What the names of all that stands in the same module begin with; empty: the whole model."""
        kind, name = event
        parts = name.split(".")[: None if kind == "out" else -1]
        prefixes = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
        return next((f"{prefix}." for prefix in prefixes if ("out", prefix) in self.metrics), "")

    def values(self, event: Event) -> tuple[Array, Array]:
        """The subject's and the reference's array."""
        kind, name = event
        ours, theirs = (
            t.arrays[f"{GROUPS[kind]}/{name}"] for t in (self.subject, self.pair.reference)
        )
        return ours, theirs

    def uncalled(self) -> Iterator[tuple[str, str]]:
        """(side that does not call it, name) of modules that one side calls and the other does not.

        Frameworks cut their models into other modules, so that a name that is unknown to a side is
        none; but it is one where that side has the module, or calls its like in another layer.
        """
        traces = {"subject": self.subject, "reference": self.pair.reference}
        if not all("called" in trace.scalars for trace in traces.values()):
            return
        calls = {side: set(trace.scalars["called"]) for side, trace in traces.items()}
        for side, other in (("subject", "reference"), ("reference", "subject")):
            known = set(traces[side].scalars["present"])
            kinds = {re.sub(r"\.\d+\.", ".", name) for name in calls[side]}
            for name in traces[other].scalars["called"]:
                missing = name not in calls[side] and "#" not in name
                if missing and (name in known or re.sub(r"\.\d+\.", ".", name) in kinds):
                    yield side, name


def forward(context: Context) -> Place:
    """The first event that differs though what came before agrees, confirmed by substitution.

    A place is named only where the reference's values in it move the logits. With the reference's
    input for every layer, so that no error is passed on, what is off first in each is counted.
    """
    inputs = Logits().inputs(context)
    for index in range(2):
        scalars = {"modules": True, "inputs": True}
        rows = Trace({"ids.0": inputs.arrays[f"ids.{index}"]}, scalars)
        pair = context.pair("logits", rows)
        logits = [trace.arrays["logits.0"] for trace in (pair.subject, pair.reference)]
        seen = ForwardComparison(pair, pair.subject)
        if differs(compare("logits.0", logits[0], logits[1], pair.noise)):
            return _place(context, rows, seen) if seen.bad else Place(AFTER)
    return Place("the logits of one row at a time agree: no place is named")


@dataclass(frozen=True)
class _Found:
    """A place that was tried: what the reference's values in it do to the logits."""

    event: Event
    seen: ForwardComparison
    confirmed: str
    left: float
    """Error of the logits that is left with them."""
    given: str = ""
    """Where else the reference's values were given, in words."""


def _place(context: Context, rows: Trace, seen: ForwardComparison) -> Place:
    firsts = _firsts(alone := _alone(context, rows, seen))
    silent: list[Event] = []
    found = _tried(context, rows, seen, alone, dict.fromkeys([seen.bad[0], *firsts]), silent)
    behind = None
    if not (found and found.confirmed.startswith(MOST)):
        behind = _behind(context, rows, seen, firsts, found)
    if not (found or behind):
        return Place(f"{_silent(silent)}: no place is named", "", "forward", _walk(seen, set()))
    sentence = []
    name = ""
    if found:
        if earlier := made_earlier(context, rows, found.seen, found.event):
            words, name = earlier
        else:
            words, name = _words(found.seen, found.event), _name(found.seen, found.event)
        sentence += [words, found.confirmed]
    if silent:
        sentence.append(f"{_silent(silent)}: not the place")
    layers = len({n for _, name in seen.metrics if (n := layer_of(name)) is not None})
    kinds = counted([_name(alone, e) for e in firsts], layers)
    if firsts:
        sentence.append(f"each layer given the reference's input, first off in it: {kinds}")
    if behind:
        name = _name(behind.seen, behind.event)
        words = _words(behind.seen, behind.event)
        sentence += [f"{behind.given}, {words}", behind.confirmed]
    last = behind or found
    # A setting is read by all layers: where one place alone is wrong it is none.
    if last and not last.confirmed.startswith(MOST) and (
        setting := suspected_setting(context, rows, seen.pair, _first_position(last.seen, last.event))
    ):  # fmt: skip
        sentence.append(setting)
    off = {_name(alone, e) for e in firsts} or {name}
    return Place("; ".join(sentence), name, "forward", _walk(seen, off))


def _tried(
    context: Context,
    rows: Trace,
    seen: ForwardComparison,
    alone: ForwardComparison,
    events: Iterable[Event],
    silent: list[Event],
) -> _Found | None:
    """The first event in whose place the reference's values move the logits; those before are silent."""
    for event in events:
        # What is off by itself is described where it has no error of others.
        where = seen if event == seen.bad[0] else alone
        confirmed, left = _confirmed(context, rows, where, event)
        if confirmed:
            return _Found(event, where, confirmed, left)
        silent.append(event)
    return None


def _behind(
    context: Context, rows: Trace, seen: ForwardComparison, firsts: list[Event], found: _Found | None
) -> _Found | None:  # fmt: skip
    """What makes more of the error than what stands before it in its layer, if anything does."""
    alike: set[tuple[str, str]] = set()
    for _ in range(BEHIND):
        alike |= {(kind, _in_any_layer(name)) for kind, name in firsts}
        alone = _alone(context, rows, seen, alike)
        firsts = [e for e in _firsts(alone) if (e[0], _in_any_layer(e[1])) not in alike]
        behind = _tried(context, rows, seen, alone, firsts[:TRIED], [])
        if behind and (found is None or behind.left < found.left):
            kinds = ", ".join(sorted({name.removeprefix("layers.*.") for _, name in alike}))
            given = f"with the reference's values at {kinds} of each layer"
            return replace(behind, given=given)
    return None


def _alone(
    context: Context,
    rows: Trace,
    seen: ForwardComparison,
    alike: Collection[tuple[str, str]] = (),
) -> ForwardComparison:
    """The same with the reference's input and output for every layer: no error is passed on.

    Args:
        context: The cell.
        rows: What is run.
        seen: The comparison as it is.
        alike: Events, by their names in any layer, that have the reference's values as well.
    """
    theirs = {
        event: {
            n: v
            for n, v in seen.pair.reference.group(group).items()
            if _is_layer(n) or (event, _in_any_layer(n.partition("#")[0])) in alike
        }
        for event, group in GROUPS.items()
    }
    given = rows.with_group("replace", theirs["out"]).with_group("replace_input", theirs["in"])
    return ForwardComparison(seen.pair, _subject(context, given))


def _in_any_layer(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name)


def _firsts(alone: ForwardComparison) -> list[Event]:
    """The first event of each layer, and of what stands outside them, that differs."""
    firsts: dict[int | None, Event] = {}
    for event in alone.bad:
        outside = layer_of(event[1]) is None and not _is_layer(event[1])
        firsts.setdefault(None if outside else _layer(event[1]), event)
    return sorted(firsts.values(), key=list(alone.metrics).index)


def _events(trace: Trace) -> list[Event]:
    """What was observed, in its order; outputs alone of a path that shows no arguments."""
    if "events" not in trace.scalars:
        return [("out", name) for name in trace.scalars["order"]]
    return [(kind, name) for kind, name in trace.scalars["events"]]


def _layer(name: str) -> int | None:
    """The layer that a name stands for or in."""
    return layer_of(f"{name}.")


def _is_layer(name: str) -> bool:
    return re.fullmatch(r"layers\.\d+", name) is not None


def _subject(context: Context, rows: Trace) -> Trace:
    return context.capture("subject", "logits", context.recipes["subject"], rows)


def _confirmed(
    context: Context, rows: Trace, seen: ForwardComparison, event: Event
) -> tuple[str, float]:
    """What the reference's values in a place do to the logits, empty where nothing, and the error left."""
    tries = [event]
    if event[0] == "in" and (outer := seen.around(event)[:-1]):
        tries.append(("out", outer))  # the residual goes past the input of a module
    theirs = seen.pair.reference.arrays["logits.0"]
    before = seen.pair.subject.arrays["logits.0"]
    error = distance(before, theirs)
    words, least = "", error
    for which, where in tries:
        group = "replace" if which == "out" else "replace_input"
        calls = seen.pair.reference.group(GROUPS[which])
        given = {n: v for n, v in calls.items() if n.partition("#")[0] == where.partition("#")[0]}
        after = _subject(context, rows.with_group(group, given)).arrays["logits.0"]
        what = "output" if which == "out" else "input"
        left = distance(after, theirs)
        effect = (
            f"with the reference's {what} of {where} in its place the error of the logits goes from "
            f"{error:.3g} to {left:.3g}"
        )
        floor = HEADROOM * seen.pair.noise.floor("logits.0", theirs)
        if left <= floor:
            return f"{MOST[0]}, {effect}", left
        if left <= error / 10:
            return f"{MOST[1]}, {effect}, where rounding explains {floor:.2g}", left
        if not words and distance(after, before) > max(floor, SHOWN * error):
            words, least = f"not the only one, {effect}", left
    return words, least


def _silent(events: Iterable[Event]) -> str:
    named = ", ".join(_event(event) for event in list(events)[:3])
    return f"the logits do not move with the reference's values at {named}, which differ"


def _event(event: Event) -> str:
    kind, name = event
    return f"the {'input' if kind == 'in' else 'output'} of {name}"


def _name(seen: ForwardComparison, event: Event) -> str:
    """The module that is named: the one that makes it, or the one around what is between modules."""
    kind, name = event
    return name if kind == "out" else seen.around(event)[:-1] or name


def _words(seen: ForwardComparison, event: Event) -> str:
    """The place in words: what agrees before it, what differs, how far and in which shape."""
    kind, name = event
    metric, before = seen.metrics[event], seen.before(event)
    ours, theirs = seen.values(event)
    shape = shape_of(ours, theirs, metric.tolerance)
    much = how_much(metric) + (f", {shape}" if shape else "")
    entered = ("in", name) in seen.metrics and not differs(seen.metrics["in", name])
    if kind == "out" and not before:
        agrees = "its input agrees and its output differs" if entered else "its output differs"
        return f"first bad module {name}: {agrees}: {much}"
    around = seen.around(event)[:-1]
    if kind == "out":
        start = f"{_event(before[-1])} (agrees) and {_event(event)} (differs)"
        return f"first bad module {name}: between {start}: {much}{_missing(seen, around)}"
    where = f" in {around}" if around else ""
    start = f"{_event(before[-1])} (agrees)" if before else "what goes into it"
    if not before and not around:
        start = "the ids"
    made = _recomputed(seen, event)
    return (
        f"between {start} and {_event(event)} (differs){where}: {much}"
        f"{made}{_missing(seen, around)}"
    )


def _missing(seen: ForwardComparison, around: str) -> str:
    """Modules there that one side does not call."""
    inside = [(s, n) for s, n in seen.uncalled() if n.startswith(around)]
    if not inside:
        return ""
    side, name = inside[0]
    more = f" and {len(inside) - 1} others" if len(inside) > 1 else ""
    other = {"subject": "reference", "reference": "subject"}[side]
    return f"; the {side} does not call {name}{more}, the {other} does"


def _recomputed(seen: ForwardComparison, event: Event) -> str:
    """The activation between two products on each side, where the formula gives what was captured."""
    around, (_, name) = seen.around(event), event
    found = {}
    pairs = zip(
        ("subject", "reference"),
        seen.values(event),
        (seen.subject, seen.pair.reference),
        strict=True,
    )
    for side, result, trace in pairs:
        factors = {
            n.removeprefix(around): trace.arrays[f"module.0/{n}"]
            for kind, n in seen.before(event)
            if kind == "out" and n != name and "." not in n.removeprefix(around)
        }
        tolerance = max(seen.metrics[event].tolerance, HEADROOM * seen.metrics[event].floor)
        found[side] = formula(result, factors, tolerance)[0]
    if not all(found.values()) or found["subject"] == found["reference"]:
        return ""
    return (
        f"; computed again from these, the subject's is {found['subject']}, the reference's "
        f"{found['reference']}"
    )


def _first_position(seen: ForwardComparison, event: Event) -> int:
    """The first position that is off at an event."""
    ours, theirs = seen.values(event)
    over = ~(np.abs(ours.astype(np.float64) - theirs) <= seen.metrics[event].tolerance)
    axis = AXES.get(over.ndim, ()).index("position") if over.ndim in (3, 4) else 0
    return int(over.any(axis=tuple(i for i in range(over.ndim) if i != axis)).argmax())


def _walk(seen: ForwardComparison, off: set[str]) -> list[Mark]:
    outputs: Mapping[str, Metric] = {n: m for (kind, n), m in seen.metrics.items() if kind == "out"}
    return [Mark(n, m.value, m.floor, differs(m), n in off) for n, m in outputs.items()]
