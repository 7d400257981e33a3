"""Probe 02, logits: does the base model compute the same logits from the same ids?

Both sides are handed token ids: the first training row as the reference tokenizes it, and two
rows of 160 random ids made from the seed, longer than the sliding windows of the tiny models.
Each loads the checkpoint itself and runs one forward pass. There is no adapter.

Compared: the dtype of the logits, which must be equal, and every logit. Two paths of one
framework must give equal bits, unless the record gives a reason; else a logit may differ by what
rounding explains, which is measured around the reference (README, "What rounding explains").

A divergence means that loading or forward pass of the base model differ: weights, dtype, rope,
attention mask or window, norm, activation, scaling. The record names the first module, in the
order of calls, whose output differs by more than rounding; `parity bisect` tests that module by
substitution.

It cannot mean a difference of tokenization, of LoRA, of the loss or of training, none of which
has taken part. Agreement is about forward passes at these lengths: it says nothing of gradients.

    pytest probes/probe_02_logits.py --reference hf --seeds 1
"""

from __future__ import annotations

from collections.abc import Callable

from parity.cells.cell import Cell
from parity.record import Record

STAGE = "logits"


def test_logits(cell: Cell, probe: Callable[[Cell], Record]) -> None:
    assert probe(cell).verdict.green
