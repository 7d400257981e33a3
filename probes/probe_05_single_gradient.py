"""Probe 05, single gradient. Does the same adapter and batch give the same gradient?

The stage is described in parity/stages/gradient.py.
"""

from __future__ import annotations

from collections.abc import Callable

from parity.cells.cell import Cell
from parity.record import Record

STAGE = "gradient"


def test_single_gradient(cell: Cell, probe: Callable[[Cell], Record]) -> None:
    assert probe(cell).verdict.green
