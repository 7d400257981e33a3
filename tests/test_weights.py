"""All weights trained (`lora.kind=full`): both sides are handed the same, however they store them."""

from __future__ import annotations

import numpy as np
import pytest

from parity.cells.cell import Cell
from parity.cells.run import run_cell
from parity.recipe import Recipe
from parity.report.text import describe
from parity.stages import find
from parity.trace import Trace
from tests.cost import long

HYBRID = {"model.source": "tiny-qwen3-5", "lora.kind": "full", "lora.num_layers": 1}


@pytest.fixture
def cell(engine):
    def run(probe, **changes):
        changes = {name.replace("__", "."): value for name, value in changes.items()}
        recipe = Recipe().override({**HYBRID, "train.steps": 2, **changes})
        return run_cell(engine, Cell(find(probe), "mlx", "hf", recipe))

    return run


@pytest.mark.long
def test_weights_that_mlx_lm_stores_with_one_added_start_equal(cell):
    record = cell("04")
    assert record.verdict.green, describe(record)
    assert any("as the reference's + 1, such as" in note for note in record.findings)


@pytest.mark.parametrize("probe", [long("05"), long("07"), long("08"), long("10"), long("11")])
def test_all_weights_of_a_hybrid_agree_with_torch(probe, cell):
    record = cell(probe, lora__num_layers=-1 if probe != "05" else 1)
    assert record.verdict.green, describe(record)


def test_weights_with_an_offset_are_handed_over_both_ways(engine):
    """What torch says it holds is what MLX holds, and writing it back changes no bit."""
    recipe = Recipe().override(HYBRID)
    ours, theirs = (engine.source(path)("lora_init", recipe, Trace()) for path in ("mlx", "hf"))
    norm = "layers.7.input_layernorm.weight"
    assert theirs.scalars["offsets"][norm] == 1.0
    for name, value in ours.group("adapter").items():
        np.testing.assert_array_equal(theirs.group("adapter")[name], value, err_msg=name)
    inputs = Trace({"ids": np.array([[1, 5, 9, 3]], np.int32)})
    inputs = inputs.with_group("adapter", ours.group("adapter"))
    kept = engine.source("hf")("round_trip", recipe, inputs).group("adapter")
    np.testing.assert_array_equal(kept[norm], ours.group("adapter")[norm])


def test_a_model_without_offsets_has_none(engine):
    recipe = Recipe().override({"lora.kind": "full", "lora.num_layers": 1})
    assert "offsets" not in engine.source("hf")("lora_init", recipe, Trace()).scalars


@pytest.mark.long
def test_weight_decay_of_a_weight_with_an_offset_is_not_the_same(cell):
    """mlx-lm pulls 1 + weight to 0, torch the weight: a real difference, with its cause."""
    record = cell("07", optim__weight_decay=0.1)
    assert record.verdict == "diverge", describe(record)
    assert any("weight decay pulls what each side stores to 0" in note for note in record.findings)
