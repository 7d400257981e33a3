"""Hybrids: parts of one MLX path in another, and the search over them."""

from __future__ import annotations

import pytest

from parity.bisect.answer import answer
from parity.bisect.causes import CauseSearch
from parity.cells.cell import Cell
from parity.cells.run import run_cell
from parity.errors import UsageError
from parity.paths import parts
from parity.paths.registry import resolve
from parity.record import Verdict
from parity.stages import find
from parity.trace import Trace
from tests.cost import long

WRONG_LOSS = "tests.planted_paths:LouderLoss"
THIRD_STEP = "tests.planted_paths:BadThirdStep"


def test_a_name_says_where_each_part_comes_from():
    found = parts.sources("mlx+loss=mlx-lm")
    assert (found["loss"], found["loop"], found["clip"]) == ("mlx-lm", "mlx", "mlx")
    assert parts.spec(found) == "mlx+loss=mlx-lm"
    assert resolve("mlx+loss=mlx-lm").name == "mlx+loss=mlx-lm"


@pytest.mark.parametrize("base", ["mlx", long("mlx-lm")])
def test_rows_are_those_of_the_part_that_makes_them(base, engine, small):
    donor = "benchmarks.planted.batching:no_end_of_sequence_path"
    texts = Trace(scalars={"texts": [], "conversations": []})
    theirs, own, mixed = (
        engine.capture(path, "tokenization", small, texts).arrays["row.0"]
        for path in (donor, base, f"{base}+batching={donor}")
    )
    assert len(own) == len(theirs) + 1
    assert mixed.tolist() == theirs.tolist()


def test_equal_parts_of_another_path_leave_the_settings_equal(engine, small):
    """The model that a loader gives draws weights, which are not those of the adapter."""
    hybrid = "mlx-lm+loader=mlx+wiring=mlx+batching=mlx"
    record = run_cell(engine, Cell(find("config"), hybrid, "mlx-lm", small))
    assert record.verdict.green, record.reason


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("mlx+head=mlx-lm", "'head=mlx-lm' is no swap"),
        ("mlx+loss", "'loss' is no swap"),
        ("hf+loss=mlx", "'hf' is on torch and 'mlx' on mlx"),
        ("mlx+loss=hf", "'mlx' is on mlx and 'hf' on torch"),
        ("trl+loss=hf", "the parts of 'trl' cannot be swapped: it is run as a whole"),
        ("mlx+loss=nothing", "unknown path 'nothing'"),
    ],
)
def test_what_is_no_hybrid_is_one_clear_error(name, says):
    with pytest.raises(UsageError, match=says):
        resolve(name)


def test_a_part_brings_what_it_always_does():
    """mlx-lm's batching pads to 32 in any loop; `mlx`'s does as it is told in mlx-lm's."""
    assert "data.pad_multiple" in resolve("mlx+batching=mlx-lm").fixed
    assert "data.pad_multiple" not in resolve("mlx-lm+batching=mlx").fixed
    assert "mask.end_shift" in resolve("mlx-lm+batching=mlx").fixed


@pytest.mark.parametrize(
    ("factor", "part"),
    [
        ("model.dtype", "loader"),
        ("lora.rank", "wiring"),
        ("mask.end_shift", "loss"),
        ("mask.prompt", "batching"),
        ("optim.clip_value", "clip"),
        ("optim.lr", "optimizer"),
        ("seed.value", "loop"),
    ],
)
def test_each_factor_has_the_part_that_honours_it(factor, part):
    assert parts.part_of(factor) == part


@pytest.mark.parametrize(
    "name",
    [
        long("mlx+loader=mlx-lm+wiring=mlx-lm+batching=mlx-lm"),
        long("mlx-lm+loss=mlx+batching=mlx+optimizer=mlx+clip=mlx"),
        long("mlx-lm+loader=mlx+wiring=mlx"),
    ],
)
def test_parts_of_equal_meaning_change_no_bit(name, engine, small):
    record = run_cell(engine, Cell(find("07"), name, "mlx-lm", small))
    assert record.verdict is Verdict.IDENTICAL, record.reason


@pytest.mark.parametrize(
    ("name", "verdict"),
    [
        (f"mlx+loss={WRONG_LOSS}", Verdict.DIVERGE),
        long(f"mlx-lm+loss={WRONG_LOSS}", Verdict.DIVERGE),
        (f"{WRONG_LOSS}+loss=mlx-lm", Verdict.IDENTICAL),
    ],
)
def test_a_part_from_elsewhere_is_really_used(name, verdict, engine, small):
    assert run_cell(engine, Cell(find("03"), name, "mlx-lm", small)).verdict is verdict


@pytest.mark.long
def test_a_clip_can_stand_in_the_loop_that_has_none(engine, small):
    recipe = small.override({"optim.clip": "norm", "optim.clip_value": 0.3})
    assert run_cell(engine, Cell(find("07"), "mlx-lm", "mlx", recipe)).verdict is Verdict.SKIP
    record = run_cell(engine, Cell(find("07"), "mlx-lm+clip=mlx", "mlx", recipe))
    assert record.verdict is Verdict.IDENTICAL, record.reason


@pytest.mark.parametrize(
    ("subject", "part", "stage", "probes"),
    [
        long(WRONG_LOSS, "loss", "cross_entropy", ()),
        (THIRD_STEP, "optimizer", "optimizer_step", ("06",)),
        long(THIRD_STEP, "optimizer", "optimizer_step", ()),
        long("tests.planted_paths:LazyLoop", "loop", "loss_curve", ()),
    ],
)
def test_the_search_names_the_part(subject, part, stage, probes, engine, small):
    stages = {"stages": tuple(map(find, ("00", *probes)))} if probes else {}
    report = CauseSearch(engine, subject, "mlx-lm", small, {}, **stages).search()
    assert [(c.parts, c.stage) for c in report.causes] == [((part,), stage)], answer(report)
    assert f"the {part} of {subject} makes {stage}" in answer(report)


@pytest.mark.long
def test_a_part_and_a_factor_are_both_named(engine, small):
    changes = {"lora.rank": 4, "train.compile": False, "optim.weight_decay": 0.05}
    report = CauseSearch(engine, THIRD_STEP, "mlx-lm", small, changes).search()
    found = [(c.stage, c.parts, list(c.factors)) for c in report.causes]
    assert found == [
        ("lora_init", (), ["lora.rank"]),
        ("optimizer_step", ("optimizer",), []),
        ("optimizer_step", (), ["optim.weight_decay"]),
    ]


@pytest.mark.long
@pytest.mark.parametrize("probes", [("09",), long(())], ids=["one", "all"])
def test_a_factor_that_a_part_never_honours_is_taken_with_the_part(probes, engine, small):
    """mlx-lm has no option for the mask: only another loss shows that the mask is the cause."""
    recipe = small.override({"mask.end_shift": 0})
    stages = {"stages": tuple(map(find, ("00", *probes)))} if probes else {}
    changes = {"mask.end_shift": 1}
    report = CauseSearch(engine, "mlx-lm", "mlx", recipe, changes, **stages).search()
    assert [list(c.factors) for c in report.causes] == [["mask.end_shift"]], answer(report)
