"""Inputs of stages, and measurements of what rounding alone explains."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from parity.errors import CaptureError, Unsupported
from parity.numerics import compare
from parity.recipe import Recipe
from parity.trace import Trace

if TYPE_CHECKING:
    from parity.stages.base import Context

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


def loss_inputs(context: Context) -> Trace:
    """Seeded logits (4, 24, V) float32 from N(0, 3) with targets in rows of unequal length."""
    rng = context.rng(3)
    inputs = common_rows(rng, context.vocabulary, LENGTHS, WIDTH)
    shape = (len(LENGTHS), WIDTH - 1, context.vocabulary)
    inputs.arrays["logits"] = rng.normal(0, 3, shape).astype(np.float32)
    return inputs


def loss_noise(context: Context) -> float:
    """How much of a loss, or relatively of a gradient, the rounding of the loss itself explains.

    Later stages inherit it from stage 03, measured on its inputs: how much the cross-entropy depends
    on the order of its sum, and, if 03 finds both sides in agreement, how far a token's loss
    typically (root mean square) is apart.
    """
    noise = order_noise(context)
    inputs = loss_inputs(context)
    try:
        pair = context.pair("cross_entropy", inputs)
        ours, theirs = (t.arrays["token_loss"] for t in (pair.subject, pair.reference))
        if compare("token_loss", ours, theirs, pair.noise).verdict.green:
            noise = max(noise, float(np.sqrt(np.mean((ours - theirs).astype(np.float64) ** 2))))
    except (Unsupported, CaptureError, KeyError):
        pass
    return noise


def order_noise(context: Context) -> float:
    """How much the logarithm of a softmax's normaliser depends on the order of its sum.

    The same logits are handed over with the vocabulary sorted, smallest first, and the targets
    renamed alike: the same cross-entropy, summed in another order. What differs is rounding. MLX on
    the CPU keeps one running sum: 5e-7 at 512 entries, 5e-5 at 49,152, where torch has 1e-6.
    """
    inputs = loss_inputs(context)
    logits, ids = inputs.arrays["logits"], inputs.arrays["ids"]
    order = logits.argsort(axis=-1)
    renamed = ids.copy()
    # Where the target of each position went: the inverse permutation at that target.
    renamed[:, 1:] = np.take_along_axis(order.argsort(axis=-1), ids[:, 1:, None], axis=-1)[..., 0]
    moved = dict(inputs.arrays, logits=np.take_along_axis(logits, order, axis=-1), ids=renamed)
    noise = 0.0
    for side in ("subject", "reference"):
        recipe = context.recipes[side]
        try:
            losses = [
                context.capture(side, "cross_entropy", recipe, given).arrays["token_loss"]
                for given in (inputs, Trace(moved))
            ]
        except (Unsupported, CaptureError, KeyError):
            continue
        noise = max(noise, float(np.abs(losses[0] - losses[1]).max()))
    return noise


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
