"""A divergence of training is searched in few steps; what is said holds in all of them."""

from __future__ import annotations

import pytest

from parity.bisect.fewer_steps import minimal, shortest
from parity.bisect.minimize import Answer, CouldNotAsk
from parity.cells.cell import Cell
from parity.cells.run import run_cell
from parity.recipe import Recipe
from parity.stages import find

NAMES = ["a", "b", "c", "d", "e"]
LONG = Recipe()  # 30 steps


def asked(shows, steps=2, unknown=()):
    """The search over causes that show from a step on, and what was asked of it."""
    questions = []

    def oracle(names, few):
        questions.append((sorted(names), few))
        if few in unknown:
            raise CouldNotAsk("no")
        trained = few or LONG.train.steps
        late = any(cause <= names and step <= trained for cause, step in shows.items())
        return Answer.DIVERGES if late else Answer.AGREES

    return minimal(NAMES, oracle, steps, LONG), questions


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


@pytest.mark.long
def test_the_first_divergent_step_decides(engine, small):
    cell = Cell(find("07"), "mlx", "mlx-lm", small, {"subject": {"optim.lr": 1e-2}})
    record = run_cell(engine, cell)
    assert shortest(record, small, ["optim.lr"]) == 2
    assert shortest(record, small, ["train.steps"]) == 0
    assert shortest(record, small.override({"train.steps": 3}), []) == 0
    agreeing = record.model_copy(update={"metrics": []})
    assert shortest(agreeing, small, []) == 0
