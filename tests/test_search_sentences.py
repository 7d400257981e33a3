"""Sentences of a search that would be wrong if only the first sign of a fault were looked at."""

from __future__ import annotations

import pytest

from parity.bisect.causes import CauseSearch
from parity.bisect.locate import locate
from parity.bisect.locate_step import step
from parity.cells.cell import Cell
from parity.cells.run import context_of, run_cell
from parity.stages import find
from tests.cost import long

PLANTED = "benchmarks.planted"
FEW = {"train.steps": 2, "optim.lr": 3e-3}


@pytest.mark.long
@pytest.mark.parametrize("reference", ["hf", long("mlx-lm")])
def test_a_norm_that_is_reported_wrong_is_not_called_the_gradient(engine, small, reference):
    cell = Cell(
        find("07"), f"{PLANTED}.loop:reports_a_squared_norm_path", reference, small.override(FEW)
    )
    sentence = step(context_of(engine, cell)).sentence
    assert sentence.startswith(
        "first divergent step 1 of 2: the gradient norm that is reported differs"
    )
    assert "one step of plain descent at rate 1 agrees: only the report differs" in sentence


@pytest.mark.long
def test_weights_that_are_others_are_not_called_another_batch(engine, small):
    recipe = small.override({**FEW, "train.steps": 6})
    cell = Cell(find("07"), f"{PLANTED}.loop:starts_again_at_five_path", "mlx-lm", recipe)
    sentence = step(context_of(engine, cell)).sentence
    assert "the loop trains on another batch, or from other weights, than these" in sentence


def test_a_loss_that_the_loop_reports_wrong_is_no_module(engine, small):
    cell = Cell(find("05"), f"{PLANTED}.loop:reports_a_scaled_loss_0", "hf", small)
    found = locate(engine, cell, run_cell(engine, cell))
    assert found.sentence.startswith("loss, B = 0")
    assert "taken outside of the loop the gradients agree at every common module" in found.sentence
    assert not found.name


@pytest.mark.long
def test_a_cache_is_not_called_the_loop(engine, small):
    subject, stages = f"{PLANTED}.cache:second_turn_lost_path", (find("00"), find("10"))
    report = CauseSearch(engine, subject, "mlx-lm", small, {}, stages=stages).search()
    [cause] = report.causes
    assert cause.parts == ("loop",)
    assert cause.sentence.startswith(
        f"the code of {subject} beside its loader, wiring, batching, loss"
    )
