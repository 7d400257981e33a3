"""Probe 02, logits. Does the base model compute the same logits from the same ids?

The stage is described in parity/stages/logits.py.
"""

from __future__ import annotations

from collections.abc import Callable

from parity.cells.cell import Cell
from parity.record import Record

STAGE = "logits"


def test_logits(cell: Cell, probe: Callable[[Cell], Record]) -> None:
    assert probe(cell).verdict.green
