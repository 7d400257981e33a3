"""The search for a cause, asked of real cells: stage first, then factors, then a place inside."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from parity.bisect.locate import locate
from parity.bisect.minimize import Answer, Hypothesis, Question, Watch, minimize
from parity.bisect.place import Place
from parity.capture.engine import Engine
from parity.cells.cell import Cell, reproduce
from parity.cells.run import run_cell
from parity.paths import parts as names_of_parts
from parity.paths.demands import unmet
from parity.paths.registry import resolve, swappable
from parity.recipe import DEFAULT, Recipe
from parity.record import Record, Verdict
from parity.stages import STAGES
from parity.stages.context import Stage

# Which factors are likely at which stage. This orders the search; it decides nothing.
LIKELY: dict[str, tuple[str, ...]] = {
    "tokenization": ("data.", "mask.prompt", "model.source"),
    "supervised_positions": ("mask.", "data."),
    "logits": ("model.",),
    "cross_entropy": ("mask.", "model.dtype"),
    "lora_init": ("lora.", "seed.value", "seed.placement"),
    "gradient": ("lora.", "mask.", "model."),
    "optimizer_step": ("optim.",),
    "loss_curve": ("train.", "data.", "seed.data"),
    "kv_cache": ("model.",),
    "greedy_decode": ("decode.",),
}
LIKELIER = 16.0
PART = "part "
"""What the name of a part begins with among the names that are searched."""

Names = Collection[str]


@dataclass
class Cause:
    """A minimal set of factors, or a place, that makes subject and reference differ."""

    stage: str
    factors: dict[str, tuple[Any, Any]]
    """Factor to (subject's value, reference's value); empty where the code differs."""
    sentence: str
    parts: tuple[str, ...] = ()
    """Parts of the subject that differ by themselves."""
    place: str = ""
    hints: list[str] = field(default_factory=list)
    reproduce: str = ""

    def named_parts(self) -> list[str]:
        """The parts as the search names them among factors."""
        return [PART + part for part in self.parts]


@dataclass
class StageVisit:
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
class SearchReport:
    """What a bisection found."""

    subject: str
    reference: str
    verdict: str = "agree"
    """`found`, `agree` or `inconclusive`."""
    reason: str = ""
    causes: list[Cause] = field(default_factory=list)
    aligned: str = ""
    """What training is like once every cause is taken from the reference."""
    skipped: list[str] = field(default_factory=list)
    """Stages that were not compared, and why."""
    settings: list[str] = field(default_factory=list)
    """What the effective configuration says differs, in words."""
    ledger: list[Hypothesis] = field(default_factory=list)
    path: list[StageVisit] = field(default_factory=list)
    """Stages in the order in which they were asked."""
    differing: int = 0
    runs: int = 0
    """Distinct recipes that the subject was run under."""
    seconds: float = 0.0

    def answer(self) -> str:
        """The sentence a maintainer acts on, with what shows it."""
        if self.verdict == "agree":
            agree = f"{self.subject} and {self.reference} agree: {self.reason}"
            return "\n".join([agree, *(f"  not compared: {text}" for text in self.skipped)])
        lines = []
        for cause in self.causes:
            lines += [cause.sentence, *(f"  hint: {hint}" for hint in cause.hints)]
            lines.append(f"  shown by: {cause.reproduce}")
        if self.verdict == "inconclusive":
            lines.append(f"inconclusive: {self.reason}")
        if self.aligned:
            lines.append(f"with all of these from the reference, {self.aligned}")
        lines += [f"not compared: {text}" for text in self.skipped]
        return "\n".join(lines)


class CauseSearch:
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
        stages: What is asked, in this order.
        notice: Told of each stage.
        held: Factors in which the reference always differs from `recipe`.
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
        held: Mapping[str, Any] | None = None,
    ) -> None:
        self.engine, self.subject, self.reference = engine, subject, reference
        self.recipe, self.changes, self.origin = recipe, dict(changes), origin
        self.watch, self.repeats, self.stages = watch, repeats, stages
        self.notice, self.held = notice, dict(held or {})
        self._recipes: set[str] = set()
        self._own, self._theirs = names_of_parts.sources(subject), names_of_parts.sources(reference)
        self._mixed = subject != reference and all(map(swappable, (subject, reference)))
        self.rest = tuple(self.changes)
        """Factors that are not yet known to be a cause."""
        self.parts = {p for p, path in self._own.items() if self._mixed and path != self._theirs[p]}
        """Parts that are still the subject's own where they could be the reference's."""

    def cell(self, stage: Stage, names: Names, parts: Names | None = None) -> Cell:
        """The cell in which the subject differs in just these factors, with these parts its own.

        Where a part cannot carry out the reference's value of a factor, the factor can only be taken
        from the reference together with the part.
        """
        subset = {name: value for name, value in self.changes.items() if name in names}
        refused = unmet(resolve(self.subject), self.recipe.override(subset))
        kept = (self.parts if parts is None else set(parts)) - {
            names_of_parts.part_of(name)
            for name in self.changes
            if name in refused and name not in names
        }
        mixed = {p: (self._own if p in kept else self._theirs)[p] for p in self._own}
        subject = names_of_parts.spec(mixed) if self._mixed else self.subject
        sides = {"subject": subset, "reference": self.held}
        changes = {side: changed for side, changed in sides.items() if changed}
        return Cell(stage, subject, self.reference, self.recipe, changes, self.origin)

    def record(self, stage: Stage, names: Names, parts: Names | None = None) -> Record:
        """Runs that cell."""
        cell = self.cell(stage, names, parts)
        changed = cell.recipe.override(cell.changes.get("subject", {})).digest()
        self._recipes.add(f"{cell.subject} {changed}")
        return run_cell(self.engine, cell)

    def search(self) -> SearchReport:
        """Runs the whole search."""
        started = time.perf_counter()
        report = SearchReport(self.subject, self.reference, differing=len(self.changes))
        config = self._visit(self.stages[0], report)
        report.settings = [
            m.note for m in config.metrics if m.verdict is Verdict.DIVERGE and m.note
        ]
        for stage in self.stages[1:]:
            if self._same(self.cell(stage, self.rest)):
                report.reason = "no factor and no part is left that differs"
                break
            record = self._visit(stage, report)
            self.notice(f"probe {stage.number:02d} {stage.name}: {record.verdict}")
            if record.verdict is Verdict.DIVERGE:
                if not self._explain(stage, report):
                    break
            elif record.verdict in (Verdict.ERROR, Verdict.INCONCLUSIVE):
                report.verdict = "inconclusive"
                report.reason = f"probe {stage.number:02d} {stage.name}: {record.reason}"
                break
            elif record.verdict is Verdict.SKIP:
                report.skipped.append(f"{stage.name}: {record.reason}")
        if report.verdict == "agree":
            if report.causes:
                report.verdict, report.aligned = "found", self._aligned()
            else:
                report.reason = report.reason or "no probe diverges at any stage"
        report.runs, report.seconds = len(self._recipes), time.perf_counter() - started
        return report

    def _aligned(self) -> str:
        """Whether training is step for step the same once every cause is taken from the reference."""
        curve = next((stage for stage in self.stages if stage.name == "loss_curve"), None)
        if curve is None or self._same(self.cell(curve, self.rest)):
            return ""
        record = self.record(curve, self.rest)
        return f"loss and gradient norm step for step: {record.verdict} ({record.reason})"

    def _visit(self, stage: Stage, report: SearchReport) -> Record:
        started = time.perf_counter()
        record = self.record(stage, self.rest)
        seconds = time.perf_counter() - started
        visit = StageVisit(stage.number, stage.name, str(record.verdict), record.reason, seconds)
        report.path.append(visit)
        return record

    @staticmethod
    def _same(cell: Cell) -> bool:
        """Whether both sides are one path under one recipe."""
        return cell.subject == cell.reference and not cell.changes

    def _ask(self, stage: Stage, names: Names, parts: Names | None = None) -> Answer:
        if self._same(self.cell(stage, names, parts)):
            return Answer.AGREES
        verdict = self.record(stage, names, parts).verdict
        if verdict is Verdict.DIVERGE:
            return Answer.DIVERGES
        return Answer.AGREES if verdict.green else Answer.UNKNOWN

    def _explain(self, stage: Stage, report: SearchReport) -> bool:
        """Adds the causes of a divergence at one stage; returns whether nothing of it is left."""
        if self._ask(stage, ()) is Answer.DIVERGES and not self._parts(stage, report):
            # No factor and no part explains it: the place inside the stage is named.
            report.causes.append(self._place(stage, report))
            report.verdict, report.reason = "found", ""
            return False
        if self._ask(stage, self.rest) is Answer.AGREES:
            return True
        likely = LIKELY.get(stage.name, ())
        weights = {name: LIKELIER if name.startswith(likely) else 1.0 for name in self.rest}
        causes = self._minimal(report, self.rest, lambda names: self._ask(stage, names), weights)
        report.causes += [self._factors(stage, names) for names in causes]
        found = {name for names in causes for name in names}
        self.rest = tuple(name for name in self.rest if name not in found)
        return bool(causes)

    def _minimal(
        self,
        report: SearchReport,
        names: Sequence[str],
        oracle: Callable[[frozenset[str]], Answer],
        weights: Mapping[str, float] | None = None,
    ) -> list[tuple[str, ...]]:
        """Minimal sets of names; none where the search was inconclusive, which the report says."""
        search = minimize(names, oracle, weights, self.repeats, self.watch)
        report.ledger += search.ledger
        report.path[-1].factors, report.path[-1].questions = tuple(names), search.questions
        if search.verdict == "found":
            return search.causes
        report.verdict, report.reason = "inconclusive", search.reason
        return []

    def _parts(self, stage: Stage, report: SearchReport) -> bool:
        """Finds the parts that differ under equal recipes, and takes the reference's from there on."""
        if not self.parts:
            return False
        causes = self._minimal(
            report,
            [PART + part for part in self._own if part in self.parts],
            lambda names: self._ask(stage, (), {name.removeprefix(PART) for name in names}),
        )
        for names in causes:
            parts = tuple(name.removeprefix(PART) for name in names)
            report.causes.append(self._place(stage, report, parts))
            self.parts -= set(parts)
        if causes and not self._same(self.cell(stage, self.rest)):
            self._visit(stage, report)
        return bool(causes)

    def _place(self, stage: Stage, report: SearchReport, parts: tuple[str, ...] = ()) -> Cause:
        """The place inside a stage that diverges under equal recipes, in the parts named."""
        cell = self.cell(stage, (), parts or None)
        record = self.record(stage, (), parts or None)
        report.path[-1].place = found = locate(self.engine, cell, record)
        place = found.sentence
        what = f"{stage.name} (probe {stage.number:02d}) diverges under equal recipes"
        if parts:
            whose = " with the ".join(f"{part} of {self._own[part]}" for part in parts)
            what = f"the {whose} makes {what}"
        sentence = f"{what}: {place or record.reason}"
        if parts:
            sentence += f"; with that of {self.reference} it agrees"
        elif report.settings:
            sentence += f"; the effective settings say: {'; '.join(report.settings)}"
        return Cause(stage.name, {}, sentence, parts, place, list(record.hints), reproduce(cell))

    def _factors(self, stage: Stage, names: tuple[str, ...]) -> Cause:
        record = self.record(stage, names)
        theirs = self.recipe.factors()
        mine = self.recipe.override({n: self.changes[n] for n in names}).factors()
        # `lora.alpha` is another spelling of `lora.scale`
        values = {n: (mine.get(n, self.changes[n]), theirs.get(n)) for n in names}
        sentence = (
            f"{against(values)} makes {stage.name} (probe {stage.number:02d}) diverge: {record.reason}; "
            "with the reference's value it agrees"
        )
        hints = list(record.hints)
        shown = reproduce(self.cell(stage, names))
        return Cause(stage.name, values, sentence, hints=hints, reproduce=shown)


def against(values: Mapping[str, tuple[Any, Any]]) -> str:
    """Factors with the subject's and the reference's value, in words."""
    return " together with ".join(f"{n} = {a!r} against {b!r}" for n, (a, b) in values.items())


def shipped(
    engine: Engine, subject: str, reference: str, recipe: Recipe
) -> tuple[Recipe, dict[str, Any]]:
    """The reference's recipe as it is shipped, and what the subject's differs in."""
    theirs = engine.shipped(reference, recipe)
    mine = engine.shipped(subject, recipe)
    return theirs, {name: value for name, (value, _) in mine.difference(theirs).items()}
