"""Probe 08, greedy decode. Does the trained model say the same?

The stage is described in parity/stages/decode.py.
"""

from __future__ import annotations

from collections.abc import Callable

from parity.cells.cell import Cell
from parity.record import Record

STAGE = "greedy_decode"


def test_greedy_decode(cell: Cell, probe: Callable[[Cell], Record]) -> None:
    assert probe(cell).verdict.green
