"""Whether the subject repeats itself, and whether its seed does anything: looked at before any search."""

from __future__ import annotations

import numpy as np

from parity.capture.engine import AGAIN, Engine
from parity.errors import NO_ANSWER
from parity.judge.noise import distance
from parity.recipe import Recipe
from parity.trace import Trace

METHODS = ("train", "lora_init")
"""What depends on the seed, the first that the path has."""


def repeats(engine: Engine, subject: str, recipe: Recipe) -> tuple[bool, list[str]]:
    """Runs the subject again with its seed, and once with another one.

    Returns:
        Whether it repeats itself as far as is known, and what is wrong in sentences.
    """
    once = recipe.override({"train.steps": 1})
    seed = once.seed.value
    other = once.override({"seed.value": seed + 1 if seed + 1 < 2**32 else seed - 1})
    for method in METHODS:
        try:
            first = engine.capture(subject, method, once, Trace())
        except NO_ANSWER:
            continue
        words = []
        try:
            again = engine.capture(subject, method, once, Trace(), AGAIN)
            if difference := _difference(first, again):
                words.append(
                    f"{subject} does not repeat itself: two runs of {method} with seed {seed} differ in {difference}"
                )
            moved = engine.capture(subject, method, other, Trace())
            if not words and not _difference(first, moved):
                words.append(
                    f"the seed of {subject} has no effect: {method} with seeds {seed} and "
                    f"{other.seed.value} gives the same arrays bit for bit"
                )
        except NO_ANSWER as error:
            return True, [*words, f"whether {subject} repeats itself could not be asked: {error}"]
        return not any("repeat itself" in text for text in words), words
    return True, []


def _difference(a: Trace, b: Trace) -> str:
    """The array that differs most, and how many do; empty if all are equal bit for bit."""
    if a.arrays.keys() != b.arrays.keys():
        lone = sorted(a.arrays.keys() ^ b.arrays.keys())
        return f"which arrays there are, first {lone[0]}"
    off = {
        name: distance(value, b.arrays[name]) if value.shape == b.arrays[name].shape else np.inf
        for name, value in a.arrays.items()
        if not np.array_equal(value, b.arrays[name], equal_nan=value.dtype.kind == "f")
    }
    if not off:
        return ""
    worst = max(off, key=lambda name: off[name])
    return f"{len(off)} of {len(a.arrays)} arrays, most in {worst}: greatest |Δ| {off[worst]:.3g}"
