"""The search engine: gaps, ends, and resuming."""

from __future__ import annotations

import json
import random

import pytest

from parity.bisect.search import CheckResult, Ledger, Outcome, SameEnds, search
from parity.errors import UsageError


class Oracle:
    """Like the low end before `bad`; counts how often each candidate is asked."""

    def __init__(self, bad, gaps=()):
        self.bad, self.gaps, self.asked = bad, set(gaps), []

    def __call__(self, candidate, attempt):
        self.asked.append(candidate)
        if candidate in self.gaps:
            return CheckResult(Outcome.GAP, f"{candidate} has no wheel")
        return CheckResult(Outcome.LOW if int(candidate) < self.bad else Outcome.HIGH)


def names(count):
    return [str(i) for i in range(count)]


@pytest.mark.parametrize("count", [2, 3, 7, 16, 33])
def test_every_place_is_found_in_logarithmic_time(count):
    for bad in range(1, count):
        oracle = Oracle(bad)
        found = search(names(count), oracle)
        assert (found.last_good, found.first_bad) == (str(bad - 1), str(bad))
        assert found.hidden == () and not found.inconclusive
        # both ends twice, one run a step, both neighbours once more
        assert found.checks == len(oracle.asked) <= 4 + (count - 2).bit_length() + 2
        assert min(oracle.asked.count(found.last_good), oracle.asked.count(found.first_bad)) >= 2


def test_gaps_are_skipped_and_hide_no_more_than_they_must():
    found = search(names(9), Oracle(5, gaps="4"))
    assert (found.last_good, found.first_bad, found.hidden) == ("3", "5", ("4",))
    assert found.gaps == {"4": "4 has no wheel"}
    found = search(names(9), Oracle(3, gaps="456"))
    assert (found.last_good, found.first_bad, found.hidden) == ("2", "3", ())


def test_any_pattern_of_gaps_gives_the_tightest_interval():
    generator = random.Random(1)
    for _ in range(300):
        count = generator.randint(2, 20)
        gaps = {n for n in names(count) if generator.random() < 0.4}
        usable = [n for n in names(count) if n not in gaps]
        good, bad = usable[: len(usable) // 2], usable[len(usable) // 2 :]
        if not good:
            with pytest.raises(UsageError, match="fewer than two can be checked"):
                search(names(count), Oracle(0, gaps))
            continue
        found = search(names(count), Oracle(int(bad[0]), gaps))
        assert (found.last_good, found.first_bad) == (good[-1], bad[0])
        assert set(found.hidden) <= set(found.gaps) <= gaps


def test_ends_that_agree_are_refused():
    with pytest.raises(SameEnds, match="both ends, 0 and 4, are alike: widen the range"):
        search(names(5), Oracle(9))
    with pytest.raises(SameEnds, match="are alike: widen"):
        search(names(5), Oracle(0))
    with pytest.raises(UsageError, match="3 is like the high end, 1 is not"):
        search(["3", "2", "1"], Oracle(2))


@pytest.mark.parametrize("count", [0, 1])
def test_one_candidate_is_nothing_to_search(count):
    with pytest.raises(UsageError, match=f"of {count} candidates fewer than two"):
        search(names(count), Oracle(0))


def test_a_repeat_that_disagrees_ends_inconclusive():
    def alternating(candidate, attempt):
        if candidate == "5":
            return CheckResult(Outcome.HIGH if attempt == 0 else Outcome.LOW)
        return CheckResult(Outcome.LOW if int(candidate) < 5 else Outcome.HIGH)

    found = search(names(9), alternating)
    assert found.inconclusive == "repeats of 5 disagree: like the high end, like the low end"
    assert not found.first_bad and not found.last_good


def test_a_search_resumes_and_asks_nothing_twice(tmp_path):
    file = tmp_path / "ledger.json"
    whole = Oracle(11)
    expected = search(names(20), whole)
    for stop in range(1, len(whole.asked)):
        file.unlink(missing_ok=True)
        first = Oracle(11)

        def dies(candidate, attempt, first=first, stop=stop):
            if len(first.asked) == stop:
                raise KeyboardInterrupt
            return first(candidate, attempt)

        with pytest.raises(KeyboardInterrupt):
            search(names(20), dies, ledger=Ledger(file, "x"))
        rest, ledger = Oracle(11), Ledger(file, "x")
        assert search(names(20), rest, ledger=ledger) == expected
        assert first.asked + rest.asked == whole.asked
        assert ledger.computed == len(rest.asked)
    assert json.loads(file.read_text())["checks"][0]["candidate"] == "0"
    # A wider range uses what is known of the narrow one.
    again = Oracle(11)
    search(names(40), again, ledger=Ledger(file, "x"))
    assert len(again.asked) < len(whole.asked)


def test_a_ledger_of_something_else_is_refused(tmp_path):
    file = tmp_path / "ledger.json"
    search(names(3), Oracle(1), ledger=Ledger(file, "this"))
    with pytest.raises(UsageError, match="the ledger of another search"):
        Ledger(file, "that")
    file.write_text("[]")
    with pytest.raises(UsageError, match="not a ledger"):
        Ledger(file, "this")


def test_progress_counts_down():
    told = []
    search(names(64), Oracle(40), progress=lambda name, answer, left: told.append((name, left)))
    assert told[0] == ("0", 8)
    lefts = [left for _, left in told]
    assert lefts == sorted(lefts, reverse=True)
