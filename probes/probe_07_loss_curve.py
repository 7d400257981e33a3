"""Probe 07, loss curve. Does training follow the same curve, step for step?

The stage is described in parity/stages/loss_curve.py.
"""

from __future__ import annotations

from collections.abc import Callable

from parity.cells.cell import Cell
from parity.record import Record

STAGE = "loss_curve"


def test_loss_curve(cell: Cell, probe: Callable[[Cell], Record]) -> None:
    assert probe(cell).verdict.green
