"""Saver, adapter reader and fuse as parts: hybrids of them, and searches that name them."""

from __future__ import annotations

import importlib.util
import json

import pytest

from parity.bisect.answer import answer
from parity.bisect.causes import CauseSearch
from parity.cells.cell import Cell
from parity.cells.run import run_cell
from parity.errors import UsageError
from parity.paths import parts
from parity.paths.registry import resolve
from parity.record import Verdict
from parity.report.text import describe
from parity.stages import find
from tests.cost import long

ROUND_TRIP, FUSE = find("round_trip"), find("fuse")


@pytest.fixture(scope="module")
def few(small):
    """Two layers are enough for files."""
    return small.override({"lora.num_layers": 2})


def needs(name):
    if "unsloth" in name and importlib.util.find_spec("unsloth_zoo") is None:
        pytest.skip("needs unsloth-zoo")


@pytest.mark.long
@pytest.mark.parametrize(
    "name",
    [
        "mlx+saver=mlx-lm+reader=mlx-lm",
        "mlx-lm+saver=mlx+reader=mlx",
        long("mlx+saver=mlx-lm"),
        long("mlx+reader=mlx-lm"),
        long("mlx+saver=unsloth"),
        long("mlx-lm+saver=unsloth+reader=unsloth"),
        long("unsloth+reader=mlx"),
    ],
)
def test_parts_of_equal_meaning_change_no_bit(name, engine, few):
    needs(name)
    record = run_cell(engine, Cell(ROUND_TRIP, name, "mlx-lm", few))
    assert record.verdict is Verdict.IDENTICAL, describe(record)


def test_files_that_a_reader_does_not_take_are_no_verdict(engine, few):
    """unsloth-zoo reads from the files which base it needs, mlx-lm's do not name it so."""
    needs("unsloth")
    record = run_cell(engine, Cell(ROUND_TRIP, "mlx+reader=unsloth", "mlx", few))
    assert record.verdict is Verdict.ERROR, describe(record)


BROKEN = [
    ("tests.round_trip_paths:NoScale", "saver", ROUND_TRIP, "scale 20 in the place of 2"),
    long(
        "tests.round_trip_paths:NotLoaded",
        "reader",
        ROUND_TRIP,
        "none has an adapter after loading",
    ),
    long("tests.fuse_paths:AnotherScale", "fuse", FUSE, "logits after fusing"),
    long("tests.round_trip_paths:ZeroB", "saver", ROUND_TRIP, "B is zero"),
    long("tests.round_trip_paths:SavedInBfloat16", "saver", ROUND_TRIP, "rounded to bfloat16"),
    long("tests.fuse_paths:NothingFused", "fuse", FUSE, "the adapter is lost or another one"),
]


@pytest.mark.parametrize(
    ("subject", "part", "stage", "words"),
    BROKEN,
    ids=["NoScale", "NotLoaded", "AnotherScale", "ZeroB", "SavedInBfloat16", "NothingFused"],
)
def test_the_search_names_the_part(subject, part, stage, words, engine, few):
    stages = (find("00"), stage)
    report = CauseSearch(engine, subject, "mlx-lm", few, {}, stages=stages).search()
    assert [(c.parts, c.stage) for c in report.causes] == [((part,), stage.name)], answer(report)
    assert f"the {parts.in_words(part)} of {subject} makes {stage.name}" in answer(report)
    assert words in answer(report)
    assert "with that of mlx-lm it agrees" in answer(report)


@pytest.mark.parametrize("stage", ["logits", "optimizer_step", "loss_curve"])
def test_parts_that_a_stage_does_not_use_stay_with_the_loop(stage, engine, few):
    """Else captures that are alike would be made twice."""
    search = CauseSearch(engine, "tests.round_trip_paths:NoScale", "mlx-lm", few, {})
    assert search.cell(find(stage), (), {"saver"}).subject == "mlx-lm"
    search.parts -= {"saver"}
    assert search.cell(find(stage), ()).subject == "tests.round_trip_paths:NoScale"
    whole = search.cell(ROUND_TRIP, ()).subject
    assert whole == "tests.round_trip_paths:NoScale+saver=mlx-lm"


@pytest.mark.long
def test_a_reader_and_a_saver_that_are_both_off_are_both_named(engine, few):
    subject = "tests.round_trip_paths:NoScale+reader=tests.round_trip_paths:NotLoaded"
    stages = (find("00"), ROUND_TRIP)
    report = CauseSearch(engine, subject, "mlx-lm", few, {}, stages=stages).search()
    found = {part for cause in report.causes for part in cause.parts}
    assert found == {"saver", "reader"}, answer(report)


def test_a_saver_that_is_inherited_around_is_not_lent():
    name = "tests.round_trip_paths:SavedTooEarly"
    assert "saver" not in resolve(name).own_parts
    with pytest.raises(UsageError, match="has no saver of its own"):
        resolve(f"mlx+saver={name}")


FUNCTIONS = "tests.plugin_functions"


@pytest.mark.parametrize(
    ("function", "part", "stage", "verdict"),
    [
        ("save_without_scale", "saver", ROUND_TRIP, Verdict.DIVERGE),
        ("read_nothing", "reader", ROUND_TRIP, Verdict.DIVERGE),
        ("fuse_nothing", "fuse", FUSE, Verdict.DIVERGE),
        long("save_adapter", "saver", ROUND_TRIP, Verdict.IDENTICAL),
        long("read_adapter", "reader", ROUND_TRIP, Verdict.IDENTICAL),
        long("fuse_layers", "fuse", FUSE, Verdict.AGREE),
    ],
)
def test_a_function_of_a_user_stands_for_a_part(function, part, stage, verdict, engine, few):
    name = f"mlx+{part}={FUNCTIONS}:{function}"
    record = run_cell(engine, Cell(stage, name, "mlx-lm", few))
    assert record.verdict is verdict, describe(record)


@pytest.mark.long
def test_the_command_searches_one_probe(tmp_path):
    from click.testing import CliRunner

    from parity.cli import main

    words = ["bisect", "--subject", "tests.fuse_paths:NothingFused", "--probe", "fuse"]
    words += ["--set", "lora.num_layers=2", "--out", str(tmp_path)]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 1, done.output
    assert "the fuse of tests.fuse_paths:NothingFused makes fuse (probe 13) diverge" in done.stdout
    found = json.loads((tmp_path / "bisect.json").read_text())
    assert [cause["parts"] for cause in found["causes"]] == [["fuse"]]
