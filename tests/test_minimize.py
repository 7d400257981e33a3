import random
from math import ceil, log2

import pytest

from parity.bisect.minimize import Answer, CouldNotAsk, Status, ddmin, minimize

NAMES = [f"factor{i}" for i in range(35)]


def oracle_of(*causes):
    sets = [frozenset(cause) for cause in causes]
    return lambda changes: (
        Answer.DIVERGES if any(cause <= changes for cause in sets) else Answer.AGREES
    )


@pytest.mark.parametrize("count", [2, 5, 16, 35])
def test_a_single_cause_is_found_alone_and_quickly(count):
    for cause in NAMES[:count]:
        result = minimize(NAMES[:count], oracle_of({cause}))
        assert result.causes == [(cause,)]
        assert result.verdict == "found"
        assert result.runs <= ceil(log2(count)) + 4


def test_a_likely_cause_is_asked_first():
    result = minimize(NAMES, oracle_of({"factor20"}), weights={"factor20": 100.0})
    assert result.causes == [("factor20",)]
    assert result.runs <= 4


def test_pairs_that_matter_only_together():
    result = minimize(NAMES, oracle_of({"factor3", "factor31"}))
    assert [set(cause) for cause in result.causes] == [{"factor3", "factor31"}]
    refuted = [entry for entry in result.ledger if entry.status is Status.REFUTED]
    assert refuted, "the single suspect is kept in the ledger as refuted"


def test_every_independent_cause_is_reported():
    result = minimize(NAMES, oracle_of({"factor1"}, {"factor30"}, {"factor8", "factor9"}))
    assert {frozenset(c) for c in result.causes} == {
        frozenset({"factor1"}),
        frozenset({"factor30"}),
        frozenset({"factor8", "factor9"}),
    }
    assert all(e.status is not Status.OPEN for e in result.ledger)


def test_the_ends_are_asked_first():
    assert minimize(NAMES, lambda _: Answer.AGREES).verdict == "agree"
    always = minimize(NAMES, lambda _: Answer.DIVERGES)
    assert always.verdict == "inconclusive"
    assert "even with everything from the reference" in always.reason
    assert not always.causes
    assert minimize(NAMES, lambda _: Answer.UNKNOWN).verdict == "inconclusive"


def test_ddmin_is_one_minimal():
    diverges = oracle_of({"factor2", "factor17", "factor30"})
    found = ddmin(NAMES, lambda names: diverges(frozenset(names)) is Answer.DIVERGES)
    assert set(found) == {"factor2", "factor17", "factor30"}


def test_a_random_oracle_never_gives_a_confident_wrong_answer():
    """Answers flip with 20 %: 200 searches, several repeats each."""
    wrong = confident = 0
    for trial in range(200):
        rng = random.Random(trial)
        cause = rng.choice(NAMES[:12])
        truth = oracle_of({cause})

        def flaky(changes, truth=truth, rng=rng):
            answer = truth(changes)
            if rng.random() < 0.2:
                return Answer.AGREES if answer is Answer.DIVERGES else Answer.DIVERGES
            return answer

        result = minimize(NAMES[:12], flaky, repeats=6)
        confident += result.verdict != "inconclusive"
        wrong += result.verdict != "inconclusive" and result.causes != [(cause,)]
    assert wrong == 0
    steady = minimize(NAMES[:12], oracle_of({"factor5"}), repeats=6)
    assert steady.causes == [("factor5",)], "the same search finds the cause of a steady oracle"


def hindered(*causes, without):
    """An oracle that has no answer where any of `without` is missing and something is left."""
    truth = oracle_of(*causes)

    def oracle(changes):
        if changes and any(not names <= changes for names in without if names & changes):
            raise CouldNotAsk("the hybrid ended in an error")
        return truth(changes)

    return oracle


def test_what_could_not_be_asked_is_no_evidence():
    """`b` cannot be run without `a`: that it is needed with it is not known, and not claimed."""
    oracle = hindered({"a", "c"}, without=[frozenset("ab")])
    found = minimize(["a", "b", "c", "d"], oracle)
    assert found.verdict == "found"
    [cause] = found.causes
    assert {"a", "c"} <= set(cause)
    assert "b" in cause
    assert any("may not be minimal" in text for text in doubts(found))
    assert any("the hybrid ended in an error" in text for text in doubts(found))
    [entry] = [e for e in found.ledger if e.changes == cause]
    assert not any("none of them can be left out" in text for text in entry.evidence)


def test_a_half_that_could_not_be_asked_clears_nothing():
    """The cause is in the half without an answer, and is found all the same."""
    names = [f"factor{i}" for i in range(4)]

    def oracle(changes):
        if changes == frozenset(names[:2]):
            raise CouldNotAsk("out of memory")
        return Answer.DIVERGES if "factor1" in changes else Answer.AGREES

    found = minimize(names, oracle)
    assert found.causes == [("factor1",)]
    assert not doubts(found)


def test_a_suspect_that_could_not_be_asked_is_not_refuted():
    def oracle(changes):
        if changes == {"a"}:
            raise CouldNotAsk("it needs b")
        return Answer.DIVERGES if "a" in changes else Answer.AGREES

    found = minimize(["a", "b"], oracle)
    assert found.causes == [("a", "b")] or found.causes == [("b", "a")]
    assert [e.status for e in found.ledger if e.changes == ("a",)] in ([Status.UNASKED], [])
    assert not any(e.status is Status.REFUTED and "a" in e.changes for e in found.ledger)
    assert "it needs b" in doubts(found)[0]


@pytest.mark.parametrize("missing", [frozenset(NAMES), frozenset()])
def test_an_end_without_an_answer_says_why(missing):
    def oracle(changes):
        if changes == missing:
            raise CouldNotAsk("no such option")
        return Answer.DIVERGES if changes else Answer.AGREES

    found = minimize(NAMES, oracle)
    assert found.verdict == "inconclusive"
    assert "could not be asked: no such option" in found.reason


def doubts(found):
    return [text for texts in found.unproven.values() for text in texts]


def test_a_doubt_about_one_cause_is_not_said_of_another():
    """`a` needs `b` to be asked at all; `c` is a cause of its own."""

    def oracle(names):
        if "a" in names and "b" not in names:
            raise CouldNotAsk("it needs b")
        return Answer.DIVERGES if {"a", "b"} <= names or "c" in names else Answer.AGREES

    found = minimize(["a", "b", "c"], oracle)
    assert set(found.causes) == {("a", "b"), ("c",)}
    assert set(found.unproven) == {("a", "b")}
