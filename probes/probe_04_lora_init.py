"""Probe 04, LoRA init. Does training start from the same adapter?

The stage is described in parity/stages/lora_init.py.
"""

from __future__ import annotations

from collections.abc import Callable

from parity.cells.cell import Cell
from parity.record import Record

STAGE = "lora_init"


def test_lora_init(cell: Cell, probe: Callable[[Cell], Record]) -> None:
    assert probe(cell).verdict.green
