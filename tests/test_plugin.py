"""Functions of a user as a path: what is given is used, the rest is the reference stack's."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from parity import plugin
from parity.bisect.causes import CauseSearch
from parity.cells.cell import Cell
from parity.cells.run import run_cell
from parity.cli import main
from parity.errors import UsageError
from parity.paths.registry import resolve
from parity.record import Verdict
from parity.stages import find
from parity.trace import Trace
from tests import plugin_functions as functions
from tests.cost import long
from tests.plugin_paths import Averaged, Mixed

HERE = "tests.plugin_functions"


def cell(stage, subject, reference, recipe):
    return Cell(find(stage), subject, reference, recipe)


def test_a_path_says_what_is_its_own_and_what_it_decides():
    assert (Averaged.name, Averaged.own_parts) == ("padding_averaged", ("loss",))
    assert Averaged.own_factors == ("mask.start_shift", "mask.end_shift")
    assert Mixed.own_parts == ("batching", "optimizer")
    assert "optim.lr" in Mixed.honours and "optim.lr" not in Mixed.own_factors
    assert "optim.weight_decay" in Mixed.own_factors
    assert "train.batch_size" in Mixed.honours
    assert Averaged.__module__ == "tests.plugin_paths"


def test_a_function_needs_no_file():
    kind = resolve(f"mlx+loss={HERE}:padding_averaged")
    assert kind.name == f"mlx+loss={HERE}:padding_averaged"
    assert "mask.end_shift" in kind.own_factors


@pytest.mark.long
def test_a_loop_of_several_micro_batches_shows_the_norm_before_its_own_clip(engine, small):
    changes = {"optim.clip": "norm", "optim.clip_value": 0.3, "train.accumulation": 2}
    recipe = small.override({**changes, "train.steps": 2, "train.batch_size": 2})
    path = "benchmarks.planted.plugins:loop_with_its_clip_path"
    record = run_cell(engine, cell("loss_curve", path, "hf", recipe))
    assert record.verdict.green, record.reason


def test_batches_are_drawn_with_the_tokenizer(engine, small):
    """Padded with its end-of-sequence id, where the reference pads with 0."""
    path = "benchmarks.planted.plugins:padded_with_the_end_path"
    drawn = engine.capture(path, "train", small.override({"train.steps": 1}), Trace()).arrays
    ids, lengths = drawn["batches/ids.0"], drawn["batches/lengths.0"]
    end = ids[0, lengths[0, 1] - 1]
    assert end and (ids[0, lengths[0, 1] :] == end).all()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: plugin.from_parts(), "needs a part of its own: give one of load"),
        (lambda: plugin.from_loss("loss"), "loss='loss' is no function"),
        (
            lambda: plugin.from_loss(functions.with_mask),
            "what 'mask' is cannot be told; give `batch=`",
        ),
        (
            lambda: plugin.from_parts(optimizer=functions.needs_a_thing),
            "takes 'gadget', which is neither a factor nor one of",
        ),
        (
            lambda: plugin.from_parts(optimizer=lambda model: None),
            "takes 'model', which is neither",
        ),
        (lambda: plugin.from_parts(loss=functions.adam, framework="jax"), "give mlx or torch"),
    ],
)
def test_what_cannot_be_a_path_is_one_clear_error(make, says):
    with pytest.raises(UsageError, match=says):
        make()


def test_a_part_that_is_not_given_cannot_be_lent():
    with pytest.raises(UsageError, match="has no optimizer of its own"):
        resolve("mlx-lm+optimizer=tests.plugin_paths:Averaged")


def test_a_wrong_function_at_the_terminal_is_one_line():
    words = ["run", "--subject-loss", f"{HERE}:nothing", "--seeds", "1"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 2
    assert "has no attribute 'nothing'" in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize("reference", ["mlx-lm", long("hf")])
def test_padding_that_is_averaged_in_is_named(reference, engine, small):
    subject = f"mlx+loss={HERE}:padding_averaged"
    record = run_cell(engine, cell("05", subject, reference, small))
    assert record.verdict is Verdict.DIVERGE
    assert "supervised tokens / all positions: does its mean count padding as well?" in str(
        record.hints
    )


def test_padding_that_is_supervised_is_named(engine, small):
    subject = f"mlx+loss={HERE}:padding_supervised"
    record = run_cell(engine, cell("09", subject, "mlx-lm", small))
    assert record.verdict is Verdict.DIVERGE
    assert "the subject alone supervises" in record.reason


def test_a_correct_loss_agrees_and_the_record_says_what_is_compared(engine, small):
    record = run_cell(engine, cell("05", "tests.plugin_paths:Masked", "mlx-lm", small))
    assert record.verdict is Verdict.IDENTICAL, record.reason
    assert "of the subject only loss is its own, all else is taken from path mlx" in record.findings
    record = run_cell(engine, cell("02", "tests.plugin_paths:Masked", "mlx-lm", small))
    assert "none of its own takes part here: this compares mlx with mlx-lm" in str(record.findings)


def test_batches_rows_and_an_optimizer_of_ones_own(engine, small):
    found = {
        stage: run_cell(engine, cell(stage, "tests.plugin_paths:Mixed", "mlx-lm", small))
        for stage in ("01", "06", "09")
    }
    assert {record.verdict for record in found.values()} == {Verdict.DIVERGE}
    assert "without bias correction" in str(found["06"].hints)
    assert "comes" in str(found["09"].metrics) or "rows" in found["09"].reason


def test_a_clip_of_ones_own(engine, small):
    record = run_cell(engine, cell("06", f"mlx+clip={HERE}:halved", "mlx", small))
    assert record.verdict in (Verdict.DIVERGE, Verdict.IDENTICAL)
    sgd = small.override({"optim.name": "sgd"})
    record = run_cell(engine, cell("06", f"mlx+clip={HERE}:halved", "mlx", sgd))
    assert record.verdict is Verdict.DIVERGE


def test_a_loop_of_ones_own_is_watched(engine, small):
    record = run_cell(engine, cell("07", "tests.plugin_paths:Looped", "mlx-lm", small))
    assert record.verdict is Verdict.IDENTICAL, record.reason
    found = engine.capture("tests.plugin_paths:Looped", "config", small, Trace()).scalars
    assert (found["clip.mode"], found["accumulation.steps"]) == ("none", 1)
    assert found["train.compile"] is False


@pytest.mark.long
def test_the_search_names_a_loss_that_is_given_as_a_function(engine, small):
    subject = f"mlx+loss={HERE}:padding_averaged"
    stages = tuple(map(find, ("00", "03")))
    report = CauseSearch(engine, subject, "mlx-lm", small, {}, stages=stages).search()
    [cause] = report.causes
    assert cause.sentence.startswith(f"the loss of {HERE}:padding_averaged makes cross_entropy")
    assert "the subject averages over padding" in str(cause.hints)
