"""Probe 06, AdamW step. Does the same gradient move the same weights equally?

The stage is described in parity/stages/optimizer_step.py.
"""

from __future__ import annotations

from collections.abc import Callable

from parity.cells.cell import Cell
from parity.record import Record

STAGE = "optimizer_step"


def test_optimizer_step(cell: Cell, probe: Callable[[Cell], Record]) -> None:
    assert probe(cell).verdict.green
