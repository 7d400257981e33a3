"""Functions of a user on torch as a path: what is given is used, the rest is path `hf`'s."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from parity import plugin
from parity.bisect.causes import CauseSearch
from parity.cells.cell import Cell
from parity.cells.run import run_cell
from parity.cli import main
from parity.errors import Unsupported, UsageError
from parity.paths.registry import resolve
from parity.record import Verdict
from parity.report.text import describe
from parity.stages import find
from parity.trace import Trace
from tests import torch_functions as functions
from tests.cost import long

HERE, PATHS = "tests.torch_functions", "tests.torch_paths"


def run(engine, stage, subject, recipe, reference="hf"):
    return run_cell(engine, Cell(find(stage), subject, reference, recipe))


def test_a_path_says_what_is_its_own_and_what_it_stands_on():
    kind = resolve(f"{PATHS}:Averaged")
    assert (kind.framework, kind.stands_on, kind.own_parts) == ("torch", "hf", ("loss",))
    assert kind.own_factors == ("mask.start_shift", "mask.end_shift")
    assert "loss of averaged may round otherwise" in kind.operations["gradient"]
    assert "lora_init" not in kind.operations
    assert resolve(f"{PATHS}:Adam").own_parts == ("optimizer",)
    assert "optim.weight_decay" in resolve(f"{PATHS}:Adam").honours


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: plugin.from_loss(functions.strange, framework="torch"), "what 'gadget' is cannot be"),
        (lambda: plugin.from_loss("loss", framework="torch"), "loss='loss' is no function"),
        (lambda: plugin.from_parts(save=len, framework="torch"), "save= cannot be given with framework"),
        (lambda: resolve(f"mlx+loss={HERE}:averaged"), "is a function on torch.*give --subject hf"),
        (
            lambda: resolve("hf+loss=tests.plugin_functions:padding_averaged"),
            "is a function on mlx.*give --subject mlx",
        ),
        (lambda: resolve(f"mlx+loss={PATHS}:Averaged"), "is on mlx and .* on torch"),
        (lambda: resolve("trl+loss=hf"), "the parts of 'trl' cannot be swapped"),
    ],
)  # fmt: skip
def test_what_cannot_be_a_path_is_one_clear_error(make, says):
    with pytest.raises(UsageError, match=says):
        make()


def test_a_wrong_stack_at_the_terminal_is_one_line():
    words = ["run", "--subject-loss", f"{HERE}:averaged", "--seeds", "1"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 2
    assert "give --subject hf" in result.output and "Traceback" not in result.output


@pytest.mark.long
@pytest.mark.parametrize("reference", ["hf", long("mlx-lm")])
def test_padding_that_is_averaged_in_is_named(reference, engine, small):
    record = run(engine, "03", f"hf+loss={HERE}:averaged", small, reference)
    assert record.verdict is Verdict.DIVERGE
    assert "the subject averages over padding" in describe(record)
    assert (
        "of the subject only loss is its own" in str(record.findings) or "+" in record.subject.path
    )


@pytest.mark.parametrize(
    ("path", "stage"),
    [
        ("Right", "03"), ("Counting", "03"), *(long("Right", s) for s in ("05", "07", "09")),
        *(long("Counting", s) for s in ("05", "07", "09")),
    ],
)  # fmt: skip
def test_a_right_loss_agrees(path, stage, engine, small):
    record = run(engine, stage, f"{PATHS}:{path}", small)
    assert record.verdict.green, describe(record)
    assert "of the subject only loss is its own, all else is taken from path hf" in record.findings


def test_it_is_held_to_the_floor_and_the_record_says_why(engine, small):
    record = run(engine, "05", f"{PATHS}:Right", small)
    assert "bits are not expected to be equal: loss of right may round" in str(record.findings)


@pytest.mark.long
def test_a_count_of_the_whole_step_weighs_micro_batches(engine, small):
    recipe = small.override(
        {"train.accumulation": 2, "train.batch_size": 3, "train.accumulation_weighting": "token"}
    )
    for path in ("Counting", "Right"):
        record = run(engine, "07", f"{PATHS}:{path}", recipe)
        assert record.verdict.green, describe(record)


def test_what_the_labels_leave_out_and_the_loss_learns_is_named(engine, small):
    record = run(engine, "09", f"{PATHS}:PaddingToo", small)
    assert record.verdict is Verdict.DIVERGE
    assert "the subject alone supervises" in record.reason


def test_a_loss_that_is_none_is_one_clear_reason(engine, small):
    with pytest.raises(Unsupported, match="the loss gives Tensor, no scalar"):
        engine.capture(f"{PATHS}:NoLoss", "gradient", small, gradient_inputs(engine, small))


def gradient_inputs(engine, recipe):
    from parity.audit.inputs import given, shapes

    return given("gradient", shapes(engine, ["hf"], recipe))


def test_labels_that_its_own_batches_bring_count(engine, small):
    """A collator that copies the ids: the padding is learned, whatever the recipe's mask is."""
    # With mask.end_shift=1 the reference learns the one padding token of these rows as well.
    record = run(engine, "09", f"{PATHS}:Batched", small.override({"mask.end_shift": 0}))
    assert record.verdict is Verdict.DIVERGE
    assert "the subject alone supervises" in describe(record)


@pytest.mark.long
def test_an_optimizer_and_a_clip(engine, small):
    assert run(engine, "06", f"{PATHS}:Adam", small).verdict.green
    record = run(engine, "06", f"hf+optimizer={HERE}:decayed", small)
    assert record.verdict is Verdict.DIVERGE
    found = engine.capture(f"hf+optimizer={HERE}:decayed", "config", small, Trace()).scalars
    assert found["optim.weight_decay"] == 0.1
    sgd = small.override({"optim.name": "sgd"})
    assert run(engine, "06", f"hf+clip={HERE}:halved", sgd).verdict is Verdict.DIVERGE


def test_a_loop_of_ones_own_is_watched(engine, small):
    record = run(engine, "07", f"{PATHS}:Looped", small)
    assert record.verdict.green, describe(record)
    found = engine.capture(f"{PATHS}:Looped", "config", small, Trace()).scalars
    assert (found["clip.mode"], found["accumulation.steps"]) == ("none", 1)


def test_the_search_names_a_loss_that_is_given_as_a_function(engine, small):
    stages = tuple(map(find, ("00", "03")))
    report = CauseSearch(
        engine, f"hf+loss={HERE}:averaged", "hf", small, {}, stages=stages
    ).search()
    [cause] = report.causes
    assert cause.sentence.startswith(f"the loss of {HERE}:averaged makes cross_entropy")
