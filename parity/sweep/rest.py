"""Gradient, KV cache and tokens of one configuration whose logits agree, and the causes of those that are red."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from parity.bisect.locate import locate
from parity.sweep.answers import NOT_ASKED, Answer, Cause, Cell
from parity.sweep.bench import Bench
from parity.sweep.maker import NotMade
from parity.sweep.models import Model
from parity.sweep.questions import CACHE, GRADIENT, LOGITS, TOKENS
from parity.sweep.traps import Configuration, changed

REST = "traps that agree"
"""The configuration of those traps that are not the cause of a red cell."""


@dataclass(frozen=True)
class Rest:
    """Asks them.

    Attributes:
        bench: Both sides, with the edits that make the plain configuration agree.
        plain: The plain configuration.
        base: Its model.
        wanted: Questions that are asked.
    """

    bench: Bench
    plain: Configuration
    base: Model
    wanted: tuple[str, ...]

    def ask(self, cell: Cell, greens: list[tuple[Configuration, Model]]) -> None:
        """The questions of the configuration with most traps whose logits agree."""
        best: tuple[Configuration, Model] | None = None
        for configuration, model in sorted(greens, key=lambda found: -len(found[0].traps)):
            if configuration.name == REST:
                answer, _ = self.bench.ask(LOGITS, REST, model)
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
                cell.answers.append(Answer(question, self.plain.name, NOT_ASKED, reason))
                continue
            configuration, model = best
            answer, record = self.bench.ask(question, configuration.name, model)
            if self.bench.is_patched:
                answer.reason += f" (asked with {self.bench.patches()})"
            cell.answers.append(answer)
            if answer.red:
                answer.causes += self._causes(question, configuration, model, answer, record, cell)

    def _causes(
        self, question: str, configuration: Configuration, model: Model, answer: Answer,
        record: Any, cell: Cell,
    ) -> list[Cause]:  # fmt: skip
        """Causes of a red cell whose logits agree."""
        under = self.bench.under
        if answer.verdict == "error":
            return [Cause("error", "", answer.reason)]
        sentence = record.reason
        if question in (GRADIENT, CACHE):
            recipe = self.bench.recipe(model, **self._targets(question, model))
            where = self.bench.cell(question, model, recipe)
            sentence = locate(self.bench.column.engine, where, record).sentence or record.reason
        found = [Cause("module", "", under + sentence)]
        caches = [a for a in cell.of(CACHE) if a.red and a.configuration == configuration.name]
        if question == TOKENS and caches:
            words = "the KV cache of the same configuration differs, and tokens are generated through it"
            found.append(Cause("follows", CACHE, words))
        return [*found, *self._parting(question, configuration)]

    def _parting(self, question: str, configuration: Configuration) -> list[Cause]:
        """Which traps, each alone, turn the question red."""
        if not configuration.traps:
            return []
        under = self.bench.under
        alone, _ = self.bench.ask(question, "plain", self.base)
        if alone.red:
            words = "the plain configuration is red in the same question: it is not the traps"
            return [Cause("module", "", under + words)]
        if not alone.green:
            words = f"which of the traps it is could not be told: the plain configuration cannot be asked: {alone.reason}"
            return [Cause("unknown", "", under + words)]
        causes = []
        for trap in configuration.traps:
            try:
                config = changed(self.plain.config, trap.changes)
                model = self.bench.store.model(self.bench.architecture, config)
            except NotMade:
                continue
            found, _ = self.bench.ask(question, "plain", model)
            if found.red:
                words = f"{trap.name} alone makes the difference, without it both sides agree: {found.reason}"
                causes.append(Cause("setting", ", ".join(trap.changes), under + words))
        if causes or len(configuration.traps) == 1:
            return causes
        return [Cause("unknown", "", f"{under}none of the traps alone makes the difference")]

    def _targets(self, question: str, model: Model) -> Mapping[str, Any]:
        chosen = self.bench.targets(model) if question in (GRADIENT, TOKENS) else []
        return {"lora__target_modules": chosen} if chosen else {}
