"""The page of a bisection: the answer, the path of the search as a picture, the evidence."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING

from parity.bisect.answer import verdict_lines
from parity.report.html import templates
from parity.report.labels import SYMBOLS, number

if TYPE_CHECKING:
    from parity.bisect.minimize import Question
    from parity.bisect.place import Mark, Place
    from parity.bisect.result import SearchReport, StageVisit
    from parity.bisect.versions import Change

TEMPLATE = "search.html.j2"
STATES = {
    "found": "diverge",
    "agree": "agree",
    "agree in part": "inconclusive",
    "not compared": "inconclusive",
    "inconclusive": "inconclusive",
}
STATUSES = {"confirmed": "diverge", "refuted": "skip"}
ANSWERS = {"diverges": "diverge", "agrees": "agree", "unknown": "inconclusive"}
NOT_CHECKED = "unchecked"
OUTCOMES = {"like the low end": "agree", "like the high end": "diverge", "gap": "skip"}
MARKS = {**SYMBOLS, "agree": "✓", NOT_CHECKED: "·"}


@dataclass(frozen=True)
class Strip:
    """A factor search as a matrix: a row a factor, a column a run."""

    questions: Sequence[Question]
    rows: list[tuple[str, list[bool], bool]]
    """Factor, whether each run took it from the subject, whether it is part of a cause."""


@dataclass(frozen=True)
class Grid:
    """The modules that a search compared: a row a kind of module, a column a layer."""

    layers: list[int]
    rows: list[tuple[str, list[Mark | None]]]
    others: list[Mark]
    """Modules outside the layers."""


@dataclass(frozen=True)
class Version:
    """A release or commit on the axis: its outcome and the reason for it."""

    name: str
    state: str
    reason: str
    order: list[int]
    """At which steps it was checked, from 1."""
    first_bad: bool
    """Whether it is the first with the change."""
    count: int = 1
    """How many neighbours that were not checked this entry stands for."""


def render(report: SearchReport) -> str:
    """The page of a search over factors and places."""
    causes: dict[str, set[str]] = {}
    for cause in report.causes:
        causes.setdefault(cause.stage, set()).update([*cause.factors, *cause.named_parts()])
    return _page(
        title=f"{report.subject} against {report.reference}",
        verdict=report.verdict,
        report=report,
        strips={
            id(visit): strip(visit, causes.get(visit.stage, set()))
            for visit in report.path
            if visit.questions
        },
        grids={id(v.place): grid(v.place) for v in report.path if v.place and v.place.walk},
        changes=[],
    )


def render_versions(changes: Sequence[Change], title: str, command: str) -> str:
    """The page of a search over releases or commits."""
    unclear = any(change.found.inconclusive for change in changes)
    return _page(
        title=title,
        verdict="inconclusive" if unclear else "found",
        report=None,
        strips={},
        grids={},
        changes=[(change, axis(change)) for change in changes],
        command=command,
    )


def strip(visit: StageVisit, causes: set[str]) -> Strip:
    """The factors ordered so that those checked together stand together."""
    changed = [set(question.changes) for question in visit.questions]
    took = {name: [name in names for names in changed] for name in visit.factors}
    order = sorted(visit.factors, key=lambda name: took[name], reverse=True)
    return Strip(visit.questions, [(name, took[name], name in causes) for name in order])


def grid(place: Place) -> Grid:
    """The compared modules laid out by layer, kinds in the order of calls."""
    walk = place.walk[::-1] if place.kind == "backward" else place.walk
    layers: dict[int, dict[str, Mark]] = {}
    others = []
    for mark in walk:
        match = re.match(r"layers\.(\d+)(?:\.(.+))?$", mark.name)
        if match is None:
            others.append(mark)
            continue
        kind = match[2] or "the layer itself"
        layers.setdefault(int(match[1]), {})[kind] = mark
    columns = sorted(layers)
    # In the order of calls of the layer with most modules: the first layer may lack some.
    fullest = sorted(layers.values(), key=len, reverse=True)
    kinds = dict.fromkeys(kind for layer in fullest for kind in layer)
    rows = [(kind, [layers[layer].get(kind) for layer in columns]) for kind in kinds]
    return Grid(columns, rows, others)


def axis(change: Change) -> list[Version]:
    """Every candidate in its order, checked or not."""
    found = change.found
    checks: dict[str, list[tuple[int, str, str]]] = {}
    for step, (name, outcome, reason) in enumerate(found.finished, 1):
        checks.setdefault(name, []).append((step, outcome, reason))
    versions = []
    for name in found.candidates:
        own = checks.get(name, [])
        states = {OUTCOMES.get(outcome, "error") for _, outcome, _ in own}
        state = states.pop() if len(states) == 1 else "inconclusive" if states else NOT_CHECKED
        reason = own[-1][2] if own else "not checked"
        order = [step for step, _, _ in own]
        versions.append(Version(name, state, reason, order, name == found.first_bad))
    return versions


def together(versions: Sequence[Version]) -> list[Version]:
    """The same with neighbours that were not checked as one entry."""
    short: list[Version] = []
    for unchecked, run in groupby(versions, key=lambda version: version.state == NOT_CHECKED):
        group = list(run)
        if unchecked and len(group) > 1:
            name = f"{group[0].name} … {group[-1].name}"
            short.append(
                replace(group[0], name=name, reason=f"{len(group)} not checked", count=len(group))
            )
        else:
            short += group
    return short


def _page(**values: object) -> str:
    environment = templates()
    environment.filters |= {"number": number, "key": id, "together": together}
    environment.globals |= {
        "states": STATES,
        "statuses": STATUSES,
        "answers": ANSWERS,
        "marks": MARKS,
        "verdict_lines": verdict_lines,
    }
    return str(environment.get_template(TEMPLATE).render(**{"command": "", **values}))
