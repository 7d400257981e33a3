"""Why mlx-lm does not load a plain configuration, and what in config.json makes it load and agree.

What a file demands and the configuration lacks is filled in with guesses (`parity.sweep.filling`). A guess is
claimed only where with it both sides agree, or where mlx-lm's logits do not depend on it. What fails
after a guess that is not claimed says nothing of the architecture and is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from parity.judge.noise import EPS, HEADROOM
from parity.sweep.answers import Cause
from parity.sweep.bench import Bench, Logits, apart, equal, shown
from parity.sweep.candidates import relative, switches
from parity.sweep.filling import (
    HEAD_WIDTH,
    Whole,
    lacking,
    lifted,
    moved,
    options,
    resolved,
    ways,
)
from parity.sweep.models import Model
from parity.sweep.questions import LOGITS
from parity.sweep.wording import in_words, loading_error, named_in

if TYPE_CHECKING:
    from parity.sweep.explain import Explainer

NAMED = 4
"""Edits that were tried in vain, of which a sentence names so many."""
SHORT = 120
"""Characters of one that is named beside the first."""
SECOND = 2
"""Edits that make it load of which it is asked what is left to differ."""

AGREES = "it loads and agrees with transformers"


@dataclass
class Unloaded:
    """Searches edits for a configuration that does not load.

    Args:
        bench: Both sides.
        explainer: Explains what is left once it loads.
    """

    bench: Bench
    explainer: Callable[[Bench], Explainer]
    other: dict[str, Any] = field(default_factory=dict)
    """Edits of the reference's configuration that the cause rests on."""

    def explain(
        self, model: Model, subject: Logits, reference: Logits, full: Mapping[str, Any],
        ropes: list[dict[str, Any]],
    ) -> tuple[Cause, dict[str, Any]]:  # fmt: skip
        """The cause, and edits of the subject's configuration that take it away (maybe none).

        Args:
            model: The model.
            subject: The error.
            reference: The logits of the other side.
            full: Attributes of the configuration as transformers has it.
            ropes: Its rope settings in other spellings.
        """
        assert reference.values is not None
        size = float(abs(reference.values).max())
        loose = HEADROOM * 8 * size * EPS["float32"]  # confirmed by a cell of its own
        loading: list[tuple[float, dict[str, Any]]] = []
        vain: list[str] = []
        for edits in self._tried(model, full, ropes):
            other = self.bench.store.edited(model, resolved(edits, model.config))
            found = self.bench.logits("subject", other)
            literal = self._in_words(edits, model)
            if found.values is None:
                fails = "it does not load" if found.missing else "it loads, and computing fails"
                vain.append(f"{literal}: {fails}")
                continue
            gap = apart(found, reference)
            if gap <= loose and self.bench.patched(edits).ask(LOGITS, "", model)[0].green:
                return self._loaded(model, subject, edits, AGREES)
            vain.append(f"{literal}: it loads and differs")
            loading.append((gap, edits))
        loading.sort(key=lambda found: found[0])
        for _, edits in loading[:SECOND]:
            if further := self._and_more(model, subject, edits, full):
                return further
        for _, edits in loading[:SECOND]:
            if further := self._whatever(model, subject, edits, full):
                return further
        return self._nothing(model, subject, full, vain), {}

    def _tried(
        self, model: Model, full: Mapping[str, Any], ropes: list[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """Edits, the likeliest first; each fills in all that is lacking."""
        config, kind = model.config, self.bench.served
        own = self.bench.column.sources.own_fields(kind)
        constants = self.bench.column.sources.compared(kind)
        tried: list[dict[str, Any]] = []
        if config.get("model_type") != kind:
            # transformers saves the text model of a larger one under a type of its own.
            tried += [{"model_type": kind}, {"model_type": kind, "text_config": Whole()}]
        filled = ways(config, lacking(config, own), full, constants)
        tried += filled
        for known in filled[:1]:
            tried.append({**known, **lifted(config, own)})
            tried += [{**known, **relative(edits, config)} for edits in ropes]
            if any(f.name == "head_dim" for f in own) and "head_dim" not in config:
                tried.append({**known, "head_dim": HEAD_WIDTH})
            tried += [{**known, **edits} for _, edits in switches(config, self.bench.fields())]
        unique: list[dict[str, Any]] = []
        for edits in tried:
            if edits and edits not in unique:
                unique.append(edits)
        return unique

    def _and_more(
        self, model: Model, subject: Logits, edits: dict[str, Any], full: Mapping[str, Any]
    ) -> tuple[Cause, dict[str, Any]] | None:
        """The cause where both sides agree by a cell of their own, or do once a further cause is taken away."""
        patched = self.explainer(self.bench.patched(edits))
        again, _ = patched.bench.ask(LOGITS, "", model)
        if again.green:
            return self._loaded(model, subject, edits, AGREES)
        if not again.red:
            return None
        left, more = patched.plain(model, again, full)
        final = self.bench.patched({**edits, **more}, patched.other)
        if not (more or patched.other) or not final.ask(LOGITS, "", model)[0].green:
            return None
        self.other = patched.other
        return self._with(model, subject, edits, more, left)

    def _whatever(
        self, model: Model, subject: Logits, edits: dict[str, Any], full: Mapping[str, Any]
    ) -> tuple[Cause, dict[str, Any]] | None:
        """What is left to differ, where the logits are the same bits with other values: no guess then."""
        others = moved(edits, model.config)
        if others is None:
            return None
        values = [
            self.bench.logits("subject", self.bench.store.edited(model, found))
            for found in (resolved(edits, model.config), others)
        ]
        if not equal(*values):
            return None
        patched = self.explainer(self.bench.patched(edits))
        again, _ = patched.bench.ask(LOGITS, "", model)
        if not again.red:
            return None
        left, _ = patched.plain(model, again, full)
        cause, found = self._with(model, subject, edits, {}, left)
        cause.fix += f"; the value does not matter, with {in_words(others)} mlx-lm's logits are the same bits"
        return cause, found

    def _with(
        self, model: Model, subject: Logits, edits: dict[str, Any], more: dict[str, Any], left: Cause
    ) -> tuple[Cause, dict[str, Any]]:  # fmt: skip
        cause, _ = self._loaded(model, subject, edits, "it loads, and does not agree yet")
        cause.sentence += f"; once it loads: {left.sentence}"
        cause.name = ", ".join(filter(None, [cause.name, left.name]))
        cause.fix += f"; then {left.fix}" if left.fix else ""
        return cause, {**edits, **more}

    def _loaded(
        self, model: Model, subject: Logits, edits: dict[str, Any], outcome: str
    ) -> tuple[Cause, dict[str, Any]]:
        fix = f"with {self._in_words(edits, model)} in config.json as well {outcome}"
        return Cause("loading", ", ".join(edits), loading_error(subject.error), fix), edits

    def _in_words(self, edits: Mapping[str, Any], model: Model) -> str:
        whole = [shown(key, value) for key, value in edits.items() if isinstance(value, Whole)]
        rest = {key: value for key, value in edits.items() if not isinstance(value, Whole)}
        return ", ".join([*filter(None, [in_words(resolved(rest, model.config))]), *whole])

    def _nothing(
        self, model: Model, subject: Logits, full: Mapping[str, Any], vain: list[str]
    ) -> Cause:
        """What is proven where nothing helps: the error as it is, and what was tried."""
        own = self.bench.column.sources.own_fields(self.bench.served)
        constants = self.bench.column.sources.compared(self.bench.served)
        closed = [
            f.name
            for f in lacking(model.config, own)
            if self.bench.served == model.config.get("model_type")
            and not options(f, model.config, full, constants.get(f.name, []))
        ]
        cause = Cause("loading", named_in(subject.error), loading_error(subject.error))
        if closed:
            cause.sentence += f"; there was no value to try for {', '.join(closed)}"
        if vain:
            named = vain[:1] + [v for i, v in enumerate(vain) if 0 < i < NAMED and len(v) < SHORT]
            more = f", and {len(vain) - len(named)} more" if len(vain) > len(named) else ""
            listed = "; ".join(named)
            cause.sentence += f"; no value that was tried made both agree ({listed}{more})"
        return cause
