"""Probe 04, LoRA init: does training start from the same adapter?

Both sides are handed the recipe with its seed, and nothing else. Each wires LoRA into its model
as it does before training, and gives the adapter before the first step.

Compared without tolerance: the names of the trainable tensors, rank, scale, dropout, adapted
layers, dtype, and that every B is zero. For A it depends on the pair. Two paths of one framework
draw from the same random generator, so every bit must be equal. Two frameworks have different
generators: there each side's A is tested for the uniform distribution between plus and minus 1 /
sqrt(inputs), with a Kolmogorov-Smirnov test whose chance of a false alarm is 1 in 10,000.

A divergence means that other modules or layers are adapted, that rank or scale differ, that A is
drawn from another distribution, or, within one framework, that the seed is set at another place
in the program. The record names the metric.

It cannot mean that a computation of the model is wrong. Across frameworks agreement does not
mean equal numbers, only the same distribution: the probes after this one hand both sides the
same adapter.

    pytest probes/probe_04_lora_init.py --reference hf --seeds 1
"""

from __future__ import annotations

from collections.abc import Callable

from parity.cells.cell import Cell
from parity.record import Record

STAGE = "lora_init"


def test_lora_init(cell: Cell, probe: Callable[[Cell], Record]) -> None:
    assert probe(cell).verdict.green
