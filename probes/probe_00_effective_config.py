"""Probe 00, effective config. Do both sides really do what the recipe says, and what differs as shipped?

The stage is described in parity/stages/config.py.
"""

from __future__ import annotations

from collections.abc import Callable

from parity.cells.cell import Cell
from parity.record import Record

STAGE = "config"


def test_effective_config(cell: Cell, probe: Callable[[Cell], Record]) -> None:
    assert probe(cell).verdict.green
