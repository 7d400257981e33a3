"""Probe 10, KV cache: does decoding with a cache give what decoding without one gives?

Both sides are handed an adapter, with B filled with small random numbers, and a conversation of
eight turns of random ids, made from the seed. Its 146 tokens cross the sliding windows of the
tiny models (64) within a turn and between turns.

Compared, on each side by itself: the logits that come through its cache against its own logits
without one, with each turn fed at once, with the replies forced token by token on its own
generation, and, where the cache can be cut back, after a turn was taken out and fed again. Then
the cached logits of both sides against each other. All within what rounding explains; a most
likely token may differ only where two are that near.

A divergence of one side against itself means that its cache is wrong: the record names the side,
the turn and the position. A divergence of the two sides from each other alone points to their
models, not to a cache.

It cannot mean that training is wrong, which uses no cache. If the logits without a cache differ
between the sides as well, the record says so: then read probe 02 first.

    pytest probes/probe_10_kv_cache.py --reference hf --seeds 1
"""

from __future__ import annotations

from collections.abc import Callable

from parity.cells.cell import Cell
from parity.record import Record

STAGE = "kv_cache"


def test_kv_cache(cell: Cell, probe: Callable[[Cell], Record]) -> None:
    assert probe(cell).verdict.green
