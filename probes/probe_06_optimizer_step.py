"""Probe 06, optimizer step: does the same gradient move the same weights equally?

Both sides are handed four small weight tensors and the gradients of five steps, all random
numbers made from the seed; the gradients range from 1e-3 to 10. No model is loaded. Each side
applies the clip and the optimizer that the recipe asks for, once with the recipe's weight decay
and once with 0.1.

Compared: the weights after each of the five steps. Two paths of one framework must give equal
bits, unless the record gives a reason; else the weights may differ by what rounding explains.
Adam divides by 1 - beta2 ** t, which is inaccurate in float32; that is part of what is allowed.

A divergence means that clip, optimizer or learning rate differ: bias correction, betas, eps,
decay, or the order in which they are applied. If the first step differs, the record gives the
ratio of the updates: 3.16 is that of Adam without bias correction, for betas of 0.9 and 0.999.

It cannot mean that gradients differ, since both sides were given the same ones. The gradients
are larger than those of many trainings: a clip that differs here may have no effect there, which
probe 07 shows.

    pytest probes/probe_06_optimizer_step.py --reference hf --seeds 1
"""

from __future__ import annotations

from collections.abc import Callable

from parity.cells.cell import Cell
from parity.record import Record

STAGE = "optimizer_step"


def test_optimizer_step(cell: Cell, probe: Callable[[Cell], Record]) -> None:
    assert probe(cell).verdict.green
