import random
from math import ceil, log2

import pytest

from parity.bisect.minimize import Answer, Status, ddmin, minimize

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
    retracted = [entry for entry in result.ledger if entry.status is Status.RETRACTED]
    assert retracted, "the single suspect is kept in the ledger as retracted"


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
