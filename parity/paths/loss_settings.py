"""Settings of a loss, found by what it weighs on flat logits, and what stands behind the rows of batches.

Nothing here knows a framework.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from parity.paths.measured import unknown
from parity.trace import Array

Weights = tuple[Array, Array]
"""What each position weighs in a loss (B, T), and the lengths (B, 2) it was given."""


def loss_batches() -> list[tuple[Array, Array]]:
    """Ids (B, W) and lengths (B, 2) in which rows, positions and tokens vary one by one."""
    shapes = [((4, 6), 9), ((4, 6, 5), 9), ((4, 6), 14), ((8, 7), 9), ((3, 8), 9)]
    found = []
    for lengths, width in shapes:
        ids = np.zeros((len(lengths), width), np.int32)
        for row, length in zip(ids, lengths, strict=True):
            row[:length] = np.arange(1, length + 1)
        found.append((ids, np.array([(0, length) for length in lengths], np.int32)))
    return found


def denominator(weights: Iterable[Weights]) -> str:
    """What a loss divides the sum over its tokens by, up to a factor that never changes.

    Args:
        weights: Of each of `loss_batches`.
    """
    observed: list[Array] = []
    expected: dict[str, list[Array]] = {name: [] for name in _DENOMINATORS}
    for values, lengths in weights:
        supervised = np.abs(values) > 0
        if not supervised.any():
            return unknown("it depends on no logits")
        observed.append(values[supervised])
        for name, divisor in _DENOMINATORS.items():
            divided = np.broadcast_to(divisor(supervised, lengths), supervised.shape)
            expected[name].append(1 / divided[supervised])
    seen = np.concatenate(observed)
    for name, parts in expected.items():
        ratio = seen / np.concatenate(parts)
        if np.allclose(ratio, ratio[0], rtol=1e-3):
            return name
    return unknown("its tokens weigh as under no rule that is known")


def _by_rows(supervised: Array, _: Array) -> Array:
    return np.asarray(np.maximum(1, supervised.sum(axis=1, keepdims=True)) * len(supervised))


_DENOMINATORS = {
    "supervised tokens": lambda supervised, _: np.array(supervised.sum()),
    "all positions": lambda supervised, _: np.array(supervised.size),
    "rows": lambda supervised, _: np.array(len(supervised)),
    "nothing": lambda *_: np.array(1),
    "tokens that are no padding": lambda _, lengths: lengths[:, 1].sum(),
    "supervised tokens of each row, then rows": _by_rows,
}


def padding(batches: Iterable[tuple[Array, Array]]) -> Any:
    """The ids that stand behind the rows of batches: one, several, or none where nothing is padded."""
    ids = {
        int(token)
        for batch, lengths in batches
        for row, (_, length) in zip(batch, lengths, strict=True)
        for token in row[length:]
    }
    return next(iter(ids)) if len(ids) == 1 else sorted(ids) or None
