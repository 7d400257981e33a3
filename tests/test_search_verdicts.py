"""A search ends in what was compared and could have failed, and says the rest."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from parity.bisect.answer import answer
from parity.bisect.causes import CauseSearch
from parity.cells.cell import Cell
from parity.cells.run import run_cell
from parity.commands.bisect import bisect
from parity.paths.registry import knobs
from parity.recipe import Recipe
from parity.record import Verdict
from parity.stages import find
from tests.cost import long


@pytest.fixture(scope="session")
def few():
    """Three steps."""
    return Recipe().override({"train.steps": 3, "optim.lr": 3e-3})


def search(engine, recipe, subject, reference="mlx-lm", changes=None, probes=()):
    stages = {"stages": tuple(map(find, ("00", *probes)))} if probes else {}
    return CauseSearch(engine, subject, reference, recipe, changes or {}, **stages).search()


def test_nothing_compared_is_not_agreement(engine, few):
    report = search(engine, few, "tests.search_faults:Silent", "hf", probes=["02", "06"])
    assert report.verdict == "not compared"
    assert not report.compared
    said = answer(report)
    assert "were not compared: every stage was skipped" in said
    assert "not compared: logits: path 'silent' has no logits" in said
    assert "agree" not in said


def test_a_path_against_itself_is_not_agreement(engine, few):
    report = search(engine, few, "mlx", "mlx", probes=["02"])
    assert report.verdict == "not compared"
    assert "no factor and no part is left that differs" in answer(report)


def test_agreement_of_some_stages_names_the_others(engine, few):
    report = search(engine, few, "tests.third_party:NumpyAdamW", "hf", probes=["05", "06"])
    assert report.verdict == "agree in part"
    assert "agree in optimizer_step, and were not compared in all" in answer(report)
    assert "not compared: gradient:" in answer(report)


@pytest.mark.parametrize(
    ("subject", "reference", "code"),
    [
        long("tests.search_faults:Silent", "hf", 3),
        long("tests.third_party:NumpyAdamW", "hf", 3),
        ("tests.faulty_paths:Faulty", "mlx-lm", 1),
    ],
)
def test_exit_codes_tell_them_apart(subject, reference, code, tmp_path):
    words = ["--subject", subject, "--reference", reference, "--out", str(tmp_path)]
    done = CliRunner().invoke(bisect, [*words, "--set", "train.steps=3", "--set", "optim.lr=0.003"])
    assert done.exit_code == code, done.output


def test_a_subject_that_does_not_repeat_itself_comes_first(engine, few):
    report = search(engine, few, "tests.search_faults:Restless", probes=["02"])
    assert report.repeats and "does not repeat itself" in report.repeats[0]
    assert answer(report).startswith("tests.search_faults:Restless does not repeat itself")


def test_a_seed_without_effect_comes_first(engine, few):
    report = search(engine, few, "tests.search_faults:NoSeed", probes=["02"])
    assert "the seed of tests.search_faults:NoSeed has no effect" in answer(report).splitlines()[0]


@pytest.mark.long
def test_a_knob_without_effect_is_named(engine, few):
    subject = "tests.audit_paths:HasKnobs"
    shared = few.with_knobs(knobs([subject]))
    changes = {"own.nothing": 6, "own.doubled": True}
    report = search(engine, shared, subject, "mlx", changes=changes, probes=["06"])
    assert [[*cause.factors] for cause in report.causes] == [["own.doubled"]]
    [sentence] = report.silent
    assert sentence.startswith(
        f"own.nothing = 6 against 3 has no effect on {subject}: lora_init and"
    )
    assert sentence in answer(report)


@pytest.mark.parametrize("subject", [long("mlx"), long("mlx-lm"), "hf"])
def test_nothing_is_said_of_a_steady_subject(subject, engine, few):
    reference = "hf" if subject != "hf" else "mlx"
    assert search(engine, few, subject, reference, probes=["03"]).repeats == []


def test_a_divergence_that_does_not_come_again_is_none(engine, few):
    report = search(engine, few, "tests.search_faults:WrongOnce", "hf", probes=["06"])
    assert report.verdict == "inconclusive"
    assert "does not repeat itself" in answer(report)


@pytest.mark.long
def test_settings_that_come_and_go_with_the_cause_are_said(engine, few):
    changes = {"train.compile": False}
    report = search(engine, few, "tests.search_faults:OtherRate", changes=changes, probes=["06"])
    [cause] = report.causes
    assert cause.parts == ("optimizer",)
    assert "learning rate at step 1: 0.009 in the subject, 0.003 in the reference" in cause.sentence
    assert "betas" in cause.sentence
    assert "compiled step" not in cause.sentence
    assert any("compiled step" in text for text in report.left)


def test_agreement_says_which_settings_differ(engine, few):
    report = search(engine, few, "mlx", changes={"train.compile": False}, probes=["02", "06"])
    assert report.verdict == "agree"
    assert "differs, with no effect on what was compared: compiled step" in answer(report)


@pytest.mark.long
def test_a_hybrid_that_fails_is_no_evidence(engine, few):
    subject = "tests.search_faults:NoLoss"
    report = search(engine, few, subject, probes=["05"])
    [cause] = report.causes
    assert "this loss works at home only" in answer(report)
    assert not any("it makes no difference" in e for entry in report.ledger for e in entry.evidence
                   if "part loss" in entry.changes)  # fmt: skip
    assert "may not be minimal" in cause.sentence or "could not be found" in cause.sentence


@pytest.mark.long
def test_an_attention_fault_is_not_blamed_on_rope(engine, few):
    report = search(engine, few, "tests.search_faults:AttentionProduct", "hf", probes=["02"])
    assert "the input of layers.5.self_attn.o_proj (differs)" in answer(report)
    assert "rope" not in answer(report)
    assert "settings differ" not in answer(report), (
        "what differs between frameworks by nature is none"
    )


@pytest.mark.long
@pytest.mark.parametrize("reference", ["mlx-lm", long("hf")])
def test_a_mean_over_padding_is_no_clip(reference, engine, few):
    cell = Cell(find("05"), "tests.search_faults:PaddedMean", reference, few)
    [hint] = run_cell(engine, cell).hints
    assert "does its mean count padding as well?" in hint
    assert "clip" not in hint


@pytest.mark.parametrize("reference", ["mlx-lm", long("hf")])
@pytest.mark.parametrize("probe", [long("03"), "09"])
def test_shifted_targets_are_no_missing_token(probe, reference, engine, few):
    cell = Cell(find(probe), "tests.search_faults:ShiftedTargets", reference, few)
    record = run_cell(engine, cell)
    assert record.verdict is Verdict.DIVERGE
    assert record.hints == []
