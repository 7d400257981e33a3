"""Probe 09, supervised positions. Do both train on the same targets?

The stage is described in parity/stages/supervised.py.
"""

from __future__ import annotations

from collections.abc import Callable

from parity.cells.cell import Cell
from parity.record import Record

STAGE = "supervised_positions"


def test_supervised_positions(cell: Cell, probe: Callable[[Cell], Record]) -> None:
    assert probe(cell).verdict.green
