"""Probe 03, CE reduction: do both make the same loss of the same logits?

Both sides are handed logits, token ids and row lengths that are made from the seed: random
logits for rows of 7, 19, 24 and 12 tokens, padded to a common width. No model is loaded. Each
side calls the loss function that it trains with.

Compared without tolerance: the set of supervised positions, their number, and the target id at
each. Compared within what rounding explains: the cross-entropy of each token, where a side has
one, and the reduced loss. Summing over a large vocabulary in float32 has an error of its own; it
is measured and part of what is allowed.

A divergence means that the losses differ as functions: other positions are supervised (a mask
that is off by one, padding that counts), the sum is divided by another number, or the logarithm
of the softmax is less accurate than rounding explains. The metric that diverges tells which of
these it is.

It cannot mean that logits, tokenizer or weights differ: both sides were given the same logits.
Gradients are not compared here but in probe 05, and the masks of the recipe's own rows in probe
09.

    pytest probes/probe_03_ce_reduction.py --reference hf --seeds 1
"""

from __future__ import annotations

from collections.abc import Callable

from parity.cells.cell import Cell
from parity.record import Record

STAGE = "cross_entropy"


def test_ce_reduction(cell: Cell, probe: Callable[[Cell], Record]) -> None:
    assert probe(cell).verdict.green
