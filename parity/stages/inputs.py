"""Inputs that several stages make: seeded rows, logits, and inputs moved by rounding."""

from __future__ import annotations

import numpy as np

from parity.recipe import Recipe
from parity.trace import Trace

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


def sorted_logits(inputs: Trace) -> Trace:
    """The same logits with the vocabulary sorted, smallest first, and the targets renamed alike."""
    logits, ids = inputs.arrays["logits"], inputs.arrays["ids"]
    order = logits.argsort(axis=-1)
    renamed = ids.copy()
    # Where the target of each position went: the inverse permutation at that target.
    renamed[:, 1:] = np.take_along_axis(order.argsort(axis=-1), ids[:, 1:, None], axis=-1)[..., 0]
    moved = np.take_along_axis(logits, order, axis=-1)
    return Trace(dict(inputs.arrays, logits=moved, ids=renamed))


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
