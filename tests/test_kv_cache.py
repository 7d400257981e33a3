"""A cache that is wrong in one way turns probe 10, which names the first turn and position."""

from __future__ import annotations

import pytest

from parity.cells.cell import Cell
from parity.cells.run import run_cell
from parity.record import Verdict
from parity.report.text import describe
from parity.stages import find
from parity.stages.kv_cache import ENDS, TURNS, turn_of
from tests.cost import long

PREFILL = "turns fed at once, subject"

FAULTS = [
    # Which reference is used decides nothing here: it is the subject against itself.
    # The second turn begins at 11.
    # Generation is off one position before that, which no hint explains.
    long("ShiftedCache", "mlx-lm", "turn 2, position 11", ""),
    # The third is the first that should have seen the second.
    ("StaleCache", "mlx-lm", "turn 3, position 16", "mlx-examples/issues/1000"),
    # Position 64 is the first that must not see position 0.
    long("UncutCache", "hf", "turn 6, position 64", "mlx-lm/issues/390"),
]


@pytest.mark.long
@pytest.mark.parametrize(
    ("path", "reference", "where", "link"), FAULTS, ids=["ShiftedCache", "StaleCache", "UncutCache"]
)
def test_a_wrong_cache_is_placed(path, reference, where, link, engine, small):
    record = run_cell(engine, Cell(find("10"), f"tests.cache_paths:{path}", reference, small))
    assert record.verdict is Verdict.DIVERGE, describe(record)
    assert record.first_divergence["metric"] == PREFILL
    assert record.first_divergence["where"] == where
    assert where in record.reason
    assert [link in hint for hint in record.hints] == [True] * bool(link), describe(record)
    # The other side's own cache is in order.
    assert not any(m.name.endswith(", reference") for m in record.metrics if not m.verdict.green)


@pytest.mark.long
def test_a_torch_cache_that_is_wrong_is_placed(engine, small):
    record = run_cell(engine, Cell(find("10"), "tests.cache_paths:StaleTorchCache", "hf", small))
    assert record.first_divergence["metric"] == PREFILL
    assert record.first_divergence["where"] == "turn 3, position 16"
    # The earliest of all modes: generation shows it in the turn before.
    assert record.facts["subject cache: turn"] == 2


@pytest.mark.parametrize("reference", [long("mlx-lm"), "hf"])
def test_a_clean_cache_is_green_in_every_mode(reference, engine, small):
    record = run_cell(engine, Cell(find("10"), "mlx", reference, small))
    assert record.verdict.green, describe(record)
    names = [metric.name for metric in record.metrics]
    for mode in ("turns fed at once", "replies token by token", "cache trimmed and fed again"):
        for side in ("subject", "reference"):
            assert f"{mode}, {side}" in names
            assert f"greedy tokens, {mode}, {side}" in names
    assert not record.hints
    across = next(m for m in record.metrics if m.name.startswith("turns fed at once, both"))
    assert across.verdict is (Verdict.IDENTICAL if reference == "mlx-lm" else Verdict.AGREE)


def test_the_conversation_crosses_the_sliding_window_in_a_reply_and_at_once():
    assert [turn_of(position) for position in (0, 10, 11, 15, 16, ENDS[-1] - 1)] == [
        1, 1, 2, 2, 3, len(TURNS),
    ]  # fmt: skip
    assert turn_of(63) == turn_of(64) == 6  # even turns are replies
    assert max(TURNS) > 64
