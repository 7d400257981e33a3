"""A model that drops out by itself in training, beside a framework whose models do not."""

from __future__ import annotations

import pytest

from parity.cells.cell import Cell
from parity.cells.run import run_cell
from parity.recipe import Recipe
from parity.report.text import describe
from parity.stages import find

TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module")
def dropping(random_model):
    """The folder of a Llama whose attention drops half in training."""
    return random_model(
        "llama", top_level={"rope_theta": 10000.0}, num_hidden_layers=2, attention_dropout=0.5
    )


@pytest.mark.parametrize("reference", ["hf", pytest.param("trl", marks=pytest.mark.long)])
def test_its_masks_are_no_part_of_a_gradient(reference, dropping, engine):
    recipe = Recipe().override({"model.source": str(dropping), "lora.target_modules": TARGETS})
    record = run_cell(engine, Cell(find("05"), "mlx", reference, recipe))
    assert record.verdict.green, describe(record)
    said = "without the dropout of 0.5 that the reference's model has of its own in training"
    assert said in record.findings
    assert not any("the subject's model has of its own" in finding for finding in record.findings)


def test_it_is_a_setting(dropping, engine):
    recipe = Recipe().override({"model.source": str(dropping), "lora.target_modules": TARGETS})
    record = run_cell(engine, Cell(find("00"), "mlx", "hf", recipe))
    assert record.verdict == "diverge", describe(record)
    notes = [m.note for m in record.metrics if m.gate and not m.verdict.green]
    assert (
        "dropout of the model itself in training: 0 in the subject, 0.5 in the reference" in notes
    )
    # What is measured by training is not known where each step draws another mask.
    assert any("the loss is divided by" in note and "unknown" in note for note in notes)
