"""Gradient checkpointing layer by layer, as live models are seen to run layers again."""

from __future__ import annotations

import pytest

from fixtures.random_models import ARCHITECTURES, architecture
from parity.cells.cell import Cell
from parity.cells.run import run_cell
from parity.paths.measured import Calls
from parity.recipe import Recipe
from parity.report.text import describe
from parity.stages import find

CHECKPOINTED = {"train.gradient_checkpointing": True, "train.steps": 2}
SETTING = "train.gradient_checkpointing"


@pytest.fixture
def settings(engine):
    def run(subject, reference, **changes):
        recipe = Recipe().override({**CHECKPOINTED, **changes})
        record = run_cell(engine, Cell(find("00"), subject, reference, recipe))
        return record, {metric.name: metric for metric in record.metrics}

    return run


def seen(once, again, layers):
    return Calls(once, again, [False], layer_of=layers)


def test_layers_that_are_run_again_are_told_one_by_one():
    layers = {10: 0, 11: 0, 20: 1, 30: 2}
    everywhere = seen({10, 20, 30}, {10, 20, 30}, layers)
    assert everywhere.facts()[SETTING] is True
    nowhere = seen({10, 20, 30}, set(), layers)
    assert nowhere.facts()[SETTING] is False
    some = seen({10, 11, 20, 30}, {10, 30}, layers)
    assert some.facts()[SETTING] == "of 3 layers in 0, 2 alone"
    assert seen({10, 20}, {10}, {}).facts()[SETTING] is True  # no layer is known


@pytest.mark.long
def test_all_layers_are_run_again_on_both_sides(settings):
    record, found = settings("mlx", "hf")
    assert found[SETTING].verdict == "identical", describe(record)


def test_a_class_of_layers_that_is_not_run_again_is_named(settings):
    record, found = settings("tests.family_faults:TwoKindsOfLayers", "mlx-lm")
    assert found[SETTING].verdict == "diverge", describe(record)
    assert "of 18 layers in 0, 2, 4, 6, 8, 10, 12, 14, 16 alone in the subject" in (
        found[SETTING].note
    )
    assert "True in the reference" in found[SETTING].note
    finding = "subject: the recipe has train.gradient_checkpointing=True, of 18 layers in 0"
    assert any(note.startswith(finding) for note in record.findings), record.findings


@pytest.mark.long
@pytest.mark.parametrize("subject", ["mlx", "mlx-lm"])
def test_mlx_lm_runs_one_class_of_layers_of_a_hybrid_again(subject, settings, tmp_path_factory):
    """OLMo's hybrid has two classes of layers, and mlx-lm's `grad_checkpoint` changes that of the first."""
    source = architecture("olmo_hybrid", tmp_path_factory.mktemp("models") / "olmo_hybrid")
    changes = {"model.source": source, "lora.num_layers": -1}
    changes["lora.target_modules"] = list(ARCHITECTURES["olmo_hybrid"].targets)
    record, found = settings(subject, "hf", **changes)
    assert found[SETTING].verdict == "diverge", describe(record)
    assert (
        "of 4 layers in 0, 1, 2 alone in the subject, True in the reference" in found[SETTING].note
    )
