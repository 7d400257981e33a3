"""What one side alone supervises is named by row, token and text, and known patterns by a hint."""

from __future__ import annotations

import numpy as np
import pytest

from parity.cells.cell import Cell
from parity.cells.run import run_cell
from parity.record import Verdict
from parity.report.text import describe
from parity.stages import find
from parity.stages.supervised import batches, draws, matched
from parity.stages.targets import TargetDifference, TrainingRow, patterns, place
from parity.trace import Trace
from tests.cost import long

PROBE = find("09")
CHAT = {"data.source": "chat", "mask.prompt": True}
NARROW = {"data.pad_multiple": 1, "data.pad_extra": 0}

FAULTS = [
    ("end", {}, {"mask.end_shift": 0}, ["reference alone", "one past the end"], "mlx-lm/issues/1697"),
    # The padding position is missing as well: no one mask explains it, and there is no hint.
    ("last", {}, {"mask.end_shift": -1}, ["reference alone", "the last token"], ""),
    ("start", {}, {"mask.start_shift": 1}, ["reference alone", "token 1 of"], "mlx-lm/issues/584"),
    ("header", CHAT, {"mask.start_shift": -2}, ["subject alone", "in the prompt"], "mlx-lm/issues/584"),
    ("prompt", CHAT, {"mask.prompt": False}, ["subject alone", "in the prompt"], "no prompt mask"),
    ("narrow", {}, NARROW, ["reference alone", "one past the end"], "unsloth-zoo/issues/672"),
]  # fmt: skip


@pytest.mark.parametrize("reference", ["mlx-lm", long("hf")])
@pytest.mark.parametrize(
    ("base", "changes", "words", "link"), [f[1:] for f in FAULTS], ids=[f[0] for f in FAULTS]
)
def test_what_one_side_alone_supervises_is_said(
    base, changes, words, link, reference, engine, small
):
    recipe = small.override(base)
    record = run_cell(engine, Cell(PROBE, "mlx", reference, recipe, {"subject": changes}))
    assert record.verdict is Verdict.DIVERGE, describe(record)
    for word in words:
        assert word in record.reason
    assert any(link in hint for hint in record.hints) is bool(link), describe(record)


@pytest.mark.parametrize("reference", [long("mlx-lm"), "hf"])
@pytest.mark.parametrize("base", [{}, CHAT, {"data.source": "mixed"}, {"data.max_length": 7}])
def test_clean_cells_are_identical(base, reference, engine, small):
    """Order and width of the batches differ across frameworks; what is supervised does not."""
    record = run_cell(engine, Cell(PROBE, "mlx", reference, small.override(base)))
    assert record.verdict is Verdict.IDENTICAL, describe(record)
    odd = "short, cut and masked rows" if "mask.prompt" in base else "short and cut rows"
    assert [metric.name.partition(", ")[2] for metric in record.metrics] == [
        "padded rows", "rows without padding", odd, "", "own batches",
    ]  # fmt: skip
    assert not record.hints


def test_rows_have_no_prompts_where_prompts_are_learned(engine, small):
    """A loss that knows no prompts is held against others on rows without; what it does is named."""
    for reference in ("mlx-lm", "hf"):
        cell = Cell(PROBE, "mlx+loss=tests.plugin_functions:no_prompts", reference, small)
        record = run_cell(engine, cell)
        assert record.verdict is Verdict.IDENTICAL, describe(record)
    _, inputs = batches([ROW], prompts=False)
    assert not any(inputs.arrays[f"batches/lengths.{n}"][1:, 0].any() for n in (2,))


def test_another_width_alone_supervises_the_same(engine, small):
    """A row of nine tokens has padding behind it at a width of 32, too."""
    cell = Cell(PROBE, "mlx", "mlx-lm", small, {"subject": {"data.pad_extra": 0}})
    assert run_cell(engine, cell).verdict is Verdict.IDENTICAL


def test_rows_that_nobody_knows_are_no_match(engine, small):
    cell = Cell(PROBE, "mlx", "mlx-lm", small, {"subject": {"data.append_eos": False}})
    record = run_cell(engine, cell)
    assert record.verdict is Verdict.DIVERGE
    assert "are none of the training rows" in record.reason


ROW = TrainingRow((5, 6, 7, 8, 9), 3, "training row 0")


def test_rows_are_matched_by_their_tokens():
    rows = [ROW, TrainingRow((5, 6), 1, "training row 1")]
    ids = [[5, 6, 7, 8, 9, 0], [5, 6, 0, 0, 0, 0], [1, 2, 0, 0, 0, 0]]
    arrays = {"ids.0": np.array(ids), "supervised.0": np.array([(0, 4, 0), (1, 0, 6)])}
    found, strangers = matched(Trace(arrays), rows)
    assert found == {ROW: [frozenset({(5, 0)})], rows[1]: [frozenset({(1, 6)})]}
    assert strangers == [(1, 2, 0, 0, 0, 0)]
    cut = {"ids.0": np.array([[5, 6, 7, 8]]), "supervised.0": np.zeros((0, 3), int)}
    assert list(matched(Trace(cut), [ROW])[0]) == [ROW]


def test_batches_are_of_the_rows_and_of_every_kind():
    handed, inputs = batches([ROW], prompts=True)
    assert [what for what, _ in handed] == [
        "padded rows", "rows without padding", "short, cut and masked rows",
    ]  # fmt: skip
    assert inputs.arrays["batches/ids.0"].shape == (1, 6)
    assert inputs.arrays["batches/ids.1"].tolist() == [[5, 6, 7, 8, 9]]
    assert inputs.arrays["batches/lengths.1"].tolist() == [[3, 5]]
    lengths = inputs.arrays["batches/lengths.2"]
    width = inputs.arrays["batches/ids.2"].shape[1]
    assert lengths[:, 1].max() == width
    assert lengths[:, 1].min() == 1
    assert (lengths[:, 0] > lengths[:, 1]).any()


def test_places_and_patterns():
    assert [place(ROW, index) for index in (1, 3, 4, 5, 6)] == [
        "in the prompt", "inside", "the last token", "one past the end", "padding",
    ]  # fmt: skip

    def found(*differences):
        facts = patterns(differences)
        return {name: value for name, value in facts.items() if not name.startswith("left")}

    both = {(3, 8), (4, 9)}
    header = TargetDifference(ROW, subject={(2, 7)}, both=both)
    assert found(header) == {"positions per row at the start": 1}
    prompt = TargetDifference(ROW, reference={(1, 6), (2, 7)}, both=both)
    assert found(prompt, prompt) == {"rows whose prompt is supervised": -2}
    last = TargetDifference(ROW, reference={(4, 9)}, both={(3, 8)})
    assert found(last) == {"positions per row at the last token": -1}
    assert found(last, header) == {}


PATHS = "tests.settings_paths"
CHAT_ROWS = {"data.source": "chat"}


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("OneRow", "the subject never trains on 23 of 24 distinct rows"),
        ("ForeverTheSameRows", "the subject never trains on 18 of 24 distinct rows"),
        long("RowsWithReplacement", "times in the subject's batches and"),
    ],
)
def test_rows_that_one_side_never_trains_on_are_counted(path, words, engine, small):
    recipe = small.override(CHAT_ROWS)
    record = run_cell(engine, Cell(PROBE, f"{PATHS}:{path}", "hf", recipe))
    assert record.verdict is Verdict.DIVERGE, describe(record)
    assert words in record.reason
    assert "2 passes over 24 rows" in record.reason


@pytest.mark.long
def test_a_dropped_last_batch_is_no_missing_row(engine, small):
    """24 rows in batches of 5: four rows are left over in each pass, shuffled anew."""
    recipe = small.override({**CHAT_ROWS, "train.batch_size": 5, "data.pad_extra": 0})
    recipe = recipe.override({"data.pad_multiple": 1, "mask.end_shift": 0})
    record = run_cell(engine, Cell(PROBE, "trl", "hf", recipe))
    assert record.verdict is Verdict.IDENTICAL, describe(record)


def test_enough_is_drawn():
    assert draws(24, 6) == (2, 8)
    assert draws(40, 6) == (6, 42)
    assert draws(5, 6) == (2, 2)
