"""The search for a cause, over real cells: stage first, then factors, then a place inside."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from parity.bisect.ahead import ahead
from parity.bisect.answer import made_by_factors, made_by_parts
from parity.bisect.cheaper import STEPS, WHOLE, Asked, Oracle, cheapest, minimal
from parity.bisect.likelihood import likelihood, of_parts
from parity.bisect.locate import locate
from parity.bisect.minimize import Answer, CouldNotAsk, Search, Watch
from parity.bisect.packing import KEY as PACKING
from parity.bisect.repeats import repeats
from parity.bisect.result import (
    AGREE,
    FOUND,
    IN_PART,
    INCONCLUSIVE,
    NOT_COMPARED,
    PART,
    Cause,
    SearchReport,
    StageVisit,
)
from parity.bisect.silent import silent
from parity.capture.engine import Engine
from parity.cells.cell import Cell, reproduce
from parity.cells.run import REFEREE, run_cell
from parity.judge.hints import hints, rope
from parity.paths import parts as names_of_parts
from parity.paths.demands import unmet
from parity.paths.registry import exchange_parts, lends, resolve, takes_parts
from parity.recipe import DEFAULT, Recipe
from parity.record import Record, Verdict
from parity.stages import STAGES
from parity.stages.context import Stage
from parity.stages.pair import Extent

Names = Collection[str]
Settings = dict[str, str]
"""Key of the effective configuration to what differs there, in words."""


class CauseSearch:
    """One search between a subject's recipe and a reference's.

    Args:
        engine: Runs cells; its cache makes a question asked twice cost nothing.
        subject: Path under question.
        reference: Path it is held against.
        recipe: The reference's recipe.
        changes: Factors in which the subject's recipe differs from it.
        watch: Called with each question.
        repeats: How often each question is put.
        origin: Name of the recipe, for command lines.
        stages: What is visited, in this order.
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
        self.steady = True
        """Whether the subject repeats itself, as far as is known."""
        self.packed_alike = False
        """Whether both sides pack the same modules, as far as is known."""
        self.notice, self.held = notice, dict(held or {})
        self._recipes: set[str] = set()
        self._own, self._theirs = names_of_parts.sources(subject), names_of_parts.sources(reference)
        self._mixed = subject != reference and exchange_parts(subject, reference)
        self.rest = tuple(self.changes)
        """Factors that are not yet known to be a cause."""
        self._can = {p for p in self._own if self._mixed and self._swapped(p)}
        """Parts, the loop among them, that can be the subject's or the reference's."""
        self.parts = {p for p in self._can if self._own[p] != self._theirs[p]}
        """Parts that are still the subject's own where they could be the reference's."""

    def cell(self, stage: Stage, names: Names, parts: Names | None = None, steps: int = 0) -> Cell:
        """The cell in which the subject differs in just these factors, with these parts its own.

        Where a part cannot carry out the reference's value of a factor, the factor can only be taken
        from the reference together with the part. `steps` other than 0 are trained, not the recipe's.
        """
        subset = {name: value for name, value in self.changes.items() if name in names}
        refused = unmet(resolve(self.subject), self.recipe.override(subset))
        kept = (self.parts if parts is None else set(parts)) - {
            names_of_parts.part_of(name)
            for name in self.changes
            if name in refused and name not in names
        }
        mixed = {p: (self._own if p in kept else self._theirs)[p] for p in self._own}
        # What cannot be swapped goes with the loop, and so does what nothing is compared of.
        idle = names_of_parts.idle(stage.name)
        side = self._own if names_of_parts.LOOP in kept else self._theirs
        mixed |= {p: side[p] for p in self._own if p in idle or p not in self._can}
        subject = names_of_parts.spec(mixed) if self._mixed else self.subject
        sides = {"subject": subset, "reference": self.held}
        changes = {side: changed for side, changed in sides.items() if changed}
        shared = self.recipe.override({STEPS: steps}) if steps else self.recipe
        return Cell(stage, subject, self.reference, shared, changes, self.origin)

    def _swapped(self, part: str) -> bool:
        """Whether a part of either side can stand in the other's loop."""
        if part == names_of_parts.LOOP:
            return True
        donors = [self._own[part], self._theirs[part]]
        takers = [self._own[names_of_parts.LOOP], self._theirs[names_of_parts.LOOP]]
        framework = resolve(self.subject).framework
        return all(lends(path, part, framework) for path in donors) and all(
            part in takes_parts(path) for path in takers
        )

    def record(
        self,
        stage: Stage,
        names: Names,
        parts: Names | None = None,
        asked: Asked = WHOLE,
    ) -> Record:
        """Runs that cell."""
        cell = self.cell(stage, names, parts, asked.steps)
        changed = cell.recipe.override(cell.changes.get("subject", {})).digest()
        self._recipes.add(f"{cell.subject} {changed}")
        return run_cell(self.engine, cell, repeat=not self.steady, extent=asked.extent)

    def search(self) -> SearchReport:
        """Runs the whole search."""
        started = time.perf_counter()
        report = SearchReport(self.subject, self.reference, differing=len(self.changes))
        mine = self.recipe.override(self.changes)
        if not self.rest:  # then it is a part, and its place is told with the float64 run
            self.engine.warm(REFEREE)
        with ahead(self.engine, [self.cell(stage, self.rest) for stage in self.stages]):
            self.steady, report.repeats = repeats(self.engine, self.subject, mine)
            for text in report.repeats:
                self.notice(text)
            config = self._visit(self.stages[0], report)
            report.settings = list(_settings(config).values())
            packing = [metric.verdict.green for metric in config.metrics if metric.name == PACKING]
            self.packed_alike = packing == [True]
            if not config.metrics:
                report.skipped.append(f"{config.stage}: {config.reason}")
            self._stages(report)
            if report.verdict == AGREE:
                self._conclude(report)
        report.runs, report.seconds = len(self._recipes), time.perf_counter() - started
        return report

    def _stages(self, report: SearchReport) -> None:
        """Visits the stages in their order, and explains each that diverges."""
        for stage in self.stages[1:]:
            if self._same(self.cell(stage, self.rest)):
                if all(self._same(self.cell(other, self.rest)) for other in self.stages[1:]):
                    report.reason = "no factor and no part is left that differs"
                    return
                continue  # only what an adapter goes through afterwards differs
            record = self._visit(stage, report)
            if record.verdict is Verdict.DIVERGE and self.steady:
                record = self._again(stage, report, record)
            title = f"probe {stage.number:02d} {stage.name}"
            self.notice(f"{title}: {record.verdict}")
            if record.verdict is Verdict.DIVERGE:
                report.compared.append(stage.name)
                if not self._explain(stage, report, record):
                    return
            elif record.verdict in (Verdict.ERROR, Verdict.INCONCLUSIVE):
                report.verdict = INCONCLUSIVE
                report.reason = f"{title}: {record.reason}"
                return
            elif record.verdict is Verdict.SKIP:
                report.skipped.append(f"{stage.name}: {record.reason}")
            else:
                report.compared.append(stage.name)

    def _again(self, stage: Stage, report: SearchReport, record: Record) -> Record:
        """A divergence that the subject shows once more; what does not repeat itself is none."""
        cell = self.cell(stage, self.rest)
        again = run_cell(self.engine, cell, repeat=True, extent=Extent.VERDICT)
        if again.verdict is not record.verdict:
            report.path[-1].verdict, report.path[-1].reason = str(again.verdict), again.reason
        return again

    def _conclude(self, report: SearchReport) -> None:
        """The verdict of a search that nothing ended before its last stage."""
        report.left = list(self._differing(self.rest, self.parts).values())
        if self.steady:
            mine = self.recipe.override(self.changes)
            report.silent = silent(self.engine, self.subject, mine, self.recipe, self.rest)
        if report.causes:
            report.verdict, report.aligned = FOUND, self._aligned()
        elif not report.compared:
            report.verdict = NOT_COMPARED
            report.reason = report.reason or "every stage was skipped"
        elif report.skipped:
            report.verdict = IN_PART
        else:
            report.reason = report.reason or "no probe diverges at any stage"

    def _differing(self, names: Names, parts: Names) -> Settings:
        """What the effective configuration says differs with these of the subject's own."""
        if self._same(self.cell(self.stages[0], names, parts)):
            return {}
        return _settings(self.record(self.stages[0], names, parts))

    def _aligned(self) -> str:
        """Whether training is step for step the same once every cause is taken from the reference."""
        curve = next((stage for stage in self.stages if stage.name == "loss_curve"), None)
        if curve is None or self._same(self.cell(curve, self.rest)):
            return ""
        record = self.record(curve, self.rest)
        return f"loss and gradient norm step for step: {record.verdict} ({record.reason})"

    def _visit(self, stage: Stage, report: SearchReport) -> Record:
        started = time.perf_counter()
        record = self.record(stage, self.rest, asked=Asked(extent=Extent.DIFFERENCE))
        if record.verdict is Verdict.DIVERGE:
            record = self.record(stage, self.rest)
        seconds = time.perf_counter() - started
        visit = StageVisit(stage.number, stage.name, str(record.verdict), record.reason, seconds)
        report.path.append(visit)
        return record

    @staticmethod
    def _same(cell: Cell) -> bool:
        """Whether both sides are one path under one recipe."""
        return cell.subject == cell.reference and not cell.changes

    def _ask(
        self, stage: Stage, names: Names, parts: Names | None = None, asked: Asked = WHOLE
    ) -> Answer:
        """Whether the cell diverges.

        Raises:
            CouldNotAsk: It was not compared, which is no evidence.
        """
        if self._same(self.cell(stage, names, parts)):
            return Answer.AGREES
        record = self.record(stage, names, parts, asked)
        if record.verdict is Verdict.DIVERGE:
            return Answer.DIVERGES
        if record.verdict.green:
            return Answer.AGREES
        raise CouldNotAsk(f"{record.verdict}: {record.reason}")

    def _known(self, stage: Stage, names: Names, parts: Names | None = None) -> Answer:
        """The same, `UNKNOWN` where it could not be asked."""
        try:
            return self._ask(stage, names, parts)
        except CouldNotAsk:
            return Answer.UNKNOWN

    def _explain(self, stage: Stage, report: SearchReport, record: Record) -> bool:
        """Adds the causes of a divergence at one stage; returns whether nothing of it is left."""
        cheap = cheapest(record, self.recipe, {*self.changes, *self.held})
        if self._known(stage, ()) is Answer.DIVERGES:
            self.engine.warm(REFEREE)  # the place is told with the float64 run
            why_not = self._parts(stage, report, cheap)
            if why_not is not None:
                # No factor and no part explains it: the place inside the stage is named.
                self._found(report, self._place(stage, report, unproven=why_not))
                report.verdict, report.reason = FOUND, ""
                return False
        if self._known(stage, self.rest) is Answer.AGREES:
            return True
        weights = likelihood(stage.name, self.rest)
        found = self._minimal(
            report,
            self.rest,
            lambda names, asked: self._ask(stage, names, asked=asked),
            cheap,
            weights,
        )
        if found.verdict != FOUND:
            report.verdict, report.reason = INCONCLUSIVE, found.reason
            return False
        for names in found.causes:
            self._found(report, self._factors(stage, names, found.unproven.get(names, ())))
        causes = {name for names in found.causes for name in names}
        self.rest = tuple(name for name in self.rest if name not in causes)
        return bool(causes)

    def _found(self, report: SearchReport, cause: Cause) -> None:
        """Keeps a cause, and tells it at once: to look for others takes as long again."""
        report.causes.append(cause)
        self.notice(f"found: {cause.sentence}")

    def _minimal(
        self,
        report: SearchReport,
        names: Sequence[str],
        oracle: Oracle,
        cheap: Asked,
        weights: Mapping[str, float] | None = None,
    ) -> Search:
        """Minimal sets of names, with all that was asked kept in the report."""
        found = minimal(names, oracle, cheap, self.recipe, weights, self.repeats, self.watch)
        report.ledger += found.ledger
        report.path[-1].factors, report.path[-1].questions = tuple(names), found.questions
        return found

    def _parts(self, stage: Stage, report: SearchReport, cheap: Asked) -> list[str] | None:
        """Finds the parts that differ under equal recipes, and takes the reference's from there on.

        Returns:
            None where parts were found; else why no part is named, in words.
        """
        idle = names_of_parts.idle(stage.name)
        suspects = [part for part in self._own if part in self.parts - idle]
        if not suspects:
            return []
        found = self._minimal(
            report,
            [PART + part for part in suspects],
            lambda names, asked: self._ask(
                stage, (), {name.removeprefix(PART) for name in names}, asked
            ),
            cheap,
            {PART + part: weight for part, weight in of_parts(stage.name, suspects).items()},
        )
        if found.verdict != FOUND:
            return [f"which part it is could not be found: {found.reason}"]
        for names in found.causes:
            parts = tuple(name.removeprefix(PART) for name in names)
            self._found(report, self._place(stage, report, parts, found.unproven.get(names, ())))
            self.parts -= set(parts)
        if not self._same(self.cell(stage, self.rest)):
            self._visit(stage, report)
        return None

    def _place(
        self,
        stage: Stage,
        report: SearchReport,
        parts: tuple[str, ...] = (),
        unproven: Sequence[str] = (),
    ) -> Cause:
        """The place inside a stage that diverges under equal recipes, in the parts named."""
        cell = self.cell(stage, (), parts or None)
        record = self.record(stage, (), parts or None, Asked(extent=Extent.SIDE))
        report.path[-1].place = found = locate(self.engine, cell, record, self.packed_alike)
        place = found.sentence
        what = made_by_parts(parts, stage, self._own, self._can)
        words = [f"{what}: {place or record.reason}"]
        if parts:
            words.append(f"with that of {self.reference} it agrees")
            # Only what is gone together with the part belongs to it.
            gone = self._differing(self.rest, self.parts - set(parts)).keys()
            mine = self._differing(self.rest, self.parts).items()
            if settings := [text for key, text in mine if key not in gone]:
                words.append(f"with it these settings come and go: {'; '.join(settings)}")
        elif settings := [
            text for text in self._differing((), self.parts).values() if text not in place
        ]:
            listed = "; ".join(settings)
            words.append(
                f"settings differ as well, whether they belong to it was not tested: {listed}"
            )
        sentence = "; ".join([*words, *unproven])
        # With the place named, other settings of the model have been computed as well.
        if not found.name:
            record = self.record(stage, (), parts or None, Asked(extent=Extent.RECORD))
        drawn = hints(record, (rope,) if found.name else ())
        return Cause(stage.name, {}, sentence, parts, place, drawn, reproduce(cell))

    def _factors(self, stage: Stage, names: tuple[str, ...], unproven: Sequence[str]) -> Cause:
        record = self.record(stage, names, asked=Asked(extent=Extent.HINTS))
        theirs = self.recipe.factors()
        mine = self.recipe.override({n: self.changes[n] for n in names}).factors()
        # `lora.alpha` is another spelling of `lora.scale`
        values = {n: (mine.get(n, self.changes[n]), theirs.get(n)) for n in names}
        sentence = made_by_factors(values, stage, record.reason, unproven)
        shown = reproduce(self.cell(stage, names))
        return Cause(stage.name, values, sentence, hints=list(record.hints), reproduce=shown)


def _settings(config: Record) -> Settings:
    """What differs in the effective configuration, by its key; not what differs by nature."""
    bad = (m for m in config.metrics if m.gate and m.verdict is Verdict.DIVERGE and m.note)
    return {metric.name: metric.note for metric in bad}
