"""Where an outcome changes in an ordered list, as `git bisect` finds it, with gaps and random flips."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

from parity.errors import UsageError
from parity.files import write_atomically

SCHEMA = 1
RISK = 1e-4  # bound on the probability that a search names a wrong candidate
PATIENCE = 3.0  # times the expected number of repeats before a candidate is given up


class Outcome(StrEnum):
    """What a check says of a candidate."""

    GOOD = "good"
    BAD = "bad"
    GAP = "gap"  # it cannot be installed, imported or run
    FLAKY = "flaky"  # the check disagreed with itself


class CheckResult(NamedTuple):
    """The outcome of one check, and why in a sentence."""

    outcome: str
    reason: str = ""


class FinishedCheck(NamedTuple):
    """One answer on the way: of which candidate, and what was said."""

    candidate: str
    outcome: str
    reason: str


VersionCheck = Callable[
    [str, int], CheckResult
]  # (candidate, attempt from 0); each attempt is run afresh
Progress = Callable[
    [str, CheckResult, int], None
]  # (candidate, answer, runs that are probably left)


class SameEnds(UsageError):
    """Both ends have one outcome: no change to be found between them."""


class Ledger:
    """Finished checks in a JSON file (None: in memory only), so that none is run twice.

    Raises:
        UsageError: The file is no ledger, or its search is not what this one is `about`.
    """

    def __init__(self, file: Path | None = None, about: str = "") -> None:
        self.file, self.about, self.checks = file, about, list[dict[str, Any]]()
        self.computed = 0  # checks that were run, not found in the file
        if file is not None and file.exists():
            try:
                data = json.loads(file.read_text(encoding="utf-8"))
                owner, self.checks = (data["schema_version"], data["about"]), data["checks"]
            except (ValueError, KeyError, TypeError) as error:
                raise UsageError(f"{file}: not a ledger of a search: {error!r}") from None
            if owner != (SCHEMA, about):
                raise UsageError(f"{file}: the ledger of another search: delete it or name another")

    def remember(self, check: VersionCheck) -> VersionCheck:
        """The same check, run only when its answer is not known."""

        def remembered(candidate: str, attempt: int) -> CheckResult:
            for done in self.checks:
                if (done["candidate"], done["attempt"]) == (candidate, attempt):
                    return CheckResult(done["outcome"], done["reason"])
            started = time.perf_counter()
            answer = check(candidate, attempt)
            entry = {"candidate": candidate, "attempt": attempt, **answer._asdict()}
            self.checks.append({**entry, "seconds": round(time.perf_counter() - started, 3)})
            self.computed += 1
            if self.file is not None:
                data = {"schema_version": SCHEMA, "about": self.about, "checks": self.checks}
                write_atomically(self.file, json.dumps(data, indent=1).encode())
            return answer

        return remembered


@dataclass(frozen=True)
class ChangePoint:
    """Where the outcome changes: from `last_good` to `first_bad`, both empty when inconclusive.

    `hidden` are the gaps between them, `gaps` all that were met, `checks` counts the answers used,
    `told` are these in their order, `candidates` what was searched.
    """

    last_good: str = ""
    first_bad: str = ""
    hidden: tuple[str, ...] = ()
    gaps: dict[str, str] = field(default_factory=dict)
    inconclusive: str = ""
    checks: int = 0
    candidates: tuple[str, ...] = ()
    told: tuple[FinishedCheck, ...] = ()


def margin(candidates: int, flips: float, risk: float = RISK) -> int:
    """How far one outcome must lead among the repeats of a candidate.

    Each repeat shows the wrong outcome with probability `flips` at most, independently. Wald's
    sequential test is then a random walk that stops d ahead, on the wrong side with probability
    1 / (1 + ((1 - flips) / flips) ** d) (gambler's ruin, Feller I, XIV.2). d is the smallest that
    keeps this below risk / candidates, so that a search names a wrong candidate with probability
    `risk` at most (union bound); giving up early only lowers it.

    Raises:
        UsageError: `flips` or `risk` out of range.
    """
    if not (0 <= flips < 0.5 and 0 < risk < 1):
        raise UsageError(f"flips must be in [0, 0.5) and risk in (0, 1), not {flips} and {risk}")
    odds = math.log((1 - flips) / flips) if flips else math.inf
    return max(1, math.ceil(math.log(max(candidates, 1) / risk) / odds))


class _Unsettled(Exception):
    pass


class _Search:
    def __init__(
        self,
        candidates: Sequence[str],
        check: VersionCheck,
        flips: float,
        risk: float,
        watch: Progress,
    ) -> None:
        self.names, self.check, self.flips, self.watch = candidates, check, flips, watch
        self.margin = margin(len(candidates), flips, risk)
        self.repeats = self.margin / (1 - 2 * flips)  # expected: the walk's drift is 1 - 2 flips
        self.votes: dict[str, list[str]] = {}
        self.gaps: dict[str, str] = {}
        self.told: list[FinishedCheck] = []
        self.open = range(1, len(candidates) - 1)

    def narrow(self) -> ChangePoint:
        low, first = self.end(range(len(self.names)))
        high, last = self.end(range(len(self.names) - 1, low, -1))
        if first is last:
            ends = " and ".join((self.names[low], self.names[high]))
            raise SameEnds(f"both ends, {ends}, are {first}: widen the range")
        if first is Outcome.BAD:
            raise UsageError(f"{self.names[low]} is bad, {self.names[high]} good: swap the ends")
        self.open = range(low + 1, high)
        while inside := [i for i in self.open if self.names[i] not in self.gaps]:
            middle = min(inside, key=lambda i: abs(2 * i - low - high))
            outcome = self.settle(middle)
            low = middle if outcome is Outcome.GOOD else low
            high = middle if outcome is Outcome.BAD else high
            self.open = range(low + 1, high)
        self.settle(low, more=1)
        self.settle(high, more=1)
        return ChangePoint(self.names[low], self.names[high], tuple(self.names[low + 1 : high]))

    def end(self, indices: Iterable[int]) -> tuple[int, Outcome]:
        for index in indices:
            if (outcome := self.settle(index, more=1)) is not Outcome.GAP:
                return index, outcome
        why = "".join(f"; {name}: {reason}" for name, reason in self.gaps.items())
        raise UsageError(f"of {len(self.names)} candidates fewer than two can be checked{why}")

    def settle(self, index: int, more: int = 0) -> Outcome:
        """Repeats a check until one outcome leads by the margin and `more`."""
        votes = self.votes.setdefault(name := self.names[index], [])
        while True:
            good, bad = votes.count(Outcome.GOOD), votes.count(Outcome.BAD)
            if abs(good - bad) >= self.margin + more:
                return Outcome.GOOD if good > bad else Outcome.BAD
            if len(votes) >= PATIENCE * (self.repeats + 1):
                told = f"{good} good and {bad} bad of {len(votes)} runs"
                raise _Unsettled(f"{name}: {told}, more doubt than flips={self.flips:g} explains")
            answer = self.check(name, len(votes))
            votes.append(Outcome(answer.outcome))
            self.told.append(FinishedCheck(name, *answer))
            steps = math.ceil(math.log2(len(self.open) + 1))
            self.watch(name, answer, math.ceil(steps * self.repeats) + 2)
            if votes == [Outcome.GAP]:
                self.gaps[name] = answer.reason
                return Outcome.GAP
            if not self.flips and (len(set(votes)) > 1 or Outcome.FLAKY in votes):
                raise _Unsettled(f"repeats of {name} disagree: {', '.join(votes)}")


def search(
    candidates: Sequence[str], check: VersionCheck, *, flips: float = 0.0, risk: float = RISK,
    ledger: Ledger | None = None, progress: Progress | None = None,
) -> ChangePoint:  # fmt: skip
    """Finds the first bad of candidates that are good at the start and bad at the end.

    The low end is checked before the high one; each end, and each neighbour of the change, once more
    than needed. With flips 0 two repeats that disagree make the search inconclusive; otherwise they
    are repeated until the probability of a wrong answer is below `risk` (see `margin`).

    Raises:
        SameEnds: Both ends are good, or both bad.
        UsageError: Fewer than two candidates that can be checked.
    """
    remembered = (ledger or Ledger()).remember(check)
    asked = _Search(candidates, remembered, flips, risk, progress or (lambda *_: None))
    try:
        found = asked.narrow()
    except _Unsettled as reason:
        found = ChangePoint(inconclusive=str(reason))
    return replace(
        found,
        gaps=asked.gaps,
        checks=len(asked.told),
        candidates=tuple(candidates),
        told=tuple(asked.told),
    )
