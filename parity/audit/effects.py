"""What moving one factor changes in what a method emits, and whether two paths change alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from parity.capture.engine import AGAIN
from parity.errors import CaptureError, UnmatchedNames, Unsupported
from parity.recipe import Recipe
from parity.trace import Array, Trace

LIKE = 0.25
"""How far two effects may be apart, relative to their length, and count as one: rounding is 1e-3 at most
where they are not much smaller than what they change, and another knob's effect is not within a quarter."""
COMPARED: Mapping[str, tuple[str, ...]] = {
    "optimizer_step": ("weight.",), "train": ("adapter/",), "gradient": ("gradient/",),
    "supervised_positions": ("supervised.",), "tokenization": ("row.", "offset."),
    "logits": ("logits.",),
}  # fmt: skip
"""Method to the arrays whose values are compared; of others only names and shapes are: what is drawn
differs between frameworks."""
NOISE = 10.0
"""An effect is compared where it is this much longer than what the paths differ by anyway."""

Run = Callable[[str, Recipe, Trace, str], Trace]
"""A method of one path: its name, a recipe, its inputs, and a word for another attempt."""


@dataclass(frozen=True)
class Effect:
    """What one method of one path emitted before a factor was moved and after it.

    Attributes:
        before: None where there is no such method, or it failed.
        after: None where it was refused, or failed.
        refused: Why the path does not carry it out.
        failed: What it failed with.
        unsteady: Arrays that a repeat gives otherwise: of them it is not known what moves them.
    """

    before: Trace | None = None
    after: Trace | None = None
    absent: str = ""
    refused: str = ""
    failed: str = ""
    unsteady: frozenset[str] = frozenset()

    @property
    def seen(self) -> bool:
        """Whether there is something to compare."""
        return self.before is not None and self.after is not None

    def moved(self) -> list[str]:
        """Arrays that are not what they were before, bit for bit, or came, or went."""
        assert self.before and self.after
        old, new = self.before.arrays, self.after.arrays
        found = [name for name in old.keys() ^ new.keys() if name not in self.unsteady]
        for name in (old.keys() & new.keys()) - self.unsteady:
            if not _equal(old[name], new[name]):
                found.append(name)
        return sorted(found)

    def blind(self) -> bool:
        """Whether no array repeats itself, so that nothing can be told."""
        return bool(self.before and self.unsteady >= self.before.arrays.keys())


def effect(run: Run, method: str, before: Recipe, after: Recipe, inputs: Trace) -> Effect:
    """Runs a method with two recipes, and with the first once more."""
    try:
        first = run(method, before, inputs, "")
        again = run(method, before, inputs, AGAIN)
    except Unsupported as error:
        return Effect(absent=str(error))
    except (CaptureError, UnmatchedNames) as error:
        return Effect(failed=str(error))
    names = first.arrays.keys() ^ again.arrays.keys()
    names |= {
        name
        for name in first.arrays.keys() & again.arrays.keys()
        if not _equal(first.arrays[name], again.arrays[name])
    }
    unsteady = frozenset(names)
    try:
        return Effect(first, run(method, after, inputs, ""), unsteady=unsteady)
    except Unsupported as error:
        return Effect(first, refused=str(error), unsteady=unsteady)
    except (CaptureError, UnmatchedNames) as error:
        return Effect(first, failed=str(error), unsteady=unsteady)


def unlike(method: str, ours: Effect, theirs: Effect) -> tuple[str, str]:
    """How the effects of one move on two paths differ, or why that is not known.

    Numbers are compared as vectors: the distance of the two changes over the length of the reference's,
    which is 1 where the subject does nothing and 2 where it does the opposite. Names and shapes of
    arrays are compared as they are. Values that are drawn are not compared.

    Returns:
        What differs, empty where nothing does; and why nothing was compared, else empty.
    """
    assert ours.before and ours.after and theirs.before and theirs.after
    before, shapes = _shapes(ours.before), _shapes(theirs.before)
    if before != shapes:
        return "", "the paths emit other arrays before the move"
    mine, expected = _shapes(ours.after), _shapes(theirs.after)
    if mine != expected:
        lone = sorted(k for k in mine.keys() | expected.keys() if mine.get(k) != expected.get(k))
        first = lone[0]
        return (
            f"{len(lone)} of {len(expected)} arrays have another shape than the reference's, first {first}: "
            f"{mine.get(first, 'none')}, {expected.get(first, 'none')} in the reference"
        ), ""
    names = sorted(before.keys() & mine.keys())
    names = [n for n in names if before[n] == mine[n] and n.startswith(COMPARED.get(method, ()))]
    if not names:
        return "", ""
    traces = (ours.before, ours.after, theirs.before, theirs.after)
    a, b, c, d = (_vector(trace, names) for trace in traces)
    if not all(np.isfinite(vector).all() for vector in (a, b, c, d)):
        return "", "not all values are finite"
    length, apart = float(np.linalg.norm(d - c)), float(np.linalg.norm((b - a) - (d - c)))
    noise = float(np.linalg.norm(a - c))
    if not length:
        return "", "what the move changes is no number that is compared"
    if length <= NOISE * noise:
        return "", "the paths differ before the move by as much as it moves the reference"
    ratio = float((b - a) @ (d - c)) / length**2
    if apart > LIKE * length:
        return (
            f"{ratio:.2g} times as long in its direction, {apart / length:.2g} of its length away"
        ), ""
    return "", ""


def difference(a: Trace, b: Trace) -> str:
    """The first array that is not the same bit for bit, and how many there are; empty if all are."""
    names = sorted(a.arrays.keys() | b.arrays.keys())
    off = [
        name
        for name in names
        if name not in a.arrays
        or name not in b.arrays
        or not _equal(a.arrays[name], b.arrays[name])
    ]
    return f"{len(off)} of {len(names)} arrays, first {off[0]}" if off else ""


def _shapes(trace: Trace) -> Mapping[str, tuple[int, ...]]:
    return {name: value.shape for name, value in trace.arrays.items()}


def _vector(trace: Trace, names: list[str]) -> Array:
    parts = [trace.arrays[name].astype(np.float64).ravel() for name in names]
    return np.concatenate(parts)


def _equal(a: Array, b: Array) -> bool:
    return np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
