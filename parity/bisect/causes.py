"""The search for a cause, asked of real cells: stage first, then factors, then a place inside."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from parity.bisect.locate import locate
from parity.bisect.minimize import Answer, Hypothesis, Question, Watch, minimize
from parity.bisect.place import Place
from parity.cell import Cell, reproduce
from parity.engine import Engine
from parity.recipe import DEFAULT, Recipe
from parity.record import Record, Verdict
from parity.stages import STAGES
from parity.stages.base import Stage
from parity.trace import dumps, write_atomically

# Which factors are likely at which stage. This orders the search; it decides nothing.
LIKELY: dict[str, tuple[str, ...]] = {
    "tokenization": ("data.", "mask.prompt", "model.source"),
    "logits": ("model.",),
    "cross_entropy": ("mask.", "model.dtype"),
    "lora_init": ("lora.", "seed.value", "seed.placement"),
    "gradient": ("lora.", "mask.", "model."),
    "optimizer_step": ("optim.",),
    "loss_curve": ("train.", "data.", "seed.data"),
    "greedy_decode": ("decode.",),
}
LIKELIER = 16.0


@dataclass
class Cause:
    """A minimal set of factors, or a place, that makes subject and reference differ."""

    stage: str
    factors: dict[str, tuple[Any, Any]]
    """Factor to (subject's value, reference's value); empty where the code differs."""
    sentence: str
    place: str = ""
    hints: list[str] = field(default_factory=list)
    reproduce: str = ""


@dataclass
class Visit:
    """One stage on the path of a search: its verdict, and what was asked to explain it."""

    probe: int
    stage: str
    verdict: str
    reason: str
    seconds: float = 0.0
    """Of the verdict alone."""
    factors: tuple[str, ...] = ()
    questions: list[Question] = field(default_factory=list)
    place: Place | None = None


@dataclass
class Report:
    """What a bisection found."""

    subject: str
    reference: str
    verdict: str = "agree"
    """`found`, `agree` or `inconclusive`."""
    reason: str = ""
    causes: list[Cause] = field(default_factory=list)
    settings: list[str] = field(default_factory=list)
    """What the effective configuration says differs, in words."""
    ledger: list[Hypothesis] = field(default_factory=list)
    path: list[Visit] = field(default_factory=list)
    """Stages in the order in which they were asked."""
    differing: int = 0
    runs: int = 0
    """Distinct recipes that the subject was run under."""
    seconds: float = 0.0

    def answer(self) -> str:
        """The sentence a maintainer acts on, with what shows it."""
        if self.verdict == "agree":
            return f"{self.subject} and {self.reference} agree: {self.reason}"
        lines = []
        for cause in self.causes:
            lines += [cause.sentence, *(f"  hint: {hint}" for hint in cause.hints)]
            lines.append(f"  shown by: {cause.reproduce}")
        if self.verdict == "inconclusive":
            lines.append(f"inconclusive: {self.reason}")
        return "\n".join(lines)

    def save(self, folder: Path) -> list[Path]:
        """Writes bisect.json, bisect.md and bisect.html."""
        from parity.report.bisect import render

        return save(folder, asdict(self), markdown(self), render(self))


class Bisection:
    """One search between a subject's recipe and a reference's.

    Args:
        engine: Runs cells; its cache makes a question asked twice cost nothing.
        subject: Path under question.
        reference: Path it is held against.
        recipe: The reference's recipe.
        changes: Factors in which the subject's recipe differs from it.
        watch: Told what is being asked.
        repeats: How often each question is asked.
        origin: Name of the recipe, for command lines.
    """

    def __init__(
        self,
        engine: Engine,
        subject: str,
        reference: str,
        recipe: Recipe,
        changes: Mapping[str, Any],
        watch: Watch | None = None,
        repeats: int = 1,
        origin: str = DEFAULT,
        stages: tuple[Stage, ...] = STAGES,
        notice: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.engine, self.subject, self.reference = engine, subject, reference
        self.recipe, self.changes, self.origin = recipe, dict(changes), origin
        self.watch, self.repeats, self.stages = watch, repeats, stages
        self.notice = notice
        self._recipes: set[str] = set()

    def cell(self, stage: Stage, names: frozenset[str] | set[str] | tuple[str, ...]) -> Cell:
        """The cell in which the subject differs in just these factors."""
        subset = {name: value for name, value in self.changes.items() if name in names}
        changes = {"subject": subset} if subset else {}
        return Cell(stage, self.subject, self.reference, self.recipe, changes, self.origin)

    def record(self, stage: Stage, names: frozenset[str] | set[str] | tuple[str, ...]) -> Record:
        """Runs that cell."""
        cell = self.cell(stage, names)
        self._recipes.add(cell.recipe.override(cell.changes.get("subject", {})).digest())
        return self.engine.run(cell)

    def search(self) -> Report:
        """Runs the whole search."""
        started = time.perf_counter()
        report = Report(self.subject, self.reference, differing=len(self.changes))
        config = self._visit(self.stages[0], tuple(self.changes), report)
        report.settings = [
            m.note for m in config.metrics if m.verdict is Verdict.DIVERGE and m.note
        ]
        rest = tuple(self.changes)
        for stage in self.stages[1:]:
            record = self._visit(stage, rest, report)
            self.notice(f"probe {stage.number:02d} {stage.name}: {record.verdict}")
            if record.verdict is Verdict.DIVERGE:
                found = self._explain(stage, rest, report)
                rest = tuple(name for name in rest if name not in found)
                if report.verdict == "inconclusive" or not found:
                    break
            elif record.verdict in (Verdict.ERROR, Verdict.INCONCLUSIVE):
                report.verdict = "inconclusive"
                report.reason = f"probe {stage.number:02d} {stage.name}: {record.reason}"
                break
        else:
            if report.causes:
                report.verdict = "found"
            else:
                report.reason = "no probe diverges at any stage"
        report.runs, report.seconds = len(self._recipes), time.perf_counter() - started
        return report

    def _visit(self, stage: Stage, names: tuple[str, ...], report: Report) -> Record:
        started = time.perf_counter()
        record = self.record(stage, names)
        seconds = time.perf_counter() - started
        visit = Visit(stage.number, stage.name, str(record.verdict), record.reason, seconds)
        report.path.append(visit)
        return record

    def _explain(self, stage: Stage, names: tuple[str, ...], report: Report) -> set[str]:
        """Adds the causes of a divergence at one stage; returns the factors they are made of."""

        def oracle(changes: frozenset[str]) -> Answer:
            if not changes and self.subject == self.reference:
                return Answer.AGREES  # one path under one recipe
            verdict = self.record(stage, changes).verdict
            if verdict is Verdict.DIVERGE:
                return Answer.DIVERGES
            return Answer.AGREES if verdict.green else Answer.UNKNOWN

        likely = LIKELY.get(stage.name, ())
        weights = {name: LIKELIER if name.startswith(likely) else 1.0 for name in names}
        if names and oracle(frozenset()) is not Answer.DIVERGES:
            search = minimize(names, oracle, weights, self.repeats, self.watch)
            report.ledger += search.ledger
            report.path[-1].factors, report.path[-1].questions = names, search.questions
            if search.verdict != "found":
                report.verdict, report.reason = "inconclusive", search.reason
                return set()
            for cause in search.causes:
                report.causes.append(self._factors(stage, cause))
            return {name for cause in search.causes for name in cause}
        # No factor explains it: the code itself differs, and the place inside the stage is named.
        record = self.record(stage, ())
        cell = self.cell(stage, ())
        report.path[-1].place = found = locate(self.engine, cell, record)
        place = found.sentence
        said = "; ".join(report.settings)
        sentence = (
            f"{stage.name} (probe {stage.number:02d}) diverges under equal recipes: "
            f"{place or record.reason}" + (f"; the effective settings say: {said}" if said else "")
        )
        report.causes.append(
            Cause(stage.name, {}, sentence, place, list(record.hints), reproduce(cell))
        )
        report.verdict = "found"
        return set()

    def _factors(self, stage: Stage, names: tuple[str, ...]) -> Cause:
        record = self.record(stage, names)
        theirs = self.recipe.factors()
        mine = self.recipe.override({n: self.changes[n] for n in names}).factors()
        # `lora.alpha` is another spelling of `lora.scale`
        values = {n: (mine.get(n, self.changes[n]), theirs.get(n)) for n in names}
        what = " together with ".join(f"{n} = {a!r} against {b!r}" for n, (a, b) in values.items())
        sentence = (
            f"{what} makes {stage.name} (probe {stage.number:02d}) diverge: {record.reason}; "
            "with the reference's value it agrees"
        )
        hints = list(record.hints)
        return Cause(stage.name, values, sentence, "", hints, reproduce(self.cell(stage, names)))


def save(folder: Path, data: Any, text: str, page: str) -> list[Path]:
    """Writes what a search found as JSON, Markdown and HTML."""
    files = {
        folder / "bisect.json": dumps(data, indent=1),
        folder / "bisect.md": text,
        folder / "bisect.html": page,
    }
    for file, content in files.items():
        write_atomically(file, content.encode())
    return list(files)


def shipped(
    engine: Engine, subject: str, reference: str, recipe: Recipe
) -> tuple[Recipe, dict[str, Any]]:
    """The reference's recipe as it is shipped, and what the subject's differs in."""
    theirs = engine.shipped(reference, recipe)
    mine = engine.shipped(subject, recipe)
    return theirs, {name: value for name, (value, _) in mine.difference(theirs).items()}


def markdown(report: Report) -> str:
    """The report for people."""
    lines = [f"# {report.subject} against {report.reference}: {report.verdict}", ""]
    lines += [report.answer(), ""]
    lines += [
        f"{report.differing} factors differ; {report.runs} recipes of the subject were run in "
        f"{report.seconds:.0f} s.",
        "",
    ]
    if report.settings:
        lines += ["## Effective settings that differ", "", *(f"- {s}" for s in report.settings), ""]
    if report.ledger:
        lines += ["## Ledger", "", "| hypothesis | status | evidence |", "|---|---|---|"]
        for entry in report.ledger:
            evidence = "; ".join(entry.evidence)
            lines.append(f"| {', '.join(entry.changes)} | {entry.status} | {evidence} |")
        lines.append("")
    return "\n".join(lines)
