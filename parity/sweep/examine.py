"""All questions of one architecture on one release, and the cause of each that is red."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from parity.bisect.locate import locate
from parity.sweep.answers import ABSENT, NOT_ASKED, Answer, Cause, Cell
from parity.sweep.bench import Bench, Column
from parity.sweep.explain import Explainer
from parity.sweep.maker import NotMade
from parity.sweep.models import Architecture, Model, Store
from parity.sweep.questions import CACHE, GRADIENT, LOADS, LOGITS, QUESTIONS, TOKENS
from parity.sweep.traps import Configuration, Trap, changed

REST = "traps that agree"
"""The configuration of those traps that are not the cause of a red cell."""


@dataclass
class Examiner:
    """Asks and explains.

    Attributes:
        wanted: Questions that are asked.
        chosen: Configurations that are asked; empty: all.
    """

    architecture: Architecture
    column: Column
    store: Store
    wanted: tuple[str, ...] = QUESTIONS
    chosen: tuple[str, ...] = ()
    explained: dict[str, tuple[list[Cause], dict[str, Any]]] = field(default_factory=dict)

    def examine(self) -> Cell:
        """Every answer; whatever goes wrong in one leaves the others."""
        started = time.perf_counter()
        name = self.architecture.name
        cell = Cell(name, self.column.name)
        file = self.column.sources.file(name)
        if file is None:
            cell.note = "this release has no file for it"
            cell.answers = [Answer(question, "", ABSENT, cell.note) for question in self.wanted]
            return cell
        cell.file = file.name
        bench = Bench(name, self.column, self.store)
        configurations = [
            c
            for c in self.architecture.found.made
            if not self.chosen
            or c.name in {*self.chosen, "plain"}
            or (c.name == "traps" and REST in self.chosen)
        ]
        plain, *others = configurations
        base = self.store.model(name, plain.config)
        first = self._logits(cell, bench, plain, base)
        greens = [(plain, base)] if first.green else []
        if first.red:
            bench = self._plain(bench, base, first)
            if bench.is_patched and bench.ask(LOGITS, plain.name, base)[0].green:
                greens = [(plain, base)]
        if cell.answers[0].verdict == "error" and not bench.is_patched:
            self._unloaded(cell, bench, others)
            others = []
        for configuration in others:
            found = self._other(cell, bench, base, plain, configuration, patched=bool(first.red))
            greens += found
        self._rest(cell, bench, greens, base, plain)
        if self.chosen:
            cell.answers = [a for a in cell.answers if a.configuration in (*self.chosen, REST)]
        cell.answers = [answer for answer in cell.answers if answer.question in self.wanted]
        cell.seconds = time.perf_counter() - started
        return cell

    def _logits(
        self, cell: Cell, bench: Bench, configuration: Configuration, model: Model
    ) -> Answer:
        """Loading and logits, which are one capture."""
        if not cell.versions:
            cell.versions = bench.versions(model)
        first = bench.logits("subject", model)
        if first.missing:
            loads = Answer(LOADS, configuration.name, "error", first.error,
                           reproduce=bench.reproduce(LOADS, configuration.name))  # fmt: skip
            cell.answers.append(loads)
            return loads
        answer, _ = bench.ask(LOGITS, configuration.name, model)
        verdict, reason = "agree", "it loads, and every weight has its place"
        if first.values is None and " in logits: " not in first.error:
            # A process that died or hung did not say whether it had loaded.
            verdict, reason = NOT_ASKED, f"whether it loads could not be told: {first.error}"
        cell.answers.append(
            Answer(LOADS, configuration.name, verdict, reason,
                   reproduce=bench.reproduce(LOADS, configuration.name))
        )  # fmt: skip
        cell.answers.append(answer)
        return answer

    def _unloaded(self, cell: Cell, bench: Bench, others: list[Configuration]) -> None:
        """The others where the plain configuration cannot be made to load: some may be what is missing."""
        error = _same(cell.answers[0].reason)
        for configuration in others:
            try:
                model = self.store.model(
                    self.architecture.name, configuration.config, configuration.ties
                )
            except NotMade as refused:
                cell.answers.append(Answer(LOGITS, configuration.name, NOT_ASKED, str(refused)))
                continue
            answer = self._logits(cell, bench, configuration, model)
            if not answer.red:
                continue
            if _same(answer.reason) == error and not configuration.name.startswith("rope "):
                words = "it fails as the plain configuration does, before the traps could matter"
                answer.causes.append(Cause("follows", "plain", words))
                continue
            cause, _ = Explainer(bench).plain(model, answer, self._attributes(model))
            if _same(answer.reason) == error and not cause.fix:
                cause = Cause("follows", "plain", "it fails as the plain configuration does")
            answer.causes.append(cause)

    def _attributes(self, model: Model) -> Mapping[str, Any]:
        """What transformers has under the names that the file of mlx-lm declares."""
        names = [field.name for field in self.column.sources.fields(self.architecture.name)]
        try:
            return self.store.maker.ask("parsed", config=model.config, names=names)
        except NotMade:
            return {}

    def _plain(self, bench: Bench, model: Model, answer: Answer) -> Bench:
        """Explains the plain configuration; the bench with what takes the cause away, if that was found."""
        explainer = Explainer(bench)
        cause, edits = explainer.plain(model, answer, self._attributes(model))
        answer.causes.append(cause)
        return bench.patched(edits, explainer.other)

    def _other(
        self, cell: Cell, bench: Bench, base: Model, plain: Configuration,
        configuration: Configuration, patched: bool,
    ) -> list[tuple[Configuration, Model]]:  # fmt: skip
        """Asks one configuration and explains it; those near it on which both sides agree."""
        try:
            model = self.store.model(
                self.architecture.name, configuration.config, configuration.ties
            )
        except NotMade as error:
            cell.answers.append(Answer(LOGITS, configuration.name, "not asked", str(error)))
            return []
        bare = Bench(bench.architecture, bench.column, bench.store) if patched else bench
        answer = self._logits(cell, bare, configuration, model)
        if answer.green:
            return [(configuration, model)]
        if not answer.red:
            return []
        if patched:
            plains = next(a for a in cell.answers if a.red and a.configuration == plain.name)
            if not bench.is_patched:
                alike = _same(plains.reason) == _same(answer.reason)
                words = (
                    "it fails as the plain configuration does, before the traps could matter"
                    if alike and answer.verdict == "error"
                    else "the plain configuration differs already, see there; what the traps add could not be told"
                )
                answer.causes.append(Cause("follows", "plain", words))
                return []
            again, _ = bench.ask(LOGITS, configuration.name, model)
            name = ", ".join(filter(None, (cause.name for cause in plains.causes)))
            if again.green:
                words = f"as in the plain configuration: with {bench.patches()} both sides agree here as well"
                answer.causes.append(Cause("follows", name, words))
                return [(configuration, model)]
            words = (
                f"as in the plain configuration, and more: with {bench.patches()} they differ still"
            )
            answer.causes.append(Cause("follows", name, words))
        return self._traps(bench, base, plain, configuration, answer)

    def _traps(
        self, bench: Bench, base: Model, plain: Configuration, configuration: Configuration, answer: Answer
    ) -> list[tuple[Configuration, Model]]:  # fmt: skip
        """Which traps part the two sides by themselves; the others together, if they agree."""
        if not bench.ask(LOGITS, plain.name, base)[0].green:
            answer.causes.append(
                Cause(
                    "follows",
                    "plain",
                    "the plain configuration differs as well, and nothing was found that makes it agree",
                )
            )
            return []
        if configuration.ties:
            words = (
                "with different scores of the experts (the plain configuration) both sides agree, with equal "
                "scores of all experts they do not: which of equally scored experts are taken is not the same"
            )
            answer.causes.append(Cause("module", "the router's choice among ties", words))
            return []
        good: list[Trap] = []
        edits: dict[str, Any] = {}
        rope = configuration.name.startswith("rope ")
        for trap in configuration.traps:
            causes, fixed = self._single(bench, base, plain, trap)
            answer.causes += causes
            edits |= fixed
            if not causes:
                good.append(trap)
        if len(good) == len(configuration.traps):
            self._together(bench, base, plain, configuration, answer)
            return []
        if rope or not good:
            return []
        rest = plain.config
        for trap in good:
            rest = changed(rest, trap.changes)
        try:
            model = self.store.model(self.architecture.name, rest)
        except NotMade:
            return []
        return [(Configuration(REST, rest, good), model)]

    def _single(
        self, bench: Bench, base: Model, plain: Configuration, trap: Trap
    ) -> tuple[list[Cause], dict[str, Any]]:
        """Causes of one trap set alone; none if both sides agree with it."""
        if trap.name not in self.explained:
            self.explained[trap.name] = self._explain(bench, base, plain, trap)
        return self.explained[trap.name]

    def _explain(
        self, bench: Bench, base: Model, plain: Configuration, trap: Trap
    ) -> tuple[list[Cause], dict[str, Any]]:
        try:
            model = self.store.model(self.architecture.name, changed(plain.config, trap.changes))
        except NotMade:
            return [], {}
        alone, _ = bench.ask(LOGITS, "plain", model)
        if not alone.red:
            return [], {}
        cause, edits = Explainer(bench).setting(trap, base, model, alone)
        return [cause], edits

    def _together(
        self,
        bench: Bench,
        base: Model,
        plain: Configuration,
        configuration: Configuration,
        answer: Answer,
    ) -> None:
        """Traps that part the two sides only together: the first one that turns the cell red."""
        config, before = plain.config, "plain"
        model = base
        for trap in configuration.traps:
            config = changed(config, trap.changes)
            try:
                next_model = self.store.model(self.architecture.name, config)
            except NotMade:
                continue
            found, _ = bench.ask(LOGITS, configuration.name, next_model)
            if found.red:
                cause, _ = Explainer(bench).setting(trap, model, next_model, found)
                cause.sentence += f" (only together with {before})"
                answer.causes.append(cause)
                return
            before, model = f"{before}, {trap.name}", next_model
        answer.causes.append(
            Cause(
                "unknown",
                "",
                "no setting alone makes the difference, and none in the order in which they were added",
            )
        )

    def _rest(
        self,
        cell: Cell,
        bench: Bench,
        greens: list[tuple[Configuration, Model]],
        base: Model,
        plain: Configuration,
    ) -> None:
        """Gradient, cache and tokens on the configuration with most traps whose logits agree."""
        best: tuple[Configuration, Model] | None = None
        for configuration, model in sorted(greens, key=lambda found: -len(found[0].traps)):
            if configuration.name == REST:
                answer, _ = bench.ask(LOGITS, REST, model)
                if not answer.green:
                    continue
                cell.answers.append(answer)
            best = (configuration, model)
            break
        for question in (GRADIENT, CACHE, TOKENS):
            if question not in self.wanted:
                continue
            if best is None:
                reason = "no configuration was found on whose logits both sides agree"
                cell.answers.append(Answer(question, plain.name, "not asked", reason))
                continue
            configuration, model = best
            answer, record = bench.ask(question, configuration.name, model)
            if bench.is_patched:
                answer.reason += f" (asked with {bench.patches()})"
            cell.answers.append(answer)
            if answer.red:
                answer.causes += self._elsewhere(
                    bench, question, configuration, model, answer, record, base, cell
                )

    def _elsewhere(
        self, bench: Bench, question: str, configuration: Configuration, model: Model,
        answer: Answer, record: Any, base: Model, cell: Cell,
    ) -> list[Cause]:  # fmt: skip
        """Causes of a red cell whose logits agree."""
        if answer.verdict == "error":
            return [Cause("error", "", answer.reason)]
        sentence = record.reason
        if question in (GRADIENT, CACHE):
            where = bench.cell(
                question, model, bench.recipe(model, **_targets(bench, question, model))
            )
            sentence = locate(bench.column.engine, where, record).sentence or record.reason
        found = [Cause("module", "", sentence)]
        caches = [a for a in cell.of(CACHE) if a.red and a.configuration == configuration.name]
        if question == TOKENS and caches:
            found.append(
                Cause(
                    "follows",
                    CACHE,
                    "the KV cache of the same configuration differs, and tokens are generated through it",
                )
            )
        culprits = self._parting(bench, question, configuration, base)
        return [*found, *culprits]

    def _parting(
        self, bench: Bench, question: str, configuration: Configuration, base: Model
    ) -> list[Cause]:
        """Which traps, each alone, turn the question red."""
        if not configuration.traps:
            return []
        alone, _ = bench.ask(question, "plain", base)
        if alone.red:
            return [
                Cause(
                    "module",
                    "",
                    "the plain configuration is red in the same question: it is not the traps",
                )
            ]
        causes = []
        plain = self.architecture.found.made[0]
        for trap in configuration.traps:
            try:
                model = self.store.model(
                    self.architecture.name, changed(plain.config, trap.changes)
                )
            except NotMade:
                continue
            found, _ = bench.ask(question, "plain", model)
            if found.red:
                causes.append(
                    Cause(
                        "setting",
                        ", ".join(trap.changes),
                        f"{trap.name} alone makes the difference, without it both sides agree: {found.reason}",
                    )
                )
        return causes or [Cause("unknown", "", "none of the traps alone makes the difference")]


def _same(reason: str) -> str:
    """An error without the values of the configuration that it quotes."""
    return reason.partition("; named there")[0]


def _targets(bench: Bench, question: str, model: Model) -> Mapping[str, Any]:
    chosen = bench.targets(model) if question in (GRADIENT, TOKENS) else []
    return {"lora__target_modules": chosen} if chosen else {}
