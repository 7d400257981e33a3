"""The score of planted faults: what is planted can be run, and a false claim costs."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from benchmarks.faults import claims, markdown, run, table
from benchmarks.planted.registry import everything
from parity.bisect.locate_backward import FORWARD
from parity.bisect.result import FOUND, Cause, SearchReport
from parity.cells.cell import Cell
from parity.cells.run import run_cell
from parity.paths.registry import resolve
from parity.stages import find

FAULTS = {fault.name: fault for fault in everything()}


def test_there_are_enough_of_each_kind_and_all_are_paths():
    kinds = Counter(fault.kind for fault in FAULTS.values())
    assert kinds["harmless"] >= 20
    assert sum(kinds.values()) - kinds["harmless"] >= 80
    assert len(FAULTS) == len(everything())
    for fault in FAULTS.values():
        assert resolve(fault.spec).framework == "mlx"
        assert find(fault.stage or "logits")


@pytest.mark.parametrize(
    ("sentence", "hints", "wrong"),
    [
        ("first bad module layers.7.mlp.up_proj: its output differs", [], []),
        ("first bad module layers.6.mlp.up_proj: its output differs", [], ["module"]),
        ("between layers.6.mlp and layers.7.mlp.up_proj", [], []),
        ("first bad module layers.7.mlp.up_proj", ["is it the clip?"], ["hint"]),
    ],
)
def test_each_claim_of_a_sentence_is_held_against_what_was_planted(sentence, hints, wrong):
    fault = FAULTS["one_row_of_up_proj_0"]
    cause = Cause("logits", {}, sentence, ("loader",), hints=hints)
    report = SearchReport("planted", "mlx-lm", FOUND, causes=[cause])
    found = [
        text for text, true in claims(fault, report, {"is it the clip?": "clip"}, 20.0) if not true
    ]
    assert [text.split()[0] for text in found] == wrong


def test_there_or_before_it_is_true_of_what_is_planted_no_further_on():
    words = "at module layers.{}.self_attn: its own gradients differ" + FORWARD
    for number, true in ((4, True), (9, True), (3, False)):
        cause = Cause("gradient", {}, words.format(number), ("loader",))
        report = SearchReport("planted", "hf", FOUND, causes=[cause])
        found = dict(claims(FAULTS["norm_offset_1"], report, {}, 4.0))
        assert found[f"module layers.{number}.self_attn"] is true


def test_a_setting_that_the_fault_does_not_change_is_a_false_claim():
    report = SearchReport("planted", "mlx-lm", FOUND)
    said = ["optim.eps", "optim.betas"]
    found = dict(claims(FAULTS["another_eps_0"], report, {}, 20.0, said))
    assert found == {"setting optim.eps": True, "setting optim.betas": False}


@pytest.mark.long
def test_one_fault_is_searched_for_and_scored(engine):
    outcome = run(engine, FAULTS["scaled_loss_0"], "mlx-lm")
    assert outcome.detected and outcome.stage_right, outcome
    assert outcome.floors == math.inf
    rows = table([outcome])
    assert "1 of 1" in markdown(rows)


@pytest.mark.parametrize("name", ["same_as_ever", "not_compiled"])
def test_a_harmless_variant_has_the_same_bits(name, engine, small):
    fault = FAULTS[name]
    recipe = small.override({"model.source": fault.model, "train.steps": 2})
    for stage in ("gradient", "loss_curve"):
        record = run_cell(engine, Cell(find(stage), fault.spec, "mlx-lm", recipe))
        assert record.verdict == "identical", record.reason
