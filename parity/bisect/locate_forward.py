"""The first module whose output differs, on the way from the input to the logits."""

from __future__ import annotations

import re
from collections.abc import Mapping

from parity.bisect.place import Mark, Place, counted, differs, how_much
from parity.judge.compare import compare_group
from parity.judge.noise import distance
from parity.names import layer_of
from parity.record import Metric
from parity.stages.context import Context, Pair
from parity.stages.logits import Logits
from parity.trace import Array, Trace


def forward(context: Context) -> Place:
    """The first module whose output differs though what came before agrees.

    Confirmed in two ways by substitution: with the reference's output in its place the divergence
    downstream must vanish; and with every layer's output replaced, so that no error is passed on, the
    modules that are off by themselves are counted.
    """
    inputs = Logits().inputs(context)
    for index in range(2):
        rows = Trace({"ids.0": inputs.arrays[f"ids.{index}"]}, {"modules": True})
        pair = context.pair("logits", rows)
        metrics = by_module(pair, pair.subject)
        first = next(filter(differs, metrics), None)
        if first is None:
            continue
        theirs = pair.reference.group("module.0")
        off, said = _by_layer(context, rows, pair, theirs)
        sentence = (
            f"first bad module {first.name}: {how_much(first)}; "
            f"{_downstream(context, rows, pair, first.name, theirs)}{said}"
        )
        walk = [Mark(m.name, m.value, m.floor, differs(m), m.name in off) for m in metrics]
        return Place(sentence, first.name, "forward", walk)
    return Place("no common module differs beyond its floor: the difference is after them")


def by_module(pair: Pair, subject: Trace) -> list[Metric]:
    """Outputs of the modules that both sides have, in the order of calls."""
    ours, theirs = subject.group("module.0"), pair.reference.group("module.0")
    noise = pair.noise_of("module.0")
    common = [
        n for n in subject.scalars["order"] if n in theirs and ours[n].shape == theirs[n].shape
    ]
    return [compare_group(n, {n: ours[n]}, {n: theirs[n]}, noise) for n in common]


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


def _by_layer(
    context: Context, rows: Trace, pair: Pair, theirs: Mapping[str, Array]
) -> tuple[set[str], str]:
    """The first module of each layer that is off by itself, and these in words."""
    layers = {name: value for name, value in theirs.items() if re.fullmatch(r"layers\.\d+", name)}
    if not layers:
        return set(), ""
    firsts: dict[int, str] = {}
    for metric in filter(differs, by_module(pair, _replaced(context, rows, layers))):
        if (layer := layer_of(metric.name)) is not None:
            firsts.setdefault(layer, metric.name)
    if not firsts:
        return set(), ""
    said = f"; each layer given the reference's input, off are: {counted(firsts.values(), len(layers))}"
    return set(firsts.values()), said
