"""Probe 10, KV cache. Does decoding with a cache give what decoding without one gives?

The stage is described in parity/stages/kv_cache.py.
"""

from __future__ import annotations

from collections.abc import Callable

from parity.cells.cell import Cell
from parity.record import Record

STAGE = "kv_cache"


def test_kv_cache(cell: Cell, probe: Callable[[Cell], Record]) -> None:
    assert probe(cell).verdict.green
