"""Where an outcome changes in an ordered list, as `git bisect` finds it, with gaps."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

from parity.errors import UsageError
from parity.files import write_atomically

SCHEMA = 3


class Outcome(StrEnum):
    """Which end of the list a candidate is like; neither end need be the right one."""

    LOW = "like the low end"
    HIGH = "like the high end"
    GAP = "gap"  # it cannot be installed, imported or run


Quantities = dict[str, tuple[str, float]]
"""Metric to its verdict and value."""


class CheckResult(NamedTuple):
    """The outcome of one check, why in a sentence, what was measured, and by which code."""

    outcome: str
    reason: str = ""
    quantities: Quantities = {}  # noqa: RUF012 - a default that nobody changes
    loaded: Mapping[str, str] = {}
    """Manifests of the captures that it leaned on, to their interpreters."""


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

    Args:
        file: Where they are kept.
        about: What the search is about; a file holds the checks of one search.
        current: Whether the code that a check leaned on (`CheckResult.loaded`) is what would run now.

    Raises:
        UsageError: The file is no ledger, or its search is not what this one is `about`.
    """

    def __init__(
        self,
        file: Path | None = None,
        about: str = "",
        current: Callable[[Mapping[str, str]], bool] = lambda _: True,
    ) -> None:
        self.file, self.about, self.checks = file, about, list[dict[str, Any]]()
        self.current = current
        self._own = list[dict[str, Any]]()  # checks of this search
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
            asked = candidate, attempt
            found = [c for c in self.checks if (c["candidate"], c["attempt"]) == asked]
            for done in found:
                if done in self._own or self.current(done["loaded"]):
                    measured = {k: (v[0], v[1]) for k, v in done["quantities"].items()}
                    return CheckResult(done["outcome"], done["reason"], measured, done["loaded"])
                self.checks.remove(done)
            started = time.perf_counter()
            answer = check(candidate, attempt)
            entry = {"candidate": candidate, "attempt": attempt, **answer._asdict()}
            entry["seconds"] = round(time.perf_counter() - started, 3)
            self.checks.append(entry)
            self._own.append(entry)
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
    `finished` are these in their order, `candidates` what was searched.
    """

    last_good: str = ""
    first_bad: str = ""
    hidden: tuple[str, ...] = ()
    gaps: dict[str, str] = field(default_factory=dict)
    inconclusive: str = ""
    checks: int = 0
    candidates: tuple[str, ...] = ()
    finished: tuple[FinishedCheck, ...] = ()


class _Unsettled(Exception):
    pass


class _Search:
    def __init__(self, candidates: Sequence[str], check: VersionCheck, watch: Progress) -> None:
        self.names, self.check, self.watch = candidates, check, watch
        self.votes: dict[str, list[str]] = {}
        self.gaps: dict[str, str] = {}
        self.finished: list[FinishedCheck] = []
        self.open = range(1, len(candidates) - 1)

    def narrow(self) -> ChangePoint:
        low, first = self.end(range(len(self.names)))
        high, last = self.end(range(len(self.names) - 1, low, -1))
        if first is last:
            ends = " and ".join((self.names[low], self.names[high]))
            raise SameEnds(f"both ends, {ends}, are alike: widen the range")
        if first is Outcome.HIGH:
            raise UsageError(f"{self.names[low]} is like the high end, {self.names[high]} is not")
        self.open = range(low + 1, high)
        while inside := [i for i in self.open if self.names[i] not in self.gaps]:
            middle = min(inside, key=lambda i: abs(2 * i - low - high))
            outcome = self.settle(middle)
            low = middle if outcome is Outcome.LOW else low
            high = middle if outcome is Outcome.HIGH else high
            self.open = range(low + 1, high)
        self.settle(low, times=2)
        self.settle(high, times=2)
        return ChangePoint(self.names[low], self.names[high], tuple(self.names[low + 1 : high]))

    def end(self, indices: Iterable[int]) -> tuple[int, Outcome]:
        for index in indices:
            if (outcome := self.settle(index, times=2)) is not Outcome.GAP:
                return index, outcome
        why = "".join(f"; {name}: {reason}" for name, reason in self.gaps.items())
        raise UsageError(f"of {len(self.names)} candidates fewer than two can be checked{why}")

    def settle(self, index: int, times: int = 1) -> Outcome:
        """The outcome of a candidate, checked so many times."""
        votes = self.votes.setdefault(name := self.names[index], [])
        while len(votes) < times:
            answer = self.check(name, len(votes))
            votes.append(Outcome(answer.outcome))
            self.finished.append(FinishedCheck(name, answer.outcome, answer.reason))
            self.watch(name, answer, math.ceil(math.log2(len(self.open) + 1)) + 2)
            if votes == [Outcome.GAP]:
                self.gaps[name] = answer.reason
                return Outcome.GAP
            if len(set(votes)) > 1:
                raise _Unsettled(f"repeats of {name} disagree: {', '.join(votes)}")
        return Outcome(votes[0])


def search(
    candidates: Sequence[str],
    check: VersionCheck,
    *,
    ledger: Ledger | None = None,
    progress: Progress | None = None,
) -> ChangePoint:
    """Finds the first of candidates, like the low end at the start, that is like the high end.

    The low end is checked before the high one; each end, and each neighbour of the change, twice. Two
    checks of one candidate that disagree make the search inconclusive.

    Raises:
        SameEnds: Both ends are alike.
        UsageError: Fewer than two candidates that can be checked.
    """
    remembered = (ledger or Ledger()).remember(check)
    run = _Search(candidates, remembered, progress or (lambda *_: None))
    try:
        found = run.narrow()
    except _Unsettled as reason:
        found = ChangePoint(inconclusive=str(reason))
    return replace(
        found,
        gaps=run.gaps,
        checks=len(run.finished),
        candidates=tuple(candidates),
        finished=tuple(run.finished),
    )
