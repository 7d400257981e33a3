"""Probe 11, adapter round trip: does an adapter do after saving and loading what it did before?

Both sides are handed an adapter, with B filled with small random numbers, and two rows of random
ids, made from the seed. Each puts the adapter into its live model, saves it with its own saver,
and loads the files with its own loader into a model that was loaded anew.

Compared, on each side by itself: the modules that have an adapter after loading with those that
were handed over; what each adds to its weight, scale · A · B in float64, with the product of what
was handed over; the logits of the loaded model with those of the live one, bit for bit; and these
with the logits of the base model, which must be others. Then the logits of both loaded models
with each other, within what rounding explains. Then each side trains for two steps, on the same
batches, its trainer leaves its files, and these are loaded: modules, scale · A · B and logits must
be those of the live model after training.

A divergence of one side by itself means that its files, or its loader, lose something: the record
says what, such as the scale, a layer, a matrix or its precision. A divergence of both sides from
each other alone points to their models: read probe 02 first, then probe 05.

It cannot mean that training is wrong, which is compared with nothing but its own files, nor that
one side cannot read what the other wrote: that is probe 12, `exchange`.

    pytest probes/probe_11_adapter_round_trip.py --reference hf --seeds 1
"""

from __future__ import annotations

from collections.abc import Callable

from parity.cells.cell import Cell
from parity.record import Record

STAGE = "round_trip"


def test_adapter_round_trip(cell: Cell, probe: Callable[[Cell], Record]) -> None:
    assert probe(cell).verdict.green
