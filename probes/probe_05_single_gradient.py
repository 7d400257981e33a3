"""Probe 05, single gradient: does the same batch give the same gradient?

Both sides are handed an adapter and a batch. The adapter is the one that the reference starts
from, once with B = 0 as at the first step and once with B filled with small random numbers, so
that A has a gradient too. The batch is four rows of random ids of unequal length, made from the
seed.

Compared: the loss, the norm of the whole gradient, and the gradient of each tensor of the
adapter, within what rounding explains; the number of supervised tokens without tolerance. All of
it is taken before any clip.

A divergence means that the loss or the backward pass differ. If probes 02, 03 and 09 are green,
look first at LoRA in the forward pass, then at the backward pass. The record says so if one
gradient is a multiple of the other.

It cannot mean a difference of the clip, of the optimizer or of the order of rows: none of them
has taken part.

    pytest probes/probe_05_single_gradient.py --reference hf --seeds 1
"""

from __future__ import annotations

from collections.abc import Callable

from parity.cells.cell import Cell
from parity.record import Record

STAGE = "gradient"


def test_single_gradient(cell: Cell, probe: Callable[[Cell], Record]) -> None:
    assert probe(cell).verdict.green
