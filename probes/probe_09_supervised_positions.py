"""Probe 09, supervised positions: do both sides learn the same targets?

Both sides are handed three batches made of the recipe's own rows: padded rows, rows without
padding, and very short, cut and prompt-masked rows. Then each makes the batches that it would
train on itself.

A target is supervised if the path's real loss depends on the logits that predict it. The mask
that a path reports is not used.

Compared without tolerance: the set of (row, token, target id) that each side supervises in the
batches handed over; then the same in the paths' own batches, where rows are matched by their
token ids, so that order and width do not matter.

A divergence means that other tokens are learned: a position past the end of a row, a prompt that
should be masked, the first or last token missing. The record names row, token, id and text.

It cannot mean that the size of the loss or of the gradient is wrong: how targets are weighted is
probe 03, what follows from them probe 05. It comes third in the flow of data, before the logits,
whatever its number says.

    pytest probes/probe_09_supervised_positions.py --reference hf --seeds 1
"""

from __future__ import annotations

from collections.abc import Callable

from parity.cells.cell import Cell
from parity.record import Record

STAGE = "supervised_positions"


def test_supervised_positions(cell: Cell, probe: Callable[[Cell], Record]) -> None:
    assert probe(cell).verdict.green
