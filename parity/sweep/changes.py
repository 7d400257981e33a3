"""What changed between two columns: cells whose state moved, and the release in which it did."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from parity.sweep.answers import ABSENT, Answer, Cell
from parity.sweep.bench import Column
from parity.sweep.columns import Columns
from parity.sweep.models import Architecture
from parity.sweep.questions import LOADS, LOGITS, QUESTIONS
from parity.sweep.run import Found, Sweep

MODEL = "model"
"""In the place of a question: whether mlx-lm has a file for the model, or takes that of another."""


@dataclass
class Change:
    """One question of one configuration that answers otherwise from a column on.

    Attributes:
        since: The first release with the later state, as far as it was narrowed down.
        before: The last one with the earlier state.
        states: The two states in words.
        unknown: Releases between the two that could not be run.
    """

    architecture: str
    question: str
    configuration: str
    before: str
    since: str
    states: tuple[str, str]
    reasons: tuple[str, str] = ("", "")
    unknown: list[str] = field(default_factory=list)
    narrowed: bool = True

    def sentence(self) -> str:
        """The change in words."""
        gap = f" (or in {', '.join(self.unknown)}, which cannot be run)" if self.unknown else ""
        between = "" if self.narrowed else " or a release before it"
        what = "mlx-lm" if self.question == MODEL else f"{self.question} of {self.configuration!r}"
        return f"{self.architecture}: {what} {self.states[0]} in {self.before}, {self.states[1]} from {self.since} on{between}{gap}"


def state(cell: Cell | None, question: str, configuration: str) -> str:
    """What a cell says of one question of one configuration, without numbers."""
    if cell is None:
        return ""
    if cell.verdict(question) == ABSENT and not cell.of(question):
        return ""
    found = _answer(cell, question, configuration)
    if found is None:
        return "is absent" if cell.note else ""
    if found.green:
        return "agrees"
    if not found.red:
        return ""
    names = sorted(
        {
            cause.name
            for cause in found.causes
            if cause.name and cause.kind in ("setting", "loading")
        }
    )
    word = {"diverge": "diverges", "error": "fails", "inconclusive": "is inconclusive"}[
        found.verdict
    ]
    return f"{word} ({', '.join(names)})" if names else word


def _answer(cell: Cell, question: str, configuration: str) -> Answer | None:
    return next((a for a in cell.of(question) if a.configuration == configuration), None)


def changes(found: Found) -> list[Change]:
    """All moves between neighbouring columns; what follows from loading is left out."""
    listed: list[Change] = []
    for name in sorted(found.architectures):
        for old, new in itertools.pairwise(found.columns):
            before, after = found.cells.get((name, old)), found.cells.get((name, new))
            if before is None or after is None:
                continue
            if bool(before.note) != bool(after.note):
                states = (_file(before), _file(after))
                listed.append(Change(name, MODEL, "plain", old, new, states, narrowed=False))
            else:
                listed += _moved(before, after)
    return listed


def _file(cell: Cell) -> str:
    return "does not know the model" if cell.note else "knows the model"


def _moved(before: Cell, after: Cell) -> list[Change]:
    listed = []
    loading: set[str] = set()
    asked = [
        (question, configuration)
        for question in QUESTIONS
        for configuration in dict.fromkeys(
            answer.configuration for cell in (before, after) for answer in cell.of(question)
        )
    ]
    for question, configuration in asked:
        if question == LOGITS and configuration in loading:
            continue
        states = (state(before, question, configuration), state(after, question, configuration))
        if not all(states) or states[0] == states[1]:
            continue
        if question == LOADS:
            loading.add(configuration)
        reasons = (
            _reason(before, question, configuration),
            _reason(after, question, configuration),
        )
        listed.append(
            Change(before.architecture, question, configuration, before.release, after.release,
                   states, reasons, narrowed=False)
        )  # fmt: skip
    return listed


def _reason(cell: Cell, question: str, configuration: str) -> str:
    found = _answer(cell, question, configuration)
    return found.reason if found else cell.note


def narrow(
    change: Change, columns: Columns, sweep: Sweep, architecture: Architecture,
    notice: Callable[[str], None] = lambda _: None,
) -> list[Change]:  # fmt: skip
    """The releases in which a state changed, by halving what lies between two columns.

    What holds in the release that is found may be a third state: then what is left is narrowed as well.
    Where a state comes and goes, one place of it is found.
    """
    if columns.any is None:
        return [change]
    make = columns.any

    def ask(release: str) -> tuple[str, str]:
        column = sweep.column(make(release))
        notice(f"{change.architecture}: {release}")
        if not isinstance(column, Column):
            return "", ""
        return _state_in(change, sweep.cell(architecture, column))

    return halved(change, list(columns.between.get(change.since, ())), ask)


def halved(
    change: Change, between: list[str], ask: Callable[[str], tuple[str, str]]
) -> list[Change]:
    """The moves of a state on the way from one column to the next.

    Args:
        change: What changed between the columns.
        between: The releases between them, in their order.
        ask: State and reason in one of these; the state is empty where it cannot be told.
    """
    low, high, unknown = -1, len(between), list[str]()
    ends = {low: (change.states[0], change.reasons[0]), high: (change.states[1], change.reasons[1])}
    while high - low > 1:
        order = sorted(range(low + 1, high), key=lambda i: abs(2 * i - low - high))
        middle = next((i for i in order if between[i] not in unknown), None)
        if middle is None:
            break
        ends[middle] = ask(between[middle])
        if not ends[middle][0]:
            unknown.append(between[middle])
        elif ends[middle][0] == change.states[0]:
            low = middle
        else:
            high = middle
    inside = between[low + 1 : high]
    found = replace(
        change,
        before=between[low] if low >= 0 else change.before,
        since=between[high] if high < len(between) else change.since,
        states=(ends[low][0], ends[high][0]),
        reasons=(ends[low][1], ends[high][1]),
        unknown=[name for name in unknown if name in inside],
        narrowed=True,
    )
    if found.states[1] == change.states[1]:
        return [found]
    states, reasons = zip(ends[high], ends[len(between)], strict=True)
    rest = replace(change, before=found.since, states=states, reasons=reasons)
    return [found, *halved(rest, between[high + 1 :], ask)]


def _state_in(change: Change, cell: Cell) -> tuple[str, str]:
    if change.question == MODEL:
        return _file(cell), cell.note
    return (
        state(cell, change.question, change.configuration),
        _reason(cell, change.question, change.configuration),
    )
