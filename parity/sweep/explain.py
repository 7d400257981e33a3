"""What each side makes of a setting, found by changing configurations and seeing what then agrees.

Nothing is looked up: a sentence is said only of what a run has shown.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from parity.bisect.locate import locate
from parity.sweep.answers import Answer, Cause
from parity.sweep.bench import Bench, Logits, apart, equal
from parity.sweep.candidates import (
    HEAD_WIDTH,
    any_setting,
    by_default,
    completing,
    instead,
    lifted,
    open_switches,
    readable,
    relative,
    resolved,
    switches,
)
from parity.sweep.models import Model
from parity.sweep.questions import LOGITS
from parity.sweep.sources import Field
from parity.sweep.tensors import kinds, zeroed
from parity.sweep.traps import Trap, leaves, value_at
from parity.sweep.wording import (
    compressed,
    differing,
    in_words,
    leaf_keys,
    loading_error,
    module_named,
    named_in,
)

LOADING = "does not load"


class Explainer:
    """Explains red cells of one bench.

    Args:
        bench: Both sides, with the patch of causes found before.
    """

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.kind = bench.architecture
        self.release = bench.column.name
        self.other: dict[str, Any] = {}
        """Edits of the reference's configuration that make both agree where none of the subject's does."""

    def _fields(self) -> list[Field]:
        return self.bench.column.sources.fields(self.kind)

    # A setting by which two sides part ------------------------------------------------------------

    def setting(
        self, trap: Trap, plain: Model, model: Model, answer: Answer
    ) -> tuple[Cause, dict[str, Any]]:
        """What the subject makes of a setting that, set alone, makes the two sides differ.

        Args:
            trap: The setting.
            plain: The model without it, on which both agree.
            model: The model with it alone.
            answer: The red cell of that model.

        Returns:
            The cause, and edits of the subject's configuration that take it away (maybe none).
        """
        subject, reference = (self.bench.logits(s, model) for s in ("subject", "reference"))
        usual = {key: value_at(plain.config, key) for key in trap.changes}
        there = {key: value_at(model.config, key) for key in trap.changes}
        moved = differing(usual, there)
        names = compressed(moved)
        olds = {k: v[0] for k, v in moved.items()}
        before = in_words({k: v for k, v in olds.items() if v is not None} or olds)
        after = in_words({k: v[1] for k, v in moved.items()})
        proofs = [f"without it both sides agree; with {trap.name} they do not: {answer.reason}"]
        if subject.values is None:
            return self._unloaded(trap, plain, model, subject, reference, answer.tolerance, proofs)
        said = []
        if self._unread(model, usual, subject):
            said.append(
                f"mlx-lm takes no notice of {names}: with {before} instead its logits are the same bits"
            )
            proofs += self._named(list(moved))
        tolerance = answer.tolerance
        used = self._used(model, there, usual, subject, tolerance)
        if used:
            said.append(used)
        fix, edits = self._fix(model, there, reference, tolerance)
        if not said:
            place = self._place(model)
            said.append(
                f"{names} is read otherwise: what value mlx-lm computes with could not be told"
                + (f"; {place}" if place else "")
            )
        cause = Cause(
            "setting", names, "; ".join([*said, f"transformers computes with {after}"]), fix, proofs
        )
        return cause, edits

    def _unread(self, model: Model, usual: Mapping[str, Any], subject: Logits) -> bool:
        other = self.bench.store.edited(model, usual)
        return equal(self.bench.logits("subject", other), subject)

    def _named(self, keys: list[str]) -> list[str]:
        """Where the file of the architecture names settings, or that it does not."""
        sources = self.bench.column.sources
        file, words = sources.file(self.kind), sources.words(self.kind)
        if file is None:
            return []
        found = []
        for key in keys:
            last = key.rpartition(".")[2]
            place = sources.place(self.kind, last)
            if last not in words:
                found.append(f"neither models/{file.name} nor what it imports names {last}")
            elif place:
                found.append(f"{last} is named in {place}")
        return found

    def _used(
        self,
        model: Model,
        there: Mapping[str, Any],
        usual: Mapping[str, Any],
        subject: Logits,
        tolerance: float,
    ) -> str:
        tried: list[tuple[str, dict[str, Any]]] = [(in_words(usual), dict(usual))]
        for key, value in there.items():
            tried += list(instead(key, usual[key], value, model.config))
        keys = [key for value in there for key in leaf_keys(value, there[value])]
        tried += list(by_default(keys, model.config, self._fields()))
        for words, edits in tried:
            other = self.bench.store.edited(model, edits)
            left = apart(self.bench.logits("reference", other), subject)
            if left <= tolerance:
                return f"mlx-lm computes as transformers does with {words} (greatest |Δ| {left:.2g}, {tolerance:.2g} allowed)"
        return ""

    def _fix(
        self, model: Model, there: Mapping[str, Any], reference: Logits, tolerance: float
    ) -> tuple[str, dict[str, Any]]:
        sources = self.bench.column.sources
        tried = readable(there, model.config, self._fields(), sources.words(self.kind))
        for edits in tried:
            if self._agrees(model, edits, reference, tolerance):
                words = (
                    f"with {in_words(edits)} in config.json as well mlx-lm agrees with transformers"
                )
                return words, edits
        return "", {}

    def _agrees(
        self, model: Model, edits: Mapping[str, Any], reference: Logits, tolerance: float
    ) -> bool:
        other = self.bench.store.edited(model, edits)
        return apart(self.bench.logits("subject", other), reference) <= tolerance

    # What does not load ----------------------------------------------------------------------------

    def _unloaded(
        self, trap: Trap, plain: Model, model: Model, subject: Logits, reference: Logits,
        tolerance: float, proofs: list[str],
    ) -> tuple[Cause, dict[str, Any]]:  # fmt: skip
        tolerance = tolerance or self._tolerance(plain)
        sentence = f"with {trap.name} {loading_error(subject.error)}"
        proofs = [*proofs, *self._named(list(trap.changes))]
        fix, edits = self._fix(
            model, {k: value_at(model.config, k) for k in trap.changes}, reference, tolerance
        )
        return Cause("loading", ", ".join(trap.changes), sentence, fix, proofs), edits

    def _tolerance(self, model: Model) -> float:
        answer, _ = self.bench.ask(LOGITS, "", model)
        return answer.tolerance

    # A plain configuration ------------------------------------------------------------------------

    def plain(
        self, model: Model, answer: Answer, usual: Mapping[str, Any]
    ) -> tuple[Cause, dict[str, Any]]:
        """Why both differ although nothing is set.

        Args:
            model: The plain model.
            answer: Its red cell.
            usual: Its configuration as transformers reads it, every key filled in.
        """
        subject, reference = (self.bench.logits(s, model) for s in ("subject", "reference"))
        if reference.values is None:
            return Cause("unknown", "", f"transformers fails: {reference.error}"), {}
        if subject.values is None:
            return self._plain_unloaded(model, subject, reference, usual)
        tolerance = answer.tolerance
        keys = [".".join(path) for path, _ in leaves(model.config)]
        defaults = by_default(keys, model.config, self._fields())
        for words, edits in [*defaults, *self._single(any_setting(model.config))]:
            other = self.bench.store.edited(model, edits)
            left = apart(self.bench.logits("reference", other), subject)
            if left <= tolerance:
                key, theirs = ", ".join(edits), edits
                fix, edits = self._plain_fix(model, reference, tolerance)
                self.other = {} if fix else theirs
                return Cause(
                    "setting", key,
                    f"mlx-lm computes as transformers does with {words} (greatest |Δ| {left:.2g}, {tolerance:.2g} allowed), "
                    f"transformers with {in_words({k: value_at(model.config, k) for k in key.split(', ')})}",
                    fix,
                ), edits  # fmt: skip
        fix, edits = self._plain_fix(model, reference, tolerance)
        if fix:
            sentence = f"{', '.join(edits)} is read otherwise: with what value mlx-lm computes could not be told"
            return Cause("setting", ", ".join(edits), sentence, fix), edits
        place = self._place(model)
        if found := self._unused(model, subject, reference, tolerance):
            found.proofs = [place] if place else []
            return found, {}
        if place:
            return Cause("module", module_named(place), place), {}
        return Cause(
            "unknown", "", "no single setting explains it, and no module could be named"
        ), {}

    def _single(
        self, tried: Iterable[tuple[str, dict[str, Any]]]
    ) -> Iterable[tuple[str, dict[str, Any]]]:
        return list(tried)[:60]

    def _plain_fix(
        self, model: Model, reference: Logits, tolerance: float
    ) -> tuple[str, dict[str, Any]]:
        """An edit of the subject's configuration under which it agrees: switches, and other spellings."""
        tried = [(in_words(edits), edits) for edits in self._ropes(model)]
        tried += switches(model.config, self._fields())
        for shown, edits in tried:
            if self._agrees(model, edits, reference, tolerance):
                return f"with {shown} in config.json mlx-lm agrees with transformers", relative(
                    edits, model.config
                )
        return "", {}

    def _ropes(self, model: Model, whatever: bool = False) -> list[dict[str, Any]]:
        """The rope settings of a configuration in other spellings; `whatever`: the usual kind as well."""
        words = self.bench.column.sources.words(self.kind)
        ropes: dict[str, Any] = {}
        text = model.config.get("text_config")
        for above, config in (
            ("", model.config),
            ("text_config.", text if isinstance(text, Mapping) else {}),
        ):
            found = {
                k: v for k, v in config.items() if isinstance(v, Mapping) and k.startswith("rope")
            }
            ropes |= {f"{above}{k}": v for k, v in found.items()}
        tried = readable(ropes, model.config, self._fields(), words)
        if whatever and "rope_scaling" in words:
            tried += [
                {
                    key.replace("rope_parameters", "rope_scaling"): {
                        **rope,
                        "type": rope["rope_type"],
                    }
                }
                for key, rope in ropes.items()
                if "rope_type" in rope
            ]
        return tried

    def _plain_unloaded(
        self, model: Model, subject: Logits, reference: Logits, usual: Mapping[str, Any]
    ) -> tuple[Cause, dict[str, Any]]:
        from parity.judge.noise import EPS, HEADROOM

        assert reference.values is not None
        size = float(abs(reference.values).max())
        loose = HEADROOM * 8 * size * EPS["float32"]  # confirmed by a cell of its own below
        own = self.bench.column.sources.own_fields(self.kind)
        known = completing(model.config, own, usual)
        tried = [{**known, **way} for way in open_switches(model.config, own, known)]
        tried.append({**known, **lifted(model.config, own)})
        tried += [{**known, **relative(edits, model.config)} for edits in self._ropes(model, True)]
        if model.config.get("model_type") != self.kind:
            # transformers saves the text model of a larger one under a type of its own.
            tried.append({"model_type": self.kind, "text_config": model.config})
        if any(field.name == "head_dim" for field in own) and "head_dim" not in model.config:
            tried.append({**known, "head_dim": HEAD_WIDTH})
        tried += [{**tried[0], **edits} for _, edits in switches(model.config, self._fields())]
        loading: list[dict[str, Any]] = []
        rest: tuple[dict[str, Any], str] | None = None  # the first edits that do not help, and why
        for edits in filter(None, tried):
            other = self.bench.store.edited(model, resolved(edits, model.config))
            found = self.bench.logits("subject", other)
            if found.values is None:
                rest = rest or (resolved(edits, model.config), found.error)
                continue
            if apart(found, reference) <= loose and self._green(model, edits):
                return self._loaded(
                    model, subject, edits, "it loads and agrees with transformers"
                ), edits
            loading.append(edits)
        if not loading:
            cause = Cause("loading", named_in(subject.error), loading_error(subject.error))
            if rest and loading_error(rest[1]) != loading_error(subject.error):
                cause.sentence += f"; with {in_words(rest[0])} filled in {loading_error(rest[1])}"
            return cause, {}
        # What is left once it loads has a cause of its own.
        edits = loading[0]
        patched = Explainer(self.bench.patched(edits))
        again, _ = patched.bench.ask(LOGITS, "", model)
        if again.green:
            return self._loaded(
                model, subject, edits, "it loads and agrees with transformers"
            ), edits
        left, more = patched.plain(model, again, usual)
        self.other = patched.other
        cause = self._loaded(model, subject, edits, "it loads, and does not agree yet")
        cause.sentence += f"; once it loads: {left.sentence}"
        cause.name = ", ".join(filter(None, [cause.name, left.name]))
        cause.fix += f"; then {left.fix}" if left.fix else ""
        return cause, {**edits, **more}

    def _green(self, model: Model, edits: Mapping[str, Any]) -> bool:
        return self.bench.patched(edits).ask(LOGITS, "", model)[0].green

    def _loaded(
        self, model: Model, subject: Logits, edits: Mapping[str, Any], outcome: str
    ) -> Cause:
        literal = in_words(resolved(edits, model.config))
        fix = f"with {literal} in config.json as well {outcome}"
        return Cause("loading", ", ".join(edits), loading_error(subject.error), fix)

    # Tensors -------------------------------------------------------------------------------------

    def _unused(
        self, model: Model, subject: Logits, reference: Logits, tolerance: float
    ) -> Cause | None:
        """Tensors that mlx-lm takes no notice of, where transformers without them gives its logits."""
        unused = []
        for kind in kinds(model):
            other = zeroed(self.bench.store, model, kind)
            if not equal(self.bench.logits("subject", other), subject):
                continue
            found = self.bench.logits("reference", other)
            if apart(found, reference) <= tolerance:
                continue  # neither side uses it
            left = apart(found, subject)
            unused.append(kind)
            if left <= tolerance:
                return Cause(
                    "module", kind,
                    f"mlx-lm takes no notice of the tensors {kind}: with zeros in their place its logits are the same "
                    f"bits, and transformers with zeros there gives mlx-lm's logits (greatest |Δ| {left:.2g}, "
                    f"{tolerance:.2g} allowed)",
                )  # fmt: skip
        if unused:
            names = ", ".join(unused)
            return Cause(
                "module", names,
                f"mlx-lm takes no notice of the tensors {names}: with zeros in their place its logits are the same "
                "bits, those of transformers are not; that is not the only difference",
            )  # fmt: skip
        return None

    # Modules -------------------------------------------------------------------------------------

    def _place(self, model: Model) -> str:
        """The first bad module in words, as the search of `parity bisect` finds it."""
        cell = self.bench.cell(LOGITS, model)
        answer, record = self.bench.ask(LOGITS, "", model)
        if answer.verdict != "diverge":
            return ""
        return locate(self.bench.column.engine, cell, record).sentence
