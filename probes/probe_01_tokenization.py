"""Probe 01, tokenization: do both sides train on the same token ids?

Both sides are handed the recipe, which names tokenizer and training rows; 24 texts made from the
seed, of Unicode, emoji, white space and look-alikes of special tokens; and two conversations for
the chat template. Each uses the code with which it prepares rows for training.

Compared, id by id and without tolerance: the training rows, the ids of the texts and of the
conversations, the first token of each row that is to be learned, the ids of BOS and EOS, the
size of the vocabulary, and the texts decoded from their ids.

A divergence means that the two pipelines turn text into different ids: another chat template,
BOS or EOS added or left out, rows cut at another length, another tokenizer. The record names row
and index.

It cannot mean anything about the model, the loss or training: no weight is used. It does not
tell which side is right. That rows are equal does not mean that the same tokens of them are
learned, which is probe 09.

    pytest probes/probe_01_tokenization.py --reference hf --seeds 1
"""

from __future__ import annotations

from collections.abc import Callable

from parity.cells.cell import Cell
from parity.record import Record

STAGE = "tokenization"


def test_tokenization(cell: Cell, probe: Callable[[Cell], Record]) -> None:
    assert probe(cell).verdict.green
