"""Runs a scenario and compares its outcome with the expected one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from parity.bisect.answer import answer
from parity.bisect.causes import CauseSearch
from parity.bisect.result import SearchReport
from parity.bisect.versions import VersionSearch
from parity.capture.checks import check as find_wrong_use
from parity.capture.engine import Engine
from parity.capture.environments import parse_range
from parity.cells.cell import Cell
from parity.cells.run import run_cell
from parity.errors import CaptureError, Unsupported, UsageError
from parity.record import Verdict
from parity.replay.scenario import Scenario, passing
from parity.stages import STAGES, find

Notice = Callable[[str], None]


class ScenarioStatus(StrEnum):
    """The outcome of a scenario against the expectation."""

    AS_EXPECTED = "as expected"
    OTHERWISE = "not as expected"
    NOT_RUN = "not run"


@dataclass(frozen=True)
class ScenarioResult:
    """The outcome of a scenario.

    Attributes:
        expected: The expectation as text.
        found: The outcome, in a text of the same form.
        answer: The whole answers of the searches.
        points: Combinations of seed and sweep that were searched.
        runs: Distinct runs of the subject.
    """

    name: str
    title: str
    source: str
    status: ScenarioStatus
    expected: str
    found: str
    answer: str = ""
    points: int = 0
    runs: int = 0
    seconds: float = 0.0


def play(scenario: Scenario, engine: Engine, notice: Notice = lambda _: None) -> ScenarioResult:
    """Runs one scenario."""
    started = time.perf_counter()
    answers: list[str] = []
    runs = points = 0
    found = ""
    try:
        find_wrong_use([scenario.subject, scenario.reference], next(scenario.recipes()))
        if why := _missing(scenario, engine):
            raise Unsupported(why)
        search = _search_versions if scenario.package else _search_causes
        for outcome in search(scenario, engine, notice):
            points, runs = points + 1, runs + outcome.runs
            answers.append(outcome.answer)
            found = outcome.found
            if found != scenario.expect.searched():
                break
        if scenario.expect.gates and found == scenario.expect.searched():
            shares, answer = _gates(scenario, engine)
            found += passing(shares)
            answers.append(answer)
        fits = found == scenario.expect.text()
        status = ScenarioStatus.AS_EXPECTED if fits else ScenarioStatus.OTHERWISE
    except (Unsupported, CaptureError, UsageError) as error:
        status, found = ScenarioStatus.NOT_RUN, str(error)
    return ScenarioResult(
        scenario.name,
        scenario.title,
        scenario.source,
        status,
        scenario.expect.text(),
        found,
        "\n".join(dict.fromkeys(answers)),
        points,
        runs,
        time.perf_counter() - started,
    )


def _missing(scenario: Scenario, engine: Engine) -> str:
    """Why a path cannot be run here at all; empty if it can."""
    if scenario.package:
        return ""  # each release gets an environment of its own
    for path in (scenario.subject, scenario.reference):
        try:
            engine.shipped(path, next(scenario.recipes()))
        except Unsupported as error:
            return str(error)
    return ""


class SearchOutcome(NamedTuple):
    """One search: what it found in the form of `Expect`, its whole answer, and the runs it took."""

    found: str
    answer: str
    runs: int


def _search_causes(scenario: Scenario, engine: Engine, notice: Notice) -> Iterator[SearchOutcome]:
    stages = scenario.stages()
    for recipe in scenario.recipes():
        report = CauseSearch(
            engine,
            scenario.subject,
            scenario.reference,
            recipe,
            scenario.set_subject,
            origin=scenario.recipe,
            # The first stage is never judged: it is where the effective settings are read.
            stages=(STAGES[0], *stages) if stages else STAGES,
            notice=notice,
            held=scenario.set_reference,
        ).search()
        yield SearchOutcome(_found(report), answer(report), report.runs)


def _found(report: SearchReport) -> str:
    if report.verdict == "agree":
        return "no cause"
    if report.verdict != "found":
        reasons = [report.reason, *(f"not compared: {text}" for text in report.skipped)]
        return f"{report.verdict}: {'; '.join(filter(None, reasons))}"
    return ", ".join(
        f"{cause.stage}: {' with '.join([*cause.factors, *cause.parts]) or cause.place}"
        for cause in report.causes
    )


def _search_versions(scenario: Scenario, engine: Engine, notice: Notice) -> Iterator[SearchOutcome]:
    def progress(candidate: str, answer: object, left: int) -> None:
        notice(f"{candidate}, about {left} left")

    for recipe in scenario.recipes():
        for probe in scenario.probes:
            changes = {"subject": scenario.set_subject, "reference": scenario.set_reference}
            cell = Cell(
                find(probe),
                scenario.subject,
                scenario.reference,
                recipe,
                {side: values for side, values in changes.items() if values},
                scenario.recipe,
            )
            search = VersionSearch(engine, cell, scenario.side, progress=progress)
            for change in search.each(*map(parse_range, scenario.package.split(","))):
                where = change.found.first_bad
                sentence = change.sentence()
                found = sentence if change.found.inconclusive else f"moved in {where}"
                yield SearchOutcome(found, sentence, change.runs)


def _gates(scenario: Scenario, engine: Engine) -> tuple[dict[str, str], str]:
    """`all`, `some` or `none` for each expected gate over seeds and sides; and all counts as text."""
    passes: dict[str, list[bool]] = {}
    for recipe in scenario.recipes():
        cell = Cell(find("08"), scenario.subject, scenario.reference, recipe)
        record = run_cell(engine, cell)
        if record.verdict in (Verdict.ERROR, Verdict.SKIP):
            raise CaptureError(record.reason)
        for side in ("subject", "reference"):
            for gate, passed in record.passes[side].items():
                passes.setdefault(gate, []).append(passed)
    counts = ", ".join(f"{gate}: {sum(v)} of {len(v)}" for gate, v in passes.items())
    shares = {gate: _share(passes[gate]) for gate in scenario.expect.gates}
    return shares, f"passes, subject and reference together: {counts}"


def _share(values: list[bool]) -> str:
    return "all" if all(values) else "some" if any(values) else "none"
