"""A divergence is searched by cheap questions; what is said holds when it is asked as a whole."""

from __future__ import annotations

import pytest

from parity.bisect.cheaper import WHOLE, Asked, cheapest, minimal, shortest
from parity.bisect.minimize import Answer, CouldNotAsk
from parity.cells.cell import Cell
from parity.cells.run import run_cell
from parity.recipe import Recipe
from parity.record import Metric, Record, Verdict
from parity.stages import find
from parity.stages.pair import Extent

NAMES = ["a", "b", "c", "d", "e"]
LONG = Recipe()  # 30 steps


def asked(shows, steps=2, unknown=()):
    """The search over causes that show from a step on, and what was asked of it."""
    questions = []

    def oracle(names, how):
        few = how.steps
        questions.append((sorted(names), few))
        if few in unknown:
            raise CouldNotAsk("no")
        trained = few or LONG.train.steps
        late = any(cause <= names and step <= trained for cause, step in shows.items())
        return Answer.DIVERGES if late else Answer.AGREES

    return minimal(NAMES, oracle, Asked(steps, Extent.DIFFERENCE), LONG), questions


def test_what_shows_early_is_asked_early_and_confirmed_once():
    found, questions = asked({frozenset("c"): 2})
    assert found.causes == [("c",)]
    in_full = [names for names, few in questions if not few]
    assert in_full == [["c"], ["a", "b", "d", "e"]]
    assert len(questions) > 2 * len(in_full)
    assert "asked in 2 steps of training, and confirmed in all 30" in found.ledger[-1].evidence


def test_a_set_of_two_is_confirmed_member_by_member():
    found, questions = asked({frozenset("ab"): 1})
    assert found.causes == [("a", "b")]
    assert [names for names, few in questions if not few] == [
        ["a", "b"], ["b"], ["a"], ["c", "d", "e"],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("shows", "causes"),
    [
        pytest.param(
            {frozenset("c"): 2, frozenset("e"): 20}, [("c",), ("e",)], id="another, later"
        ),
        pytest.param({frozenset("c"): 20}, [("c",)], id="nothing so early"),
        pytest.param({frozenset("ab"): 2, frozenset("a"): 9}, [("a",)], id="less is enough later"),
    ],
)
def test_what_does_not_hold_in_all_steps_is_searched_in_all(shows, causes):
    found, _ = asked(shows)
    assert found.verdict == "found"
    assert sorted(found.causes) == causes
    assert not any("asked in" in text for entry in found.ledger for text in entry.evidence)


def test_what_cannot_be_asked_in_few_steps_is_asked_in_all():
    found, questions = asked({frozenset("c"): 2}, unknown=(2,))
    assert found.causes == [("c",)]
    assert [few for _, few in questions].count(0) > 2


def by_bits(names_of_bits, names_of_verdict):
    """The search where bits of one set differ and another set makes the verdict, and how it was asked."""
    extents = []

    def oracle(names, how):
        extents.append(how.extent)
        bits = how.extent is Extent.DIFFERENCE
        cause = names_of_bits if bits else names_of_verdict
        return Answer.DIVERGES if cause <= names else Answer.AGREES

    return minimal(NAMES, oracle, Asked(extent=Extent.DIFFERENCE), LONG), extents


def test_where_bits_decide_the_whole_is_asked_once_of_what_is_found():
    found, extents = by_bits(frozenset("d"), frozenset("d"))
    assert found.causes == [("d",)]
    assert extents.count(Extent.VERDICT) == 2  # the cause alone, and all others


def test_bits_that_differ_by_themselves_are_no_cause():
    found, extents = by_bits(frozenset("d"), frozenset("b"))
    assert found.causes == [("b",)]
    assert extents.count(Extent.VERDICT) > 2


def record(stage, **metric):
    values = {"value": 1.0, "tolerance": 0.0, "minimum_required_tolerance": 1.0, "step": 1}
    gap = Metric(name="gap", verdict=Verdict.DIVERGE, **(values | metric))
    return Record.model_construct(stage=stage, metrics=[gap])


def test_the_cheapest_question_that_shows_a_divergence():
    assert cheapest(record("loss_curve"), LONG, []) == Asked(1, Extent.DIFFERENCE)
    # What has steps elsewhere does not train.
    assert cheapest(record("optimizer_step"), LONG, []) == Asked(0, Extent.DIFFERENCE)
    # A side that does not repeat itself is held to the floor, which bits tell nothing of.
    assert cheapest(record("gradient", why_floor="it does not repeat itself"), LONG, []) == WHOLE


@pytest.mark.long
def test_the_first_divergent_step_decides(engine, small):
    cell = Cell(find("07"), "mlx", "mlx-lm", small, {"subject": {"optim.lr": 1e-2}})
    record = run_cell(engine, cell)
    assert shortest(record, small, ["optim.lr"]) == 2
    assert shortest(record, small, ["train.steps"]) == 0
    assert shortest(record, small.override({"train.steps": 3}), []) == 0
    agreeing = record.model_copy(update={"metrics": []})
    assert shortest(agreeing, small, []) == 0
