"""The first module whose backward pass differs, on the way from the loss to the input."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

from parity.bisect.pattern import tensors
from parity.bisect.place import Mark, Place, counted, differs, how_much, stands_out
from parity.judge.compare import compare_group
from parity.judge.noise import HEADROOM
from parity.names import LOGITS, layer_of
from parity.record import Metric, Record
from parity.stages.context import Context
from parity.stages.gradient import Gradient
from parity.stages.logits import Logits
from parity.stages.pair import Pair
from parity.trace import Trace

Metrics = Mapping[str, Metric]
Judge = Callable[[Metric | None], bool]
LOSS = "the loss"
FORWARD = "; it is made there, or before it in the forward pass by less than rounding explains"
"""Said of a place whose own difference is near its floor: forward values are not replaced."""
OUTSIDE = "taken outside of the loop the gradients"
"""Modules cannot be seen inside of it."""


def backward(context: Context, record: Record) -> Place:
    """The first module that is handed the gradient the reference is handed, and makes another of it.

    Confirmed by replacing the gradient that arrives at each module's output by the reference's: then
    no error is passed on, and what still differs is off by itself. Where the record is off by more
    than rounding, a module that is off by rounding alone does not explain it and is no place.
    """
    order: list[str] = []
    explains = stands_out if any(map(stands_out, record.metrics)) else differs
    rounded = False
    for rows, what in Gradient().inputs(context):
        pair = context.pair("gradient", Trace(rows.arrays, {"modules": True}))
        if not all("order" in trace.scalars for trace in (pair.subject, pair.reference)):
            order = order or _calls(context)
            if place := by_adapters(pair, order, what, explains):
                return place
            continue
        seen = BackwardComparison(pair, pair.subject)
        if seen.any(explains):
            return _place(context, rows, seen, what)
        rounded = rounded or seen.any(differs)
    how = "differ by no more than rounding" if rounded else "agree"
    return Place(f"{record.reason}; {OUTSIDE} {how} at every common module")


@dataclass(frozen=True)
class BackwardComparison:
    """One backward pass of the subject against the reference's."""

    pair: Pair
    subject: Trace

    @cached_property
    def outputs(self) -> Metrics:
        """At each module's output, in the order of calls."""
        found = self._metrics("activation")
        return {name: found[name] for name in self.pair.reference.scalars["order"] if name in found}

    @cached_property
    def inputs(self) -> Metrics:
        """At each module's first argument."""
        return self._metrics("input")

    @cached_property
    def parameters(self) -> Metrics:
        """Of each tensor of the adapter."""
        return self._metrics("gradient")

    def any(self, judge: Judge) -> bool:
        """Whether anything is off, as a judge has it."""
        return any(
            judge(m) for g in (self.outputs, self.inputs, self.parameters) for m in g.values()
        )

    @property
    def off_parameters(self) -> list[str]:
        """Tensors of the adapter whose gradients differ."""
        return [name for name, metric in self.parameters.items() if differs(metric)]

    def own(self, module: str) -> list[str]:
        """Those of a module itself."""
        return [name for name in self.off_parameters if name.rpartition(".")[0] == module]

    def off(self) -> list[str]:
        """Modules that make another gradient of an equal one, loss first; the innermost only."""
        return self._inner([n for n in self._passing(differs) if not differs(self.outputs[n])])

    def alone(self) -> tuple[list[str], int]:
        """Modules that are off when each is given the reference's gradient, loss first.

        Where bits decide, other operations beside the place may round otherwise (on a GPU a compiler
        fuses them anew): modules that are off by rounding alone are no place where another is off by
        more. Their number is the second value.
        """
        bad, far = self._bad(differs), self._bad(stands_out)
        return (far, len(set(bad) - set(far))) if far else (bad, 0)

    def _bad(self, differs: Judge) -> list[str]:
        """All that are off, as a judge has it.

        Where a gradient differs at an output and no module after it is off, it is what is between
        the modules: then the one around them is named.
        """
        order = [*self.outputs, LOSS]
        bad = {name: order.index(name) for name in self._inner(self._passing(differs))}
        for at, (name, metric) in enumerate(self.outputs.items()):
            around = self.around(name)
            takers = [n for n in order[at + 1 : -1] if self.around(n) == around]
            explained = any(m == n or m.startswith(f"{n}.") for n in takers for m in bad)
            if differs(metric) and not explained:
                who = around or (LOSS if name == LOGITS else f"what follows {name}")
                bad[who] = order.index(who) if who in order else at
        return sorted(bad, key=lambda name: -bad[name])

    def around(self, name: str) -> str:
        """The module that a module stands in; empty for the whole model."""
        parts = name.split(".")[:-1]
        prefixes = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
        return next((prefix for prefix in prefixes if prefix in self.outputs), "")

    def _passing(self, judge: Judge) -> list[str]:
        """Modules that pass on another gradient, or make one of their own tensors."""
        own = {n.rpartition(".")[0] for n, metric in self.parameters.items() if judge(metric)}
        return [n for n in self.outputs if judge(self.inputs.get(n)) or n in own][::-1]

    def _inner(self, names: list[str]) -> list[str]:
        return [n for n in names if not any(m.startswith(f"{n}.") for m in names)]

    def _metrics(self, group: str) -> dict[str, Metric]:
        ours, theirs = self.subject.group(group), self.pair.reference.group(group)
        noise = self.pair.noise_of(group)
        return {
            n: compare_group(n, {n: ours[n]}, {n: theirs[n]}, noise)
            for n in theirs
            if n in ours and ours[n].shape == theirs[n].shape
        }


def _place(context: Context, rows: Trace, seen: BackwardComparison, what: str) -> Place:
    theirs = seen.pair.reference.group("activation")
    given = rows.with_group("replace", {name: theirs[name] for name in seen.outputs})
    given.scalars["modules"] = True
    recipe = context.recipes["subject"]
    replaced = BackwardComparison(seen.pair, context.capture("subject", "gradient", recipe, given))
    alone, rounded = replaced.alone()
    name, words = _first(seen, replaced, alone, stands_out if rounded else differs)
    walk = [
        Mark(n, m.value, m.floor, differs(m), n in alone)
        for n, m in reversed(list(seen.outputs.items()))
    ]
    confirmed = _confirmed(replaced, name, alone, rounded)
    if near_rounding(replaced, name):
        words = words.replace("first bad module ", "at module ") + FORWARD
        confirmed = confirmed.removeprefix("confirmed: ")
    sentence = f"backwards from the loss ({what}) {words}; {_extent(seen)}; {confirmed}"
    return Place(sentence, name, "backward", walk)


def near_rounding(replaced: BackwardComparison, name: str) -> bool:
    """Whether a module's own difference is so near its floor that other forward values could make it."""
    if not name or replaced.pair.exact:
        return False
    groups = (replaced.outputs, replaced.inputs, replaced.parameters)
    own = [m for g in groups for n, m in g.items() if n == name or n.startswith(f"{name}.")]
    off = [m for m in own if differs(m)]
    return bool(off) and all(m.value <= HEADROOM**2 * m.floor for m in off)


def _first(
    seen: BackwardComparison, replaced: BackwardComparison, alone: list[str], judge: Judge
) -> tuple[str, str]:
    """The place, and in words what is wrong there."""
    loss, off = seen.outputs.get(LOGITS), seen.off()
    if loss is not None and differs(loss):
        return LOSS, f"the gradient of the loss at the logits differs already: {how_much(loss)}"
    if not alone:
        at = f" (at the logits {how_much(loss)})" if loss is not None else ""
        return "", f"no module is off by itself: what differs has piled up since the loss{at}"
    # Handed the reference's gradient a module has no errors of others, and its own stands out.
    if off and off[0] in alone:
        name = off[0]
        words = f"the gradient at its output agrees, {_wrong(seen, name)}{_between(seen, name, differs)}"
    else:
        name = alone[0]
        words = f"handed the reference's gradient, {_wrong(replaced, name)}{_between(replaced, name, judge)}"
    return name, f"first bad module {name}: {words}"


def _wrong(seen: BackwardComparison, name: str) -> str:
    """What of a module's gradients differs."""
    passed, own = seen.inputs.get(name), seen.own(name)
    tensors = ", ".join(tensor.rpartition(".")[2] for tensor in own)
    if passed is not None and differs(passed):
        also = f"; so do those of its own {tensors}" if own else ""
        return f"the one that it passes on differs: {how_much(passed)}{also}"
    if own:
        return f"those of its own {tensors} differ: {how_much(seen.parameters[own[0]])}"
    inner = [m for n, m in seen.outputs.items() if seen.around(n) == name and differs(m)]
    return f"those inside it differ: {how_much(max(inner, key=lambda m: m.value))}" if inner else ""


def _between(seen: BackwardComparison, name: str, judge: Judge) -> str:
    """Where inside a module that has others inside, none of which is off."""
    inner = [n for n in seen.outputs if seen.around(n) == name]
    sides = {
        word: ", ".join(n.removeprefix(f"{name}.") for n in inner if judge(seen.outputs[n]) is bad)
        for word, bad in (("agree", False), ("differ", True))
    }
    if inner and not sides["differ"]:
        return " (inside it gradients agree at all modules: it is what goes past them)"
    words = " and ".join(f"{word} at {names}" for word, names in sides.items() if names)
    return f" (between its modules, where gradients {words})" if inner else ""


def _extent(seen: BackwardComparison) -> str:
    """Which gradients of the adapter differ."""
    off, every = seen.off_parameters, len(seen.parameters)
    if not off:
        return f"none of {every} gradients of the adapter differs beyond its floor"
    worst = max((seen.parameters[n] for n in off), key=lambda m: m.value / (m.floor or 1e-300))
    return f"of the adapter's gradients {tensors(off, seen.parameters)} differ, most {worst.name}: {how_much(worst)}"


def _confirmed(replaced: BackwardComparison, name: str, alone: list[str], rounded: int) -> str:
    layers = len({n for name in replaced.outputs if (n := layer_of(name)) is not None})
    left = [n for n in replaced.off_parameters if n.rpartition(".")[0] not in alone]
    also = ""
    if rounded:
        left = [n for n in left if stands_out(replaced.parameters[n])]
        also = f"; {rounded} others differ by no more than rounding"
    words = "handed the reference's gradient at every module, "
    if not alone:
        return words + (
            f"{len(left)} gradients of the adapter still differ" if left else "none does"
        )
    if alone == [name] and not left:
        return f"confirmed: {words}only {counted(alone, layers)} is off by itself{also}"
    words += f"off by itself: {counted(alone, layers)}{also}"
    return words + (f"; {len(left)} other gradients of the adapter still differ" if left else "")


def _calls(context: Context) -> list[str]:
    """Modules of the reference in the order of calls, without gradients."""
    inputs = Trace(Logits().inputs(context).arrays, {"modules": True})
    trace = context.capture("reference", "logits", context.recipes["reference"], inputs)
    return list(trace.scalars["order"])


def by_adapters(pair: Pair, order: list[str], what: str, judge: Judge = differs) -> Place | None:
    """The coarser search, by the gradients of the adapters, for paths that show no others."""
    ours, theirs = pair.subject.group("gradient"), pair.reference.group("gradient")
    noise, fine = pair.noise_of("gradient"), LOSS
    for module in reversed(order):
        names = [n for n in (f"{module}.lora_{part}" for part in "ab") if n in ours and n in theirs]
        if not names:
            continue
        metric = compare_group(
            module, {n: ours[n] for n in names}, {n: theirs[n] for n in names}, noise
        )
        if judge(metric):
            words = f"gradients of the adapters agree down to {fine} and differ from {module} on"
            sentence = f"backwards from the loss ({what}) {words}: {how_much(metric)}"
            return Place(sentence, module, "backward")
        fine = module
    return None
