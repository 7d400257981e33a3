"""Inputs that several stages make: seeded rows, logits, and inputs moved by rounding."""

from __future__ import annotations

import numpy as np

from parity.recipe import Recipe
from parity.trace import Array, Trace

OPTIMIZES = ("optimizer_step", "train")
"""Methods whose outcome depends on the optimizer's numbers."""
REDUCES = ("cross_entropy", "gradient", "train", "decode")
"""Methods that sum over the vocabulary."""
LENGTHS = [7, 19, 24, 12]
WIDTH = 25


def nudged(recipe: Recipe) -> Recipe:
    """A recipe whose learning rate is moved by as much as float32 leaves open.

    Adam divides by 1 - beta2 ** t. Kept in float32 (MLX) beta2 is off by half an ulp, and the
    difference of nearly equal numbers by that over 1 - beta2 of itself, 3e-5 for 0.999; the square
    root halves it. torch computes the same in float64. The learning rate multiplies the update, so
    moving it stands for this rounding.
    """
    o = recipe.optim
    ulp = float(np.spacing(np.float32(o.lr))) / o.lr if o.lr else 0.0
    if o.name != "sgd" and o.bias_correction:
        beta = np.float32(o.betas[1])
        ulp = max(ulp, float(np.spacing(beta)) / (1 - float(beta)) / 2)
    return recipe.override({"optim.lr": o.lr * (1 + ulp)})


def loss_inputs(rng: np.random.Generator, vocabulary: int) -> Trace:
    """Seeded logits (4, 24, V) float32 from N(0, 3) with targets in rows of unequal length."""
    inputs = common_rows(rng, vocabulary, LENGTHS, WIDTH)
    shape = (len(LENGTHS), WIDTH - 1, vocabulary)
    inputs.arrays["logits"] = rng.normal(0, 3, shape).astype(np.float32)
    return inputs


def loss_cases(rng: np.random.Generator, vocabulary: int) -> dict[str, Trace]:
    """Logits (2 or 3, 6, V) float32 of other kinds than N(0, 3), with targets, by what they are like."""
    width, margin = 7, 1e4

    def case(logits: Array, inputs: Trace) -> Trace:
        return Trace({**inputs.arrays, "logits": logits.astype(np.float32)})

    def drawn(size: int, lengths: list[int]) -> tuple[Array, Trace]:
        inputs = common_rows(rng, size, lengths, width)
        return rng.normal(0, 3, (len(lengths), width - 1, size)), inputs

    logits, rows = drawn(vocabulary, [7, 5])
    targets = rows.arrays["ids"][:, 1:, None].astype(np.int64)
    right, wrong = logits.copy(), logits.copy()
    np.put_along_axis(right, targets, margin, axis=-1)
    np.put_along_axis(wrong, (targets + 1) % vocabulary, margin, axis=-1)
    # Of these rows one has a single target, whether a mask ends with the row or one past it.
    flat, short = drawn(vocabulary, [7, 2, 1])
    one_hot = np.zeros_like(flat)
    np.put_along_axis(one_hot, short.arrays["ids"][:, 1:, None].astype(np.int64), 1.0, axis=-1)
    return {
        # beyond what the exponential of a float32 can hold
        "logits of ±300 and more": case(logits + np.array([[[300.0]], [[-300.0]]]), rows),
        "targets 10,000 above": case(right, rows),
        "targets 10,000 below": case(wrong, rows),
        "one-hot logits, rows of one target": case(one_hot, short),
        "523 entries": case(*drawn(523, [7, 5])),
    }


def common_rows(rng: np.random.Generator, vocabulary: int, lengths: list[int], width: int) -> Trace:
    """Seeded random ids in rows of unequal length, padded with 0.

    Returns:
        `ids` (B, width) int32 without id 0 inside rows, `lengths` (B, 2) of (0, tokens).
    """
    ids = np.zeros((len(lengths), width), np.int32)
    for row, length in enumerate(lengths):
        ids[row, :length] = rng.integers(1, vocabulary, length)
    pairs = np.array([(0, length) for length in lengths], np.int32)
    return Trace({"ids": ids, "lengths": pairs})
