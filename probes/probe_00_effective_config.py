"""Probe 00, effective config: do both sides run with the same settings?

Both sides are handed the recipe, and nothing else. Each builds its model, adapter, optimizer and
first batches as if to train, and reads the settings back from these objects: rope base, dtypes,
LoRA layers, rank and scale, optimizer and its numbers, learning rate of each step, clip, seed,
batches.

Compared: each setting by its name. Numbers may differ by 1e-6 of their size, since one side
stores them as float32 and another as float64; everything else must be equal. Between paths that
are not expected to be bit-identical, the shape and order of batches and the count of supervised
positions do not decide: later probes hand both sides the same batches. Settings that the stacks
choose when nobody sets them are compared as well, listed under "as shipped", and decide nothing.

A divergence means that one named setting is not the same on both sides. Look at it first: it may
be the cause of any divergence in the probes after it.

It cannot mean that a computation is wrong, since none is compared. And agreement does not show
that the code obeys a setting: what a setting does is the matter of the other probes.

    pytest probes/probe_00_effective_config.py --reference hf --seeds 1
"""

from __future__ import annotations

from collections.abc import Callable

from parity.cells.cell import Cell
from parity.record import Record

STAGE = "config"


def test_effective_config(cell: Cell, probe: Callable[[Cell], Record]) -> None:
    assert probe(cell).verdict.green
