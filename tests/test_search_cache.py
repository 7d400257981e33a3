"""The earliest position at which a cache is off is named, whichever mode shows it."""

from __future__ import annotations

import pytest

from parity.bisect.locate_cache import first_position
from parity.cells.cell import Cell
from parity.cells.run import run_cell
from parity.record import Metric, Record, Side, Verdict
from parity.stages import find
from tests.cost import long


def a_record(**places):
    side = Side(path="mlx", recipe={}, digest="0")
    metrics = [
        Metric(name=name.replace("_", " "), verdict=Verdict.DIVERGE, value=1, tolerance=0,
               minimum_required_tolerance=1, where=where, gate=not name.startswith("reported"))
        for name, where in places.items()
    ]  # fmt: skip
    return Record(
        tool="0", probe=10, stage="kv_cache", model="tiny", seed=0, subject=side, reference=side,
        verdict=Verdict.DIVERGE, reason="", metrics=metrics,
    )  # fmt: skip


def test_the_earliest_of_all_modes_is_named():
    found = first_position(
        a_record(
            turns_at_once="turn 4, position 70",
            token_by_token="turn 2, position 11",
            greedy="turn 2, position 11",
            reported_only="turn 1, position 3",
        )
    )
    assert found.name == "turn 2, position 11"
    assert found.sentence.startswith("first off at turn 2, position 11: token by token, greedy")
    assert "later: turns at once from position 70 on" in found.sentence
    assert first_position(a_record(other="uncached (3, 4)")).sentence == ""


@pytest.mark.parametrize("planted", ["StaleCache", long("UncutCache")])
def test_facts_and_place_agree(planted, engine, small):
    record = run_cell(engine, Cell(find("10"), f"tests.cache_paths:{planted}", "mlx-lm", small))
    assert record.verdict is Verdict.DIVERGE
    found = first_position(record)
    earliest = min(v for k, v in record.facts.items() if k.endswith("cache: position"))
    assert found.name.endswith(f"position {earliest:g}")
