"""Probe 08, greedy decode: does the trained model give the same tokens?

Both sides are handed one adapter, the one that the reference has at the end of probe 07, and
prompts with the completion that training should have taught, all from the recipe. Each side
loads the adapter and generates, always taking the most likely token.

Compared: the generated ids without tolerance, with one exception. Where bits are not expected to
be equal, the first token that differs is accepted if the two most likely tokens are so near to
each other that rounding decides; the record says so. Then the loss of the expected completion,
within what rounding explains.

Besides, each side generates with the adapter that it trained itself. How often the expected text
comes is reported over seeds, with intervals and a paired test, and decides nothing.

A divergence means that generation differs: how the adapter is loaded or scaled, the prompt's
ids, the stopping rule, the cache.

It cannot mean that training differs, since both sides use the same adapter. Equal text at a few
prompts is weak evidence that two models are equal: probes 02 and 07 are the strong one.

    pytest probes/probe_08_greedy_decode.py --reference hf --seeds 1
"""

from __future__ import annotations

from collections.abc import Callable

from parity.cells.cell import Cell
from parity.record import Record

STAGE = "greedy_decode"


def test_greedy_decode(cell: Cell, probe: Callable[[Cell], Record]) -> None:
    assert probe(cell).verdict.green
