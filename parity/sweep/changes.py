"""What changed between two columns: cells whose state moved, and the release in which it did."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

from parity.sweep.answers import ABSENT, Answer, Cell
from parity.sweep.bench import Column
from parity.sweep.columns import Columns
from parity.sweep.models import Architecture
from parity.sweep.questions import LOADS, LOGITS, QUESTIONS
from parity.sweep.run import Found, Sweep


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
        return (
            f"{self.architecture}: {self.question} of {self.configuration!r} {self.states[0]} in {self.before}, "
            f"{self.states[1]} from {self.since} on{between}{gap}"
        )


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
    for name, architecture in sorted(found.architectures.items()):
        configurations = [c.name for c in architecture.found.made]
        for old, new in itertools.pairwise(found.columns):
            before, after = found.cells.get((name, old)), found.cells.get((name, new))
            if before is None or after is None:
                continue
            if bool(before.note) != bool(after.note):
                states = (_file(before), _file(after))
                listed.append(Change(name, "model file", "plain", old, new, states, narrowed=False))
            else:
                listed += _moved(configurations, before, after)
    return listed


def _file(cell: Cell) -> str:
    return "has no file" if cell.note else "has a file"


def _moved(configurations: list[str], before: Cell, after: Cell) -> list[Change]:
    listed = []
    loading: set[str] = set()
    for question, configuration in itertools.product(QUESTIONS, configurations):
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
) -> Change:  # fmt: skip
    """The release in which a state changed, by halving what lies between two columns.

    Only one move is looked for: where a state comes and goes, one place of it is found.
    """
    between = list(columns.between.get(change.since, ()))
    if columns.any is None:
        return change
    low, high, unknown = -1, len(between), list[str]()
    while high - low > 1:
        order = sorted(range(low + 1, high), key=lambda i: abs(2 * i - low - high))
        middle = next((i for i in order if between[i] not in unknown), None)
        if middle is None:
            break
        column = sweep.column(columns.any(between[middle]))
        notice(f"{change.architecture}: {between[middle]}")
        found = _state_in(change, sweep, architecture, column) if isinstance(column, Column) else ""
        if not found:
            unknown.append(between[middle])
        elif found == change.states[0]:
            low = middle
        else:
            high = middle
    change.before = between[low] if low >= 0 else change.before
    change.since = between[high] if high < len(between) else change.since
    inside = between[low + 1 : high]
    change.unknown = [name for name in unknown if name in inside]
    change.narrowed = True
    return change


def _state_in(change: Change, sweep: Sweep, architecture: Architecture, column: Column) -> str:
    cell = sweep.cell(architecture, column)
    if change.question == "model file":
        return _file(cell)
    return state(cell, change.question, change.configuration)
