"""The shape of a difference in words: how many times, from which position on, in which tensors."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from parity.names import layer_of
from parity.trace import Array

AXES = {
    2: ("row", "channel"),
    3: ("row", "position", "channel"),
    4: ("row", "head", "position", "channel"),
}
"""What the axes of a module's input or output are, by their number."""
FEW = 0.1
"""Up to this share of an axis the indices are named."""


def shape_of(subject: Array, reference: Array, tolerance: float) -> str:
    """A factor, the first position and the few indices at which two arrays of a module differ."""
    if subject.shape != reference.shape or subject.ndim not in AXES:
        return ""
    a, b = subject.astype(np.float64), reference.astype(np.float64)
    words = [_factor(a, b, tolerance)]
    over = ~(np.abs(a - b) <= tolerance)  # not a number is over, too
    for axis, name in enumerate(AXES[subject.ndim]):
        others = tuple(other for other in range(subject.ndim) if other != axis)
        words.append(_extent(np.asarray(over.any(axis=others)), name))
    return ", ".join(filter(None, words))


def _factor(a: Array, b: Array, tolerance: float) -> str:
    """The factor between two arrays, where nothing is left once it is taken out."""
    square = float((b * b).sum())
    factor = float((a * b).sum()) / square if square else 1.0
    # Taken out of the larger one, so that a small factor does not hide what is left.
    left = float(np.abs(a - factor * b).max()) / max(1.0, abs(factor))
    if not np.isfinite(factor) or abs(factor - 1) < 1e-4 or not left <= tolerance:
        return ""
    return f"the subject's is {factor:.4g} times the reference's everywhere"


def _extent(off: Array, name: str) -> str:
    """Which indices of one axis are off, where it is not all of them."""
    count, total = int(off.sum()), len(off)
    if count == total or not count:
        return ""
    first = int(off.argmax())
    if name == "position" and first:
        before = (
            f"position {first - 1} agrees" if first == 1 else f"positions 0 to {first - 1} agree"
        )
        return f"{before}, off from position {first} on"
    if count <= max(1, FEW * total):
        named = ", ".join(str(int(i)) for i in np.flatnonzero(off)[:4])
        more = f" and {count - 4} more" if count > 4 else ""
        return f"only at {name}{'s' if count > 1 else ''} {named}{more} of {total}"
    return f"at {count} of {total} {name}s"


def tensors(off: Collection[str], every: Mapping[str, object] | Collection[str]) -> str:
    """Which of the adapter's tensors differ: how many, of which kind, in which layers."""
    words = [f"{len(off)} of {len(every)} tensors"]
    ends = {name.rpartition(".")[2] for name in off}
    if len(ends) == 1 and len({name.rpartition(".")[2] for name in every}) > 1:
        words.append(f"only {ends.pop()}")
    layers = sorted({n for name in off if (n := layer_of(name)) is not None})
    all_layers = {n for name in every if (n := layer_of(name)) is not None}
    if layers and len(layers) < len(all_layers):
        whole = layers == list(range(layers[0], layers[-1] + 1))
        span = f"layers {layers[0]} to {layers[-1]}" if whole else f"{len(layers)} layers"
        words.append(f"only {span}" if len(layers) > 1 else f"only layer {layers[0]}")
    kinds = {name.rpartition(".")[0].rpartition(".")[2] for name in off}
    all_kinds = {name.rpartition(".")[0].rpartition(".")[2] for name in every}
    if len(kinds) < len(all_kinds) and len(kinds) <= 2:
        words.append(f"only {' and '.join(sorted(kinds))}")
    return ", ".join(words)
