"""The loss of a token is the subject's own, on logits of every kind, or it is said to be absent."""

from __future__ import annotations

import pytest

from parity.cells.cell import Cell
from parity.cells.run import run_cell
from parity.paths.registry import knobs
from parity.record import Verdict
from parity.report.text import describe
from parity.stages import find
from tests.cost import long

PROBE = find("03")
TOKEN = "cross-entropy per token"
CASES = [
    "logits of ±300 and more",
    "targets 10,000 above",
    "targets 10,000 below",
    "one-hot logits, rows of one target",
    "523 entries",
]


def verdicts(record):
    return {metric.name: metric.verdict for metric in record.metrics}


@pytest.mark.parametrize("reference", [long("mlx-lm"), "hf"])
def test_a_loss_of_another_function_differs_in_each_token(reference, engine, small):
    cell = Cell(PROBE, "tests.settings_paths:SmoothedLabels", reference, small)
    found = verdicts(run_cell(engine, cell))
    assert found[TOKEN] is Verdict.DIVERGE
    assert found[f"{TOKEN}, 523 entries"] is Verdict.DIVERGE


def test_an_average_over_padding_is_no_other_loss_of_a_token(engine, small):
    """Only the reduction differs: each token by itself has the reference's loss."""
    cell = Cell(PROBE, "tests.settings_paths:AveragesOverPadding", "hf", small)
    found = verdicts(run_cell(engine, cell))
    assert found["reduced loss"] is Verdict.DIVERGE
    assert all(verdict.green for name, verdict in found.items() if name.startswith(TOKEN))


def test_large_logits_overflow_where_nothing_is_subtracted(engine, small):
    """N(0, 3) alone shows nothing of it."""
    record = run_cell(engine, Cell(PROBE, "tests.settings_paths:NoSafeSoftmax", "hf", small))
    found = verdicts(record)
    assert found[TOKEN].green
    assert found[f"{TOKEN}, 523 entries"].green
    for case in ("logits of ±300 and more", "targets 10,000 above", "targets 10,000 below"):
        assert found[f"{TOKEN}, {case}"] is Verdict.DIVERGE, describe(record)


def test_a_loss_without_single_tokens_is_not_green(engine, small):
    record = run_cell(engine, Cell(PROBE, "tests.settings_paths:WholeRowsOnly", "mlx-lm", small))
    metric = next(m for m in record.metrics if m.name == TOKEN)
    assert metric.verdict is Verdict.INCONCLUSIVE
    assert "the subject has no loss of a single token: no lengths make it" in metric.note
    assert not record.verdict.green


@pytest.mark.parametrize(
    ("subject", "reference", "changes"),
    [
        ("mlx", "mlx-lm", {}),
        ("mlx", "hf", {}),
        long("mlx", "hf", {"mask.start_shift": 2, "mask.end_shift": -1}),
        long("mlx", "hf", {"model.dtype": "bfloat16"}),
        ("trl", "hf", {}),
        long("unsloth", "mlx-lm", {}),
        ("unsloth", "hf", {"unsloth.use_cce": True}),
    ],
)
def test_clean_cells_are_green_in_every_case(subject, reference, changes, engine, small):
    recipe = small.with_knobs(knobs([subject, reference])).override(changes)
    record = run_cell(engine, Cell(PROBE, subject, reference, recipe))
    assert record.verdict.green, describe(record)
    assert [m.name.partition(", ")[2] for m in record.metrics if m.name.startswith(TOKEN)] == [
        "", *CASES,
    ]  # fmt: skip
