"""What each side makes of a setting, found by changing configurations and seeing what then agrees.

Nothing is looked up: a sentence is said only of what a run has shown.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from parity.bisect.locate import locate
from parity.sweep.answers import Answer, Cause
from parity.sweep.bench import Bench, Logits, apart, equal
from parity.sweep.candidates import any_setting, by_default, instead, readable, relative, switches
from parity.sweep.filling import resolved
from parity.sweep.models import Model
from parity.sweep.questions import LOGITS
from parity.sweep.tensors import kinds, zeroed
from parity.sweep.traps import Trap, changed, leaves, value_at
from parity.sweep.unloaded import Unloaded
from parity.sweep.wording import (
    as_saved,
    compressed,
    differing,
    in_words,
    leaf_keys,
    loading_error,
    module_named,
)

SETTINGS = 60
"""Settings that are tried at another value for a plain configuration."""


class Explainer:
    """Explains red cells of one bench.

    Args:
        bench: Both sides, with the patch of causes found before.
    """

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.kind = bench.served
        self.other: dict[str, Any] = {}
        """Edits of the reference's configuration that make both agree where none of the subject's does."""

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
        under = self.bench.under
        usual, there = as_saved(trap.changes, plain.config, model.config)
        moved = differing(usual, there)
        if not moved:
            words = f"{under}with {trap.name} both sides differ, and transformers saves the same config.json without it"
            return Cause("unknown", "", words), {}
        names = compressed(moved)
        before, after = _both_in_words(moved)
        proofs = [f"{under}without it both sides agree; with {trap.name}: {answer.reason}"]
        if subject.values is None:
            return self._unloaded(there, plain, model, subject, reference, answer.tolerance, proofs)
        said = []
        if self._unread(model, usual, subject):
            said.append(
                f"mlx-lm takes no notice of {names}: with {before} instead its logits are the same bits"
            )
            proofs += self._named(list(moved))
        if reference.values is None or not answer.red:
            said.append(f"{self._whose()} cannot be asked: {reference.error or answer.reason}")
            return Cause("setting", names, under + "; ".join(said), "", proofs), {}
        tolerance = answer.tolerance
        used = self._used(model, there, usual, subject, tolerance)
        if used:
            said.append(used)
        fix, edits = self._fix(model, there, reference, tolerance)
        if not said:
            said.append(
                f"both sides differ with {after} and not with {before}; "
                + (self._place(model) or "what mlx-lm makes of it could not be told")
            )
        else:
            said.append(f"transformers computes with {after}")
        return Cause("setting", names, under + "; ".join(said), fix, proofs), edits

    def _whose(self) -> str:
        return "transformers with its edited config.json" if self.bench.other else "transformers"

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
        tried: list[tuple[str, dict[str, Any]]] = [("", dict(usual))]
        for key, value in there.items():
            tried += list(instead(key, usual[key], value, model.config))
        keys = [key for value in there for key in leaf_keys(value, there[value])]
        tried += list(by_default(keys, model.config, self.bench.fields()))
        return next((words for words, _ in self._alike(model, tried, subject, tolerance)), "")

    def _alike(
        self, model: Model, tried: Iterable[tuple[str, dict[str, Any]]], subject: Logits, tolerance: float
    ) -> Iterator[tuple[str, dict[str, Any]]]:  # fmt: skip
        """Edits with which transformers gives mlx-lm's logits, as a sentence; what it was handed is said."""
        for note, edits in tried:
            other = self.bench.store.edited(model, edits)
            left = apart(self.bench.logits("reference", other), subject)
            if left <= tolerance:
                handed = changed(other.config, resolved(self.bench.other, other.config))
                words = in_words({key: value_at(handed, key) for key in edits}) + note
                yield (
                    f"mlx-lm computes as transformers does with {words} "
                    f"(greatest |Δ| {left:.2g}, {tolerance:.2g} allowed)",
                    edits,
                )

    def _fix(
        self, model: Model, there: Mapping[str, Any], reference: Logits, tolerance: float
    ) -> tuple[str, dict[str, Any]]:
        sources = self.bench.column.sources
        tried = readable(there, model.config, self.bench.fields(), sources.words(self.kind))
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
        self, there: Mapping[str, Any], plain: Model, model: Model, subject: Logits, reference: Logits,
        tolerance: float, proofs: list[str],
    ) -> tuple[Cause, dict[str, Any]]:  # fmt: skip
        tolerance = tolerance or self._tolerance(plain)
        edits = f", and {self.bench.patches()}," if self.bench.is_patched else ""
        sentence = f"with {in_words(there)}{edits} {loading_error(subject.error)}"
        proofs = [*proofs, *self._named(list(there))]
        fix, found = self._fix(model, there, reference, tolerance)
        return Cause("loading", ", ".join(there), sentence, fix, proofs), found

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
            search = Unloaded(self.bench, Explainer)
            cause, edits = search.explain(
                model, subject, reference, usual, self._ropes(model, True)
            )
            self.other = search.other
            return cause, edits
        tolerance = answer.tolerance
        keys = [".".join(path) for path, _ in leaves(model.config)]
        tried = list(by_default(keys, model.config, self.bench.fields()))
        tried += [("", edits) for edits in itertools.islice(any_setting(model.config), SETTINGS)]
        for words, theirs in self._alike(model, tried, subject, tolerance):
            fix, edits = self._plain_fix(model, reference, tolerance)
            self.other = {} if fix else theirs
            sentence = f"{words}, transformers with {in_words({k: value_at(model.config, k) for k in theirs})}"
            return Cause("setting", ", ".join(theirs), sentence, fix), edits
        fix, edits = self._plain_fix(model, reference, tolerance)
        if fix:
            sentence = (
                f"both sides differ unless {', '.join(edits)} of mlx-lm's config.json is another; "
                "what mlx-lm computes with as it is could not be told"
            )
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

    def _plain_fix(
        self, model: Model, reference: Logits, tolerance: float
    ) -> tuple[str, dict[str, Any]]:
        """An edit of the subject's configuration under which it agrees: switches, and other spellings."""
        tried = [(in_words(edits), edits) for edits in self._ropes(model)]
        tried += switches(model.config, self.bench.fields())
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
        tried = readable(ropes, model.config, self.bench.fields(), words)
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


def _both_in_words(moved: Mapping[str, tuple[Any, Any]]) -> tuple[str, str]:
    """Settings before and after; those that are not there before are left out, unless none is."""
    olds = {key: value[0] for key, value in moved.items()}
    before = in_words({k: v for k, v in olds.items() if v is not None} or olds)
    return before, in_words({key: value[1] for key, value in moved.items()})
