"""Minimal sets of changes that make two runs differ.

A pure search over names with an oracle; what the names are and how it is asked is not known here.
One cause among n harmless changes is found by weighted halving in about log2(n) questions; sets
whose members only matter together by delta debugging (ddmin: Zeller and Hildebrandt, IEEE TSE 28(2),
2002). Both ends are asked first, every answer is confirmed in both directions, and an oracle that
contradicts itself ends the search without a cause.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from math import ceil, log2


class Answer(StrEnum):
    """What an oracle says of a set of changes."""

    DIVERGES = "diverges"
    AGREES = "agrees"
    UNKNOWN = "unknown"
    """It could not be asked, which is evidence of nothing."""


class CouldNotAsk(Exception):
    """Raised by an oracle that has no answer; the message says why."""


_STRIP = {Answer.DIVERGES: "✗", Answer.AGREES: "✓", Answer.UNKNOWN: "?"}


class Status(StrEnum):
    """How a hypothesis stands."""

    OPEN = "open"
    CONFIRMED = "confirmed"
    REFUTED = "refuted"
    UNASKED = "could not be asked"


@dataclass
class Hypothesis:
    """One entry of the ledger."""

    changes: tuple[str, ...]
    status: Status = Status.OPEN
    evidence: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Question:
    """One question: which changes were made, the answer, how long it took (seconds).

    `reason` says why there is no answer.
    """

    changes: tuple[str, ...]
    answer: Answer
    why: str = ""
    seconds: float = 0.0
    reason: str = ""


@dataclass
class Search:
    """The outcome of a search.

    Attributes:
        verdict: `found`, `agree` (nothing to find) or `inconclusive`.
        causes: Sets, each of which makes the runs differ by itself; minimal unless `unproven`.
        unproven: Cause to what it leans on and could not be asked, in words.
        ledger: Every hypothesis with its evidence.
        runs: Questions that were asked; asking the same again costs nothing.
        questions: These, in their order.
    """

    verdict: str = "inconclusive"
    reason: str = ""
    causes: list[tuple[str, ...]] = field(default_factory=list)
    unproven: dict[tuple[str, ...], list[str]] = field(default_factory=dict)
    ledger: list[Hypothesis] = field(default_factory=list)
    runs: int = 0
    questions: list[Question] = field(default_factory=list)


class Contradiction(Exception):
    """The oracle answered one question in two ways."""


Oracle = Callable[[frozenset[str]], Answer]
Watch = Callable[[str, int, int], None]
"""Called with what is asked, the runs so far and an estimate of those left."""


class CachedOracle:
    """An oracle that remembers, asks `repeats` times, and refuses contradictions."""

    def __init__(self, oracle: Oracle, repeats: int, watch: Watch | None) -> None:
        self._oracle, self._repeats, self._watch = oracle, repeats, watch
        self.known: dict[frozenset[str], Answer] = {}
        self.reasons: dict[frozenset[str], str] = {}
        self.questions: list[Question] = []
        self.left = 0

    @property
    def runs(self) -> int:
        """Distinct questions asked."""
        return len(self.known)

    def __call__(self, changes: Iterable[str], why: str = "") -> Answer:
        """The answer for a set of changes."""
        key = frozenset(changes)
        if key not in self.known:
            what = why or ", ".join(sorted(key)) or "nothing changed"
            if self._watch:
                strip = "".join(_STRIP[answer] for answer in self.known.values())
                self._watch(f"{strip}… {what}{self._hint()}", self.runs, self.left)
            started = time.perf_counter()
            answers = {self._once(key) for _ in range(self._repeats)}
            answer = answers.pop() if len(answers) == 1 else Answer.UNKNOWN
            seconds = time.perf_counter() - started
            reason = self.reasons.get(key, "")
            self.questions.append(Question(tuple(sorted(key)), answer, why, seconds, reason))
            if answers:
                raise Contradiction(
                    f"asked {self._repeats} times of {_named(key)}: {_named(answers)}"
                )
            self.known[key] = answer
            self.left = max(0, self.left - 1)
        return self.known[key]

    def _once(self, key: frozenset[str]) -> Answer:
        try:
            return self._oracle(key)
        except CouldNotAsk as error:
            self.reasons[key] = str(error)
            return Answer.UNKNOWN

    def reason(self, changes: Iterable[str]) -> str:
        """Why a set could not be asked, in words that follow a sentence."""
        reason = self.reasons.get(frozenset(changes), "")
        return f": {reason}" if reason else ""

    def _hint(self) -> str:
        """What is known so far: the smallest set that makes a difference."""
        bad = [key for key, answer in self.known.items() if answer is Answer.DIVERGES]
        if len(bad) < 2:
            return ""
        least = min(bad, key=len)
        if len(least) == 1:
            return f"; {_named(least)} is a cause"
        return f"; a cause is among {_named(least) if len(least) < 4 else f'{len(least)} changes'}"

    def diverges(self, changes: Iterable[str], why: str = "") -> bool:
        """Whether a set is known to make a difference."""
        return self(changes, why) is Answer.DIVERGES


def minimize(
    changes: Sequence[str],
    oracle: Oracle,
    weights: Mapping[str, float] | None = None,
    repeats: int = 1,
    watch: Watch | None = None,
) -> Search:
    """Every disjoint minimal set of changes that makes a difference.

    Args:
        changes: Names of all changes; with all of them the runs are expected to differ.
        oracle: Says whether the runs differ when just these changes are made.
        weights: How likely each is a cause; halves are made of equal weight.
        repeats: How often each question is asked; answers that disagree end in `inconclusive`.
        watch: Told of each question.
    """
    ask = CachedOracle(oracle, repeats, watch)
    result = Search()
    try:
        _search(list(changes), ask, weights or {}, result)
    except Contradiction as error:
        result.verdict, result.causes = "inconclusive", []
        result.reason = f"repeats disagree: {error}"
        for entry in result.ledger:
            if entry.status is Status.CONFIRMED:
                entry.status = Status.OPEN
    result.runs, result.questions = ask.runs, ask.questions
    return result


def _search(
    changes: list[str], ask: CachedOracle, weights: Mapping[str, float], result: Search
) -> None:
    ask.left = 2 + ceil(log2(max(len(changes), 2))) + 2
    ends = ask(changes, "everything from the subject"), ask((), "everything from the reference")
    if ends[0] is Answer.AGREES:
        result.verdict, result.reason = "agree", "with everything from the subject they agree"
        return
    for names, answer in ((changes, ends[0]), ((), ends[1])):
        if answer is Answer.UNKNOWN:
            side = "subject" if names else "reference"
            why = ask.reason(names)
            result.reason = f"with everything from the {side} it could not be asked{why}"
            return
    if ends[1] is Answer.DIVERGES:
        result.reason = (
            "they differ even with everything from the reference: the cause is no change"
        )
        return
    rest = changes
    while ask.diverges(rest):
        cause = _one(rest, ask, weights, result)
        if cause is None:
            result.reason = "no set could be confirmed"
            result.causes = []
            return
        result.causes.append(cause)
        rest = [name for name in rest if name not in cause]
    if ask(rest) is Answer.UNKNOWN:
        result.reason = (
            f"{_named(result.causes[-1])} makes the runs differ, but without it they could not be "
            f"asked{ask.reason(rest)}"
        )
        result.causes = []
        return
    for entry in result.ledger:
        if entry.changes in result.causes:
            entry.status = Status.CONFIRMED
            entry.evidence.append("without it and the other causes the runs agree")
    result.verdict, result.reason = "found", ""


def _one(
    changes: list[str], ask: CachedOracle, weights: Mapping[str, float], result: Search
) -> tuple[str, ...] | None:
    """One minimal set within changes that are known to make a difference together."""
    suspect = _halve(changes, ask, weights)
    if suspect is not None:
        alone = Hypothesis((suspect,))
        result.ledger.append(alone)
        answer = ask((suspect,))
        if answer is Answer.DIVERGES:
            alone.evidence.append("by itself it makes the runs differ")
            return alone.changes
        if answer is Answer.UNKNOWN:
            alone.status = Status.UNASKED
            alone.evidence.append(f"by itself it could not be asked{ask.reason((suspect,))}")
        else:
            alone.status = Status.REFUTED
            alone.evidence.append("by itself it makes no difference")
    ask.left = 2 * len(changes)
    found = tuple(ddmin(changes, ask.diverges))
    together = Hypothesis(found)
    result.ledger.append(together)
    if not ask.diverges(found):
        return None
    _prove(together, ask, result)
    return found


def _prove(together: Hypothesis, ask: CachedOracle, result: Search) -> None:
    """Says which members of a set are needed: only that of which the rest is known to agree."""
    members = together.changes
    rests = {name: [other for other in members if other != name] for name in members}
    unanswered = [
        name for name in members if len(members) > 1 and ask(rests[name]) is Answer.UNKNOWN
    ]
    if not unanswered:
        together.evidence.append(
            "together they make the runs differ, and none of them can be left out"
            if len(members) > 1
            else "by itself it makes the runs differ"
        )
        return
    why = "; ".join(
        dict.fromkeys(ask.reason(rests[name]).removeprefix(": ") for name in unanswered)
    )
    doubt = (
        f"whether {_named(unanswered)} can be left out could not be asked"
        f"{f': {why}' if why else ''}, so the set may not be minimal"
    )
    together.evidence += ["together they make the runs differ", doubt]
    result.unproven.setdefault(members, []).append(doubt)


def _halve(changes: list[str], ask: CachedOracle, weights: Mapping[str, float]) -> str | None:
    """The suspect if there is a single cause: a half that agrees clears itself.

    A half that could not be asked clears nothing: then the other half has to differ by itself.
    """
    ranked = sorted(changes, key=lambda name: -weights.get(name, 1.0))
    while len(ranked) > 1:
        total = sum(weights.get(name, 1.0) for name in ranked)
        half, weight = 0, 0.0
        while half < len(ranked) - 1 and (half == 0 or weight < total / 2):
            weight += weights.get(ranked[half], 1.0)
            half += 1
        answer = ask(ranked[:half])
        if answer is Answer.UNKNOWN and not ask.diverges(ranked[half:]):
            return None
        ranked = ranked[:half] if answer is Answer.DIVERGES else ranked[half:]
    return ranked[0]


def ddmin(changes: Sequence[str], diverges: Callable[[Sequence[str]], bool]) -> list[str]:
    """A 1-minimal subset that still diverges: without any one of its members it does not."""
    current, parts = list(changes), 2
    while len(current) > 1:
        size = ceil(len(current) / parts)
        chunks = [current[i : i + size] for i in range(0, len(current), size)]
        for chunk in chunks:
            if len(chunks) > 1 and diverges(chunk):
                current, parts = chunk, 2
                break
            rest = [name for name in current if name not in chunk]
            if rest and diverges(rest):
                current, parts = rest, max(parts - 1, 2)
                break
        else:
            if parts >= len(current):
                return current
            parts = min(2 * parts, len(current))
    return current


def _named(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "no change"
