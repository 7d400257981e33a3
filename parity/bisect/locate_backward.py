"""The first module whose backward pass differs, on the way from the loss to the input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from parity.bisect.place import Mark, Place, counted, differs, how_much
from parity.numerics import compare_group
from parity.record import Metric
from parity.stages.base import Context, Pair
from parity.stages.gradient import Gradient
from parity.stages.logits import Logits
from parity.trace import LOGITS, Trace, layer_of

Metrics = Mapping[str, Metric]
LOSS = "the loss"


def backward(context: Context) -> Place:
    """The first module that is handed the gradient the reference is handed, and makes another of it.

    Confirmed by replacing the gradient that arrives at each module's output by the reference's: then
    no error is passed on, and what still differs is off by itself.
    """
    order: list[str] = []
    for rows, what in Gradient().inputs(context):
        pair = context.pair("gradient", Trace(rows.arrays, {"modules": True}))
        if not all("order" in trace.scalars for trace in (pair.subject, pair.reference)):
            order = order or _calls(context)
            if place := by_adapters(pair, order, what):
                return place
            continue
        seen = Seen(pair, pair.subject)
        if seen.differ:
            return _place(context, rows, seen, what)
    return Place("at every common module the gradients agree")


@dataclass(frozen=True)
class Seen:
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

    @property
    def differ(self) -> bool:
        """Whether anything does."""
        return any(
            differs(m) for g in (self.outputs, self.inputs, self.parameters) for m in g.values()
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
        return self._inner([n for n in self._passing() if not differs(self.outputs[n])])

    def alone(self) -> list[str]:
        """Modules that are off when each is given the reference's gradient, loss first.

        Where a gradient differs at an output and no module after it is off, it is what is between
        the modules: then the one around them is named.
        """
        bad, order = self._inner(self._passing()), list(self.outputs)
        for name, metric in self.outputs.items():
            if not differs(metric):
                continue
            around, at = self.around(name), order.index(name)
            takers = [n for n in order[at + 1 :] if self.around(n) == around]
            if not any(m == taker or m.startswith(f"{taker}.") for taker in takers for m in bad):
                bad.append(around or (LOSS if name == LOGITS else f"what follows {name}"))
        return list(dict.fromkeys(bad))

    def around(self, name: str) -> str:
        """The module that a module stands in; empty for the whole model."""
        parts = name.split(".")[:-1]
        prefixes = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
        return next((prefix for prefix in prefixes if prefix in self.outputs), "")

    def _passing(self) -> list[str]:
        """Modules that pass on another gradient, or make one of their own tensors."""
        bad = [n for n in self.outputs if differs(self.inputs.get(n)) or self.own(n)]
        return bad[::-1]

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


def _place(context: Context, rows: Trace, seen: Seen, what: str) -> Place:
    theirs = seen.pair.reference.group("activation")
    given = rows.with_group("replace", {name: theirs[name] for name in seen.outputs})
    given.scalars["modules"] = True
    recipe = context.recipes["subject"]
    replaced = Seen(seen.pair, context.capture("subject", "gradient", recipe, given))
    alone = replaced.alone()
    name, said = _first(seen, alone)
    walk = [
        Mark(n, m.value, m.floor, differs(m), n in alone)
        for n, m in reversed(list(seen.outputs.items()))
    ]
    sentence = f"backwards from the loss ({what}) {said}; {_extent(seen)}; {_confirmed(replaced, name, alone)}"
    return Place(sentence, name, "backward", walk)


def _first(seen: Seen, alone: list[str]) -> tuple[str, str]:
    """The place, and in words what is wrong there."""
    loss = seen.outputs.get(LOGITS)
    if loss is not None and differs(loss):
        return LOSS, f"the gradient of the loss at the logits differs already: {how_much(loss)}"
    if name := next(iter(seen.off() or alone), ""):
        passed, own = seen.inputs.get(name), seen.own(name)
        said = f"first bad module {name}: the gradient at its output agrees, "
        tensors = ", ".join(tensor.rpartition(".")[2] for tensor in own)
        if passed is not None and differs(passed):
            said += f"the one that it passes on differs: {how_much(passed)}"
            said += f"; so do those of its own {tensors}" if own else ""
        elif own:
            said += f"those of its own {tensors} differ: {how_much(seen.parameters[own[0]])}"
        else:
            said = f"first bad module {name}"
        return name, said + _between(seen, name)
    fine = LOSS
    for name, metric in reversed(list(seen.outputs.items())):
        if differs(metric):
            said = f"gradients agree down to {fine} and differ from {name} on: {how_much(metric)}"
            return name, said
        fine = name
    tensor = next(iter(seen.off_parameters))
    return tensor, f"only adapters differ, first {tensor}: {how_much(seen.parameters[tensor])}"


def _between(seen: Seen, name: str) -> str:
    """Where inside a module that has others inside, none of which is off."""
    inner = [n for n in seen.outputs if seen.around(n) == name]
    if not inner:
        return ""
    sides = {
        word: ", ".join(
            n.removeprefix(f"{name}.") for n in inner if differs(seen.outputs[n]) is bad
        )
        for word, bad in (("agree", False), ("differ", True))
    }
    if not sides["differ"]:
        return " (inside it gradients agree at all modules: it is what goes past them)"
    said = " and ".join(f"{word} at {names}" for word, names in sides.items() if names)
    return f" (between its modules, where gradients {said})"


def _extent(seen: Seen) -> str:
    """Which gradients of the adapter differ."""
    off, every = seen.off_parameters, len(seen.parameters)
    if not off:
        return f"none of {every} gradients of the adapter differs beyond its floor"
    layers = sorted({n for name in off if (n := layer_of(name)) is not None})
    where = ""
    if layers:
        span = f"layers {layers[0]} to {layers[-1]}" if layers[1:] else f"layer {layers[0]}"
        where = f" ({span})"
    return f"{len(off)} of {every} gradients of the adapter differ{where}"


def _confirmed(replaced: Seen, name: str, alone: list[str]) -> str:
    layers = len({n for name in replaced.outputs if (n := layer_of(name)) is not None})
    left = [n for n in replaced.off_parameters if n.rpartition(".")[0] not in alone]
    said = "handed the reference's gradient at every module, "
    if alone == [name] and not left:
        return f"confirmed: {said}only {counted(alone, layers)} is off by itself"
    said += f"off by itself: {counted(alone, layers)}" if alone else "no module is off by itself"
    return said + (f"; {len(left)} other gradients of the adapter still differ" if left else "")


def _calls(context: Context) -> list[str]:
    """Modules of the reference in the order of calls, without gradients."""
    inputs = Trace(Logits().inputs(context).arrays, {"modules": True})
    trace = context.capture("reference", "logits", context.recipes["reference"], inputs)
    return list(trace.scalars["order"])


def by_adapters(pair: Pair, order: list[str], what: str) -> Place | None:
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
        if differs(metric):
            said = f"gradients of the adapters agree down to {fine} and differ from {module} on"
            sentence = f"backwards from the loss ({what}) {said}: {how_much(metric)}"
            return Place(sentence, module, "backward")
        fine = module
    return None
