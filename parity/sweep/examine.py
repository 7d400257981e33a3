"""All questions of one architecture on one release, and the cause of each that is red."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from parity.sweep.answers import ABSENT, NOT_ASKED, Answer, Cause, Cell
from parity.sweep.bench import Bench, Column
from parity.sweep.explain import Explainer
from parity.sweep.maker import NotMade
from parity.sweep.models import Architecture, Model, Store
from parity.sweep.questions import LOADS, LOGITS, QUESTIONS
from parity.sweep.rest import REST, Rest
from parity.sweep.traps import Configuration, Trap, changed


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
        configurations = [
            c
            for c in self.architecture.found.made
            if not self.chosen
            or c.name in {*self.chosen, "plain"}
            or (c.name == "traps" and REST in self.chosen)
        ]
        plain, *others = configurations
        base = self.store.model(name, plain.config)
        bench = Bench(name, self.column, self.store, kind=self._saved(cell, base))
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
        Rest(bench, plain, base, self.wanted).ask(cell, greens)
        if self.chosen:
            cell.answers = [a for a in cell.answers if a.configuration in (*self.chosen, REST)]
        cell.answers = [answer for answer in cell.answers if answer.question in self.wanted]
        cell.seconds = time.perf_counter() - started
        return cell

    def _saved(self, cell: Cell, model: Model) -> str:
        """The model type that transformers saves, where mlx-lm serves it by another file; noted in the cell."""
        name, kind = self.architecture.name, str(model.config.get("model_type", ""))
        file = self.column.sources.file(kind)
        if file is None or file.name == cell.file:
            return ""
        cell.remark = (
            f"transformers saves the causal model of {name} as {kind}: mlx-lm runs models/{file.name}, "
            f"models/{cell.file} was not asked"
        )
        cell.file = file.name
        return kind

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
        kind = str(model.config.get("model_type", ""))
        served = kind if self.column.sources.file(kind) else self.architecture.name
        names = [field.name for field in self.column.sources.fields(served)]
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
        bare = replace(bench, patch={}, other={}, target={}) if patched else bench
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
            agrees = bench.ask(LOGITS, plain.name, base)[0].green
            what = "as in the plain configuration" if agrees else "the plain configuration differs"
            if again.green:
                words = f"{what}: with {bench.patches()} both sides agree here as well"
                answer.causes.append(Cause("follows", name, words))
                return [(configuration, model)]
            if not again.red:
                words = (
                    "the plain configuration is red already, see there; with "
                    f"{bench.patches()} this one could not be asked: {again.reason}"
                )
            elif agrees:
                words = f"{what}, and more: with {bench.patches()} they differ still"
            else:
                words = (
                    f"{what} and nothing was found that makes it agree; with {bench.patches()} this one differs "
                    "as well, and what its own settings add could not be told"
                )
            answer.causes.append(Cause("follows", name, words))
            if not agrees:
                return []
        return self._traps(bench, base, plain, configuration, answer)

    def _traps(
        self, bench: Bench, base: Model, plain: Configuration, configuration: Configuration, answer: Answer
    ) -> list[tuple[Configuration, Model]]:  # fmt: skip
        """Which traps part the two sides by themselves; the others together, if they agree."""
        if configuration.ties:
            edited = f", with {bench.patches()}" if bench.is_patched else ""
            words = (
                f"with different scores of the experts (the plain configuration{edited}) both sides agree, with equal "
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
        if (asked := self._asked(bench, plain, trap.changes)) is None:
            return [], {}
        model, alone = asked
        if alone.green or (not alone.red and not bench.is_patched):
            return [], {}
        causes, edits = list[Cause](), dict[str, Any]()
        for piece, other, found in self._pieces(bench, plain, trap, model, alone):
            cause, fixed = Explainer(bench).setting(piece, base, other, found)
            causes.append(cause)
            edits |= fixed
        return causes, edits

    def _pieces(
        self, bench: Bench, plain: Configuration, trap: Trap, model: Model, answer: Answer
    ) -> Iterator[tuple[Trap, Model, Answer]]:
        """Of settings that are moved together each set without any of which the two sides do not part so."""
        first, rest = answer.verdict, dict(trap.changes)
        while rest and answer.verdict == first:
            for key in tuple(rest):
                fewer = {name: value for name, value in rest.items() if name != key}
                if not fewer or not answer.red:
                    continue
                found = self._asked(bench, plain, fewer)
                if found is not None and found[1].verdict == first:
                    rest, (model, answer) = fewer, found
            yield Trap(trap.kind, rest), model, answer
            left = {name: trap.changes[name] for name in trap.changes if name not in rest}
            trap = Trap(trap.kind, left)
            if not left or (found := self._asked(bench, plain, left)) is None:
                return
            rest, (model, answer) = dict(left), found

    def _asked(
        self, bench: Bench, plain: Configuration, changes: Mapping[str, Any]
    ) -> tuple[Model, Answer] | None:
        """The logits of the plain configuration with some settings moved; None where it cannot be built."""
        try:
            model = self.store.model(self.architecture.name, changed(plain.config, changes))
        except NotMade:
            return None
        return model, bench.ask(LOGITS, "plain", model)[0]

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
        words = (
            "no setting alone makes the difference, and none in the order in which they were added"
            if len(configuration.traps) > 1
            else "the only setting was red, and was not when it was asked again"
        )
        answer.causes.append(Cause("unknown", "", bench.under + words))


def _same(reason: str) -> str:
    """An error without the values of the configuration that it quotes."""
    return reason.partition("; named there")[0]
