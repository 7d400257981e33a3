"""Probe 03, CE reduction. Is the same loss made of the same logits, targets and lengths?

The stage is described in parity/stages/cross_entropy.py.
"""

from __future__ import annotations

from collections.abc import Callable

from parity.cells.cell import Cell
from parity.record import Record

STAGE = "cross_entropy"


def test_ce_reduction(cell: Cell, probe: Callable[[Cell], Record]) -> None:
    assert probe(cell).verdict.green
