"""What moved between two columns of a sweep."""

from __future__ import annotations

from parity.sweep.answers import Answer
from parity.sweep.changes import Change, changes, halved
from tests.test_sweep import CAUSE, cell_of, found_of


def test_changes_between_columns_name_what_moved():
    found = found_of(cell_of("0.31", "diverge", [CAUSE]), cell_of("0.32"))
    [change] = changes(found)
    assert change.states == ("diverges (rope_parameters.rope_theta)", "agrees")
    assert (change.before, change.since) == ("0.31", "0.32")
    [appeared] = changes(
        found_of(cell_of("0.31", note="this release has no file for it"), cell_of("0.32"))
    )
    assert appeared.sentence() == (
        "llama: mlx-lm does not know the model in 0.31, knows the model from 0.32 on or a release before it"
    )


def test_a_third_state_between_two_columns_is_a_change_of_its_own():
    """One thing is mended in 2, the other in 4, and 3 cannot be asked."""
    found = {"1": "fails (a, b)", "2": "fails (a)", "3": "", "4": "agrees", "5": "agrees"}
    whole = Change("llama", "loads", "plain", "0", "6", ("fails (a, b)", "agrees"), ("why", "ok"))
    moves = halved(whole, list(found), lambda release: (found[release], f"as {release} says"))
    assert [(m.before, m.since, m.states, m.unknown) for m in moves] == [
        ("1", "2", ("fails (a, b)", "fails (a)"), []),
        ("2", "4", ("fails (a)", "agrees"), ["3"]),
    ]
    assert moves[1].reasons == ("as 2 says", "as 4 says")


def test_a_configuration_that_is_made_for_later_questions_is_compared_as_well():
    moved = []
    for release, verdict in (("1", "diverge"), ("2", "agree")):
        cell = cell_of(release)
        cell.answers.append(Answer("gradient", "traps that agree", verdict))
        moved.append(cell)
    [change] = changes(found_of(*moved))
    assert (change.question, change.configuration) == ("gradient", "traps that agree")
