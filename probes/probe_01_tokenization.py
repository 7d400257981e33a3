"""Probe 01, tokenization. Do both pipelines train on the same token ids?

The stage is described in parity/stages/tokenization.py.
"""

from __future__ import annotations

from collections.abc import Callable

from parity.cells.cell import Cell
from parity.record import Record

STAGE = "tokenization"


def test_tokenization(cell: Cell, probe: Callable[[Cell], Record]) -> None:
    assert probe(cell).verdict.green
