"""Probe 07, loss curve: does training follow the same curve, step for step?

Both sides are handed the recipe and the adapter that the reference starts from. Where bits are
expected to be equal, and batches of the same size, each side makes its own batches; else both
are handed the same ones in the same order. Each runs its whole training loop.

Compared: the token ids of all batches without tolerance; the loss and the norm of the gradient
at each step. Two paths of one framework must give equal bits, the final adapter included, unless
the record gives a reason. Else rounding adds up: what is allowed at a step is never less than at
the steps before. Both stacks are also trained as they are shipped; how far their losses differ
is listed and decides nothing.

A divergence means that the loops differ from the step that the record names. If every other
probe is green, look at what only a loop has: order of batches, accumulation, schedule, state
kept between steps.

It cannot tell a cause by itself: this is the whole path, and a difference in any earlier stage
shows here too. Read the first red probe in the flow of data, not this one.

    pytest probes/probe_07_loss_curve.py --reference hf --seeds 1
"""

from __future__ import annotations

from collections.abc import Callable

from parity.cells.cell import Cell
from parity.record import Record

STAGE = "loss_curve"


def test_loss_curve(cell: Cell, probe: Callable[[Cell], Record]) -> None:
    assert probe(cell).verdict.green
