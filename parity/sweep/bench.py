"""One architecture on one release: cells are run, and single captures of either side for the search."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from parity.capture.engine import Engine
from parity.cells.cell import Cell as ProbeCell
from parity.cells.run import run_cell
from parity.errors import NO_ANSWER, CaptureError, UnmatchedNames, Unsupported
from parity.names import canonical
from parity.recipe import Recipe
from parity.record import Record
from parity.sweep.answers import Answer
from parity.sweep.filling import From, resolved
from parity.sweep.models import Model, Store, text
from parity.sweep.questions import GRADIENT, STAGES, TOKENS, targets
from parity.sweep.sources import Field, Sources
from parity.sweep.wording import without_keys
from parity.trace import Array, Trace

REFERENCE = "hf"
RETRIES = 6
"""Modules that may be taken out of the adapter because no gradient arrives at them."""


@dataclass(frozen=True)
class Column:
    """A release of mlx-lm, or a commit: the path that runs it and its sources."""

    name: str
    spec: str
    engine: Engine
    sources: Sources
    option: str = ""
    """The words that choose it on the command line."""


@dataclass(frozen=True)
class Logits:
    """The logits of one side, or why there are none."""

    values: Array | None
    error: str = ""
    missing: bool = False
    """Whether it is a matter of loading."""


@dataclass
class Bench:
    """Asks both sides of models of one architecture."""

    architecture: str
    column: Column
    store: Store
    patch: dict[str, Any] = field(default_factory=dict)
    """Edits of the subject's configuration that take a cause away which was found already."""
    other: dict[str, Any] = field(default_factory=dict)
    """The same of the reference's, where nothing makes the subject agree."""
    target: dict[str, list[str]] = field(default_factory=dict)
    kind: str = ""
    """The model type under which transformers saves the architecture, where mlx-lm has a file for that."""

    def patched(self, edits: Mapping[str, Any], other: Mapping[str, Any] | None = None) -> Bench:
        """The same with further edits of the subject's configuration, or of the reference's.

        Raises:
            TypeError: An edit is a mapping: it would take away what another configuration has inside.
        """
        patch, changed = {**self.patch, **edits}, {**self.other, **(other or {})}
        for key, value in (*patch.items(), *changed.items()):
            if isinstance(value, Mapping):
                raise TypeError(f"the edit of {key} is a whole mapping: set single keys, or a From")
        return replace(self, patch=patch, other=changed, target={})

    @property
    def served(self) -> str:
        """The model type whose file of mlx-lm runs the models."""
        return self.kind or self.architecture

    def fields(self) -> list[Field]:
        """Settings that this file declares, with those of files that it imports."""
        return self.column.sources.fields(self.served)

    @property
    def under(self) -> str:
        """`with …: ` of a sentence that rests on edits; empty where there are none."""
        return f"with {self.patches()}: " if self.is_patched else ""

    @property
    def is_patched(self) -> bool:
        """Whether either side is handed another configuration than the checkpoint's."""
        return bool(self.patch or self.other)

    def patches(self) -> str:
        """What is edited on which side, in words; empty where nothing is."""
        sides = (("mlx-lm", self.patch), ("transformers", self.other))
        return " and ".join(
            f"{', '.join(shown(key, value) for key, value in edits.items())} in the config.json of {side}"
            for side, edits in sides
            if edits
        )

    def model_of(self, side: str, model: Model) -> Model:
        """What a side is handed: the model with the edits of the patch."""
        edits = self.patch if side == "subject" else self.other
        return self.store.edited(model, resolved(edits, model.config)) if edits else model

    def recipe(self, model: Model, **changes: Any) -> Recipe:
        """The recipe of a model: no training is asked for."""
        given = {name.replace("__", "."): value for name, value in changes.items()}
        return Recipe().override(
            {"model.source": str(model.folder), "decode.max_tokens": 24, **given}
        )

    def ask(self, question: str, configuration: str, model: Model) -> tuple[Answer, Record]:
        """One cell."""
        if question == TOKENS:
            model = self.store.edited(model, ends(model))
        adapted = question in (GRADIENT, TOKENS)
        chosen = self.targets(model) if adapted else []
        recipe = self.recipe(model, **({"lora__target_modules": chosen} if chosen else {}))
        cell = self.cell(question, model, recipe)
        record = run_cell(self.column.engine, cell)
        for _ in range(RETRIES):
            # Some modules are called by neither their framework nor ours: only their weights are read.
            lone = re.search(r"have no gradient, first '[\w.]*?(\w+)\.lora_[ab]'", record.reason)
            if not (adapted and lone and lone[1] in chosen and len(chosen) > 1):
                break
            chosen = [name for name in chosen if name != lone[1]]
            self.target[str(model.folder)] = chosen
            recipe = self.recipe(model, lora__target_modules=chosen)
            cell = self.cell(question, model, recipe)
            record = run_cell(self.column.engine, cell)
        top = next((m for m in record.metrics if m.verdict is record.verdict), None)
        verdict, reason = str(record.verdict), _with_last_words(record.reason, record.detail)
        reason = without_keys(reason, [*self.patch, *self.other])
        if verdict == "error" and reason.startswith(f"path {REFERENCE!r}: "):
            verdict, reason = "skip", f"transformers cannot be asked: {reason}"
        if adapted and not chosen and verdict != "error":
            verdict, reason = "skip", "no linear module has the same name on both sides"
        answer = Answer(
            question,
            configuration,
            "not asked" if verdict == "skip" else verdict,
            reason if top is None or record.verdict.green else _numbers(reason, top),
            float(top.value) if top else 0.0,
            float(top.tolerance) if top else 0.0,
            record.seconds,
            reproduce=self.reproduce(question, configuration),
        )
        return answer, record

    def cell(self, question: str, model: Model, recipe: Recipe | None = None) -> ProbeCell:
        """The cell of a question, the subject's configuration patched."""
        shared = recipe or self.recipe(model)
        edits = {"subject": self.patch, "reference": self.other}
        changes = {
            side: {"model.source": str(self.model_of(side, model).folder)}
            for side, edited in edits.items()
            if edited
        }
        return ProbeCell(STAGES[question], self.column.spec, REFERENCE, shared, changes)

    def reproduce(self, question: str, configuration: str) -> str:
        """The command line that runs one cell again."""
        words = ["parity", "sweep", "--only", self.architecture, "--question", question,
                 "--configuration", configuration]  # fmt: skip
        option = f" {self.column.option}" if self.column.option else ""
        return " ".join(map(shlex.quote, words)) + option

    def versions(self, model: Model) -> dict[str, str]:
        """The versions of the process that runs the subject."""
        try:
            trace = self.column.engine.capture(
                self.column.spec, "defaults", self.recipe(model), Trace()
            )
        except NO_ANSWER:
            return {}
        return {name: str(value) for name, value in trace.environment["versions"].items()}

    def logits(self, side: str, model: Model) -> Logits:
        """The logits of one side on the sweep's text."""
        spec = {"subject": self.column.spec, "reference": REFERENCE}[side]
        inputs = Trace({"ids.0": text()}, {"modules": False})
        recipe = self.recipe(self.model_of(side, model))
        try:
            trace = self.column.engine.capture(spec, "logits", recipe, inputs)
        except Unsupported as error:  # mlx-lm has no model of this type
            return Logits(None, str(error), True)
        except (CaptureError, UnmatchedNames) as error:
            # What an edit put into config.json must not be read back as what the configuration has.
            words = without_keys(str(error), [*self.patch, *self.other])
            return Logits(
                None,
                _with_last_words(words, getattr(error, "detail", "")),
                "does not load" in str(error),
            )
        return Logits(trace.arrays["logits.0"])

    def targets(self, model: Model) -> list[str]:
        """Linear modules that both sides have under the same names."""
        key = str(model.folder)
        if key not in self.target:
            inputs = Trace({"ids.0": text(1, 4)}, {"modules": True, "inputs": True})
            spec = self.column.spec
            try:
                recipe = self.recipe(self.model_of("subject", model))
                trace = self.column.engine.capture(spec, "logits", recipe, inputs)
                present = trace.scalars.get("present", [])
            except NO_ANSWER:
                present = []
            self.target[key] = targets(model.modules, map(canonical, present))
        return self.target[key]


def shown(key: str, value: Any) -> str:
    """An edit in words; `rope_theta (from rope_parameters.rope_theta)` of one that is copied."""
    return f"{key} (from {value.words})" if isinstance(value, From) else f"{key}={value}"


def ends(model: Model) -> dict[str, Any]:
    """The id that ends a sequence, for a configuration: that of the tokenizer, as in any checkpoint."""
    file = model.folder / "tokenizer.json"
    config = json.loads((model.folder / "tokenizer_config.json").read_text("utf-8"))
    added = json.loads(file.read_text("utf-8"))["added_tokens"]
    end = next(token["id"] for token in added if token["content"] == config["eos_token"])
    keys = [
        "eos_token_id",
        *(["text_config.eos_token_id"] if "text_config" in model.config else []),
    ]
    return dict.fromkeys(keys, end)


def _with_last_words(text: str, detail: str) -> str:
    """An error; of a process that died with the last line that it printed."""
    last = next((line.strip() for line in reversed(detail.splitlines()) if line.strip()), "")
    return f"{text}; its last words: {last[:200]}" if " died (" in text and last else text


def _numbers(reason: str, metric: Any) -> str:
    if not metric.tolerance:
        return reason
    over = f"greatest |Δ| {metric.value:.3g}, {metric.tolerance:.3g} allowed"
    return reason if over in reason else f"{reason} ({over})"


def apart(a: Logits, b: Logits) -> float:
    """Greatest difference of two logits; infinite where either is missing."""
    if a.values is None or b.values is None or a.values.shape != b.values.shape:
        return float("inf")
    with np.errstate(invalid="ignore"):
        found = float(np.max(np.abs(a.values.astype(np.float64) - b.values.astype(np.float64))))
    return found if np.isfinite(found) else float("inf")


def equal(a: Logits, b: Logits) -> bool:
    """Whether two logits are equal bit for bit."""
    return a.values is not None and b.values is not None and np.array_equal(a.values, b.values)


Edits = Mapping[str, Any]
"""Values of a configuration by dotted key."""
