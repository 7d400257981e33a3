"""A difference that is made earlier than where it first is beyond rounding, and in which layer.

Where a small fault is made its difference may be within what rounding explains, and only grow beyond it
further on. So the first place that differs is given the reference's values of all that comes before
it: if it agrees then, it only passes on what it got.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from parity.bisect.place import how_much
from parity.judge.noise import distance
from parity.names import layer_of
from parity.stages.context import Context
from parity.trace import Array, Trace

if TYPE_CHECKING:
    from parity.bisect.locate_forward import Event, ForwardComparison


def made_earlier(
    context: Context, rows: Trace, seen: ForwardComparison, event: Event
) -> tuple[str, str] | None:
    """The place in words and its name, empty where none is; None where the event is the place itself.

    Args:
        context: The cell.
        rows: The ids that were run.
        seen: The comparison in which the event differs.
        event: The first that is beyond rounding.
    """
    if seen.pair.exact:
        return None  # what agrees there has equal bits
    reference, (kind, name), around = seen.pair.reference, event, seen.around(event)[:-1]
    before = seen.before(event) if kind == "in" or seen.before(event) else [("in", name)]
    outputs = {n: reference.arrays[f"module.0/{n}"] for k, n in before if k == "out"}
    inputs = {
        n: v for n, v in reference.group("input.0").items() if n.partition("#")[0] in (around, name)
    }
    if kind == "in":
        inputs.pop(name, None)
    if (not outputs and not inputs) or _left(context, rows, seen, event, outputs, inputs) > 0.5:
        return None
    start = f"the first that is beyond rounding is the {'input' if kind == 'in' else 'output'} of {name}"
    words = (
        f"{start}: {how_much(seen.metrics[event])}; with the reference's values before it in its place it "
        "agrees: the difference is made earlier, where it is within what rounding explains"
    )
    layer = _layer(context, rows, seen, event)
    if layer is None:
        return f"{words}; no module is named", ""
    gone = f" and is gone with that of layers.{layer + 1}" * (layer != layer_of(f"{name}."))
    proof = (
        f"it stays with the reference's input of layers.{layer}{gone}: it is made in layers.{layer}"
    )
    return f"{words}; {proof}", f"layers.{layer}"


def _layer(context: Context, rows: Trace, seen: ForwardComparison, event: Event) -> int | None:
    """The layer in which the difference at an event is made, if one alone makes it."""
    last = layer_of(f"{event[1]}.")
    known = seen.pair.reference.group("input.0")
    if last is None or "layers.0" not in known:
        return None

    def stays(layer: int) -> bool:
        name = f"layers.{layer}"
        return _left(context, rows, seen, event, {}, {name: known[name]}) > 0.5

    if not stays(0) or stays(last):
        return None if not stays(0) else last
    low, high = 0, last
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if stays(middle) else (low, middle)
    return low


def _left(
    context: Context,
    rows: Trace,
    seen: ForwardComparison,
    event: Event,
    outputs: Mapping[str, Array],
    inputs: Mapping[str, Array],
) -> float:
    """The share of the difference at an event that is left with the reference's values elsewhere."""
    given = rows.with_group("replace", outputs).with_group("replace_input", inputs)
    after = context.capture("subject", "logits", context.recipes["subject"], given)
    group = "input.0" if event[0] == "in" else "module.0"
    ours, theirs = seen.values(event)
    return distance(after.arrays[f"{group}/{event[1]}"], theirs) / distance(ours, theirs)
