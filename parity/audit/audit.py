"""Each factor that a path says it honours is moved alone, and what that changes is seen.

A factor without effect is only called swallowed where the same move, with the same inputs, has an effect
on another path: then the recipe makes it matter.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import partial
from typing import Any

from parity.audit import moves as known_moves
from parity.audit.concurrent import each
from parity.audit.effects import COMPARED, Effect, effect, unlike
from parity.audit.inputs import given, shapes
from parity.audit.moves import BESIDE, Move
from parity.capture.engine import Engine
from parity.errors import NO_ANSWER, CaptureError, UnmatchedNames, Unsupported
from parity.paths.measured import known
from parity.paths.registry import resolve
from parity.recipe import Recipe
from parity.stages.config import REQUESTED
from parity.stages.settings import TITLES, same, short
from parity.trace import Trace

CONTROLS = ("hf", "mlx")
"""Paths that show whether a move has an effect at all, in the order in which they are tried."""


class Status(StrEnum):
    """What is known of a factor. Only `HONOURED` and `REFUSED` are green."""

    HONOURED = "honoured"
    SWALLOWED = "swallowed"
    OTHER = "other effect"
    REFUSED = "refused"
    FAILED = "failed"
    NO_EFFECT = "no effect seen"
    NOT_SEEN = "not seen"


WORST = (
    Status.SWALLOWED, Status.OTHER, Status.FAILED, Status.NO_EFFECT, Status.NOT_SEEN, Status.REFUSED,
    Status.HONOURED,
)  # fmt: skip
WRONG = (Status.SWALLOWED, Status.OTHER)


@dataclass(frozen=True)
class Finding:
    """What one move did.

    Attributes:
        methods: Method to what was seen there.
        notes: What else is known, in sentences.
    """

    factor: str
    before: Any
    after: Any
    status: Status
    methods: Mapping[str, str]
    notes: tuple[str, ...] = ()

    def sentence(self) -> str:
        """One line."""
        move = f"{self.factor}: {short(self.before)} → {short(self.after)}"
        return "; ".join([move, *(f"{m}: {text}" for m, text in self.methods.items()), *self.notes])


@dataclass
class Audit:
    """All that was found about a path."""

    path: str
    findings: list[Finding] = field(default_factory=list)
    defaults: list[str] = field(default_factory=list)
    """Defaults that are not what the path reports or documents, in sentences."""
    documented: list[str] = field(default_factory=list)
    """Factors whose default is documented, and was held against the library's."""
    not_known: list[str] = field(default_factory=list)
    """Why defaults could not be read, or not all of them held against what is in effect."""
    not_moved: list[str] = field(default_factory=list)
    """Factors that it honours, and for which no other value is known."""
    seconds: float = 0.0

    def named(self, *statuses: Status) -> list[str]:
        """Factors with one of these statuses, each once."""
        return [*dict.fromkeys(f.factor for f in self.findings if f.status in statuses)]


class Auditor:
    """Audits one path.

    Args:
        engine: Runs captures; those of the controls are found again by the next audit.
        path: As `registry.resolve` takes it.
        changes: Factors in which the small recipe is changed.
        progress: Called with each finding.
    """

    def __init__(
        self,
        engine: Engine,
        path: str,
        changes: Mapping[str, Any] | None = None,
        progress: Callable[[Finding], None] = lambda _: None,
    ) -> None:
        self.engine, self.path, self.progress = engine, path, progress
        self.kind = resolve(path)
        self.base = known_moves.base(self.kind, changes)
        # A release in an environment of its own is another path than the one installed here.
        self.controls = [name for name in CONTROLS if name != path]
        self.documented: list[str] = []
        """Factors whose documented default was held against the library's."""
        self._starts: dict[str, Mapping[str, Any]] = {}

    def audit(self, factors: Iterable[str] = ()) -> Audit:
        """Moves all factors that the path honours, or those of these names or sections."""
        started = time.perf_counter()
        wanted = [*factors]
        chosen = [
            move
            for move in known_moves.moves(self.kind)
            if not wanted or any(known_moves.named(move.factor, name) for name in wanted)
        ]
        result = Audit(self.path)
        for finding in each(self.move, chosen):
            result.findings.append(finding)
            self.progress(finding)
        right = [
            move
            for move, found in zip(chosen, result.findings, strict=True)
            if found.status not in WRONG
        ]
        beside = [move for found in result.findings for move in self._beside(found, right)]
        for finding in each(self.move, beside):
            # The control has no such knob, so that its effect need not be the same.
            if finding.status is Status.SWALLOWED:
                result.findings.append(finding)
                self.progress(finding)
        if not wanted:
            result.defaults, result.not_known = self.defaults()
            result.documented = self.documented
            result.not_moved = known_moves.unmoved(self.kind)
        result.seconds = time.perf_counter() - started
        return result

    def _beside(self, knob: Finding, chosen: Iterable[Move]) -> Iterator[Move]:
        """Moves that a knob may undo: those that show where it does, beside its other value."""
        if knob.status is not Status.HONOURED or not self._is_knob(knob.factor):
            return
        for move in chosen:
            for method in knob.methods.keys() & {*move.methods}:
                if not self._is_knob(move.factor):
                    needs = {**move.needs, knob.factor: knob.after}
                    yield replace(move, methods=(method,), needs=needs)

    def _is_knob(self, factor: str) -> bool:
        """Whether only this path has a factor."""
        sections = {knobs.section for knobs in self.kind.knob_types()}
        return factor.partition(".")[0] in sections

    # One factor ----------------------------------------------------------------------------------

    def move(self, move: Move) -> Finding:
        """What moving one factor does."""
        if self._is_knob(move.factor):
            return self._knob(move)
        before = self.base.override(move.needs)
        after = before.override({move.factor: move.value})
        statuses, texts, notes = [], dict[str, str](), list[str]()
        for method in move.methods:
            if method == "config":
                status, text = self._setting(move.factor, before, after)
            else:
                status, text, control = self._method(move, method, before, after)
                if status in WRONG:
                    swallowed = status is Status.SWALLOWED
                    notes += self._settings_moved(move.factor, before, after, control, swallowed)
            statuses.append(status)
            texts[method] = text
        status = _overall(statuses)
        values = before.factors()[move.factor], after.factors()[move.factor]
        knobs = [f"{name}={short(v)}" for name, v in move.needs.items() if self._is_knob(name)]
        notes = [*(f"beside {knob}" for knob in knobs), *dict.fromkeys(notes)]
        return Finding(move.factor, *values, status, texts, tuple(notes))

    def _method(
        self, move: Move, method: str, before: Recipe, after: Recipe
    ) -> tuple[Status, str, str]:
        """Status, what was seen, and the path that served as control."""
        ours = self._effect(self.path, method, before, after)
        if early := _without_comparison(ours):
            return (*early, "")
        changed = ours.moved()
        for control in self.controls:
            theirs = self._effect(control, method, before, after)
            if not theirs.seen or theirs.blind() or not theirs.moved():
                continue
            if not changed and (unsure := ours.unsteady & {*theirs.moved()}):
                text = f"{_count([*unsure])} that {control} changes do not repeat themselves"
                return Status.NOT_SEEN, text, control
            if not changed:
                text = f"no effect, where {control} changes {_count(theirs.moved())}"
                return Status.SWALLOWED, text, control
            if move.drawn:
                return Status.HONOURED, f"{_count(changed)} changed, on {control} too", control
            apart, why = unlike(method, ours, theirs)
            if apart:
                return Status.OTHER, f"another effect than on {control}: {apart}", control
            alike = f"like {control}" if method in COMPARED else f"names and shapes like {control}"
            like = f"not compared with {control}: {why}" if why else alike
            return Status.HONOURED, f"{_count(changed)} changed, {like}", control
        if changed:
            return Status.HONOURED, f"{_count(changed)} changed", ""
        tried = f", nor on {' or '.join(self.controls)}"
        return Status.NO_EFFECT, f"no effect{tried}: the small recipe may not make it matter", ""

    def _knob(self, move: Move) -> Finding:
        """A factor of this path alone: there is no other path to tell whether it should show."""
        values: tuple[Any, Any] = (None, None)
        still, unseen = dict[str, None](), dict[str, None]()
        for beside in BESIDE:
            before = self.base.override(beside)
            after = before.override({move.factor: move.value})
            values = before.factors()[move.factor], after.factors()[move.factor]
            words = "".join(f" with {name}={value}" for name, value in beside.items())
            for method in move.methods:
                found = self._effect(self.path, method, before, after)
                early = _without_comparison(found)
                if not early and (changed := found.moved()):
                    text = f"{_count(changed)} changed{words}"
                    return Finding(move.factor, *values, Status.HONOURED, {method: text})
                if early and early[0] is not Status.NOT_SEEN:
                    return Finding(move.factor, *values, early[0], {method: early[1] + words})
                if early:
                    unseen[f"{method}{words} ({early[1]})"] = None
                else:
                    still[f"{method}{words}"] = None
        texts = {"no effect in": ", ".join(still)} if still else {}
        if unseen:
            texts["not seen in"] = f"{len(unseen)} others, first {next(iter(unseen))}"
        status = Status.NO_EFFECT if still else Status.NOT_SEEN
        return Finding(move.factor, *values, status, texts)

    def _effect(self, path: str, method: str, before: Recipe, after: Recipe) -> Effect:
        try:
            inputs = given(method, self._start(before))
        except NO_ANSWER as error:
            return Effect(absent=f"no adapter to hand over: {error}")
        return effect(partial(self.engine.capture, path), method, before, after, inputs)

    def _start(self, recipe: Recipe) -> Mapping[str, Any]:
        """Names and shapes of an adapter of a recipe: the path's own, else a control's."""
        needed = recipe.override({"seed.value": 0})
        key = f"{needed.model.source} {needed.lora.model_dump_json()}"
        if key not in self._starts:
            paths = (self.path, *self.controls)
            self._starts[key] = shapes(self.engine, paths, needed)
        return self._starts[key]

    # Settings ------------------------------------------------------------------------------------

    def _setting(self, factor: str, before: Recipe, after: Recipe) -> tuple[Status, str]:
        """What the path reads back of a factor that no number shows."""
        key, value = REQUESTED[factor], after.factors()[factor]
        try:
            first, then = (self._config(self.path, recipe)[key] for recipe in (before, after))
        except Unsupported as error:
            return Status.REFUSED, str(error)
        except KeyError:
            return Status.NOT_SEEN, f"it does not report {TITLES[key]}"
        except (CaptureError, UnmatchedNames) as error:
            return Status.FAILED, str(error)
        if not known(first) or not known(then):
            return Status.NOT_SEEN, short(then)
        if same(key, then, value):
            return Status.HONOURED, f"{short(first)} → {short(then)} is read back"
        if same(key, then, first):
            return Status.SWALLOWED, f"{short(then)} is read back all the same"
        return Status.OTHER, f"{short(then)} is read back"

    def _settings_moved(
        self, factor: str, before: Recipe, after: Recipe, control: str, swallowed: bool
    ) -> list[str]:
        """Settings that are other ones after the move, and which the control's are."""
        found = []
        for path in (self.path, control):
            try:
                old, new = (self._config(path, recipe) for recipe in (before, after))
            except NO_ANSWER as error:
                found.append(f"the settings of {path} are not known: {error}")
                continue
            moved = [
                f"{TITLES[key]}: {short(old[key])} → {short(new[key])}"
                for key in TITLES
                if key in old and key in new and not same(key, old[key], new[key])
                and not key.startswith("batch.")
            ]  # fmt: skip
            what = "; ".join(moved) if moved else "none"
            found.append(f"settings that it moves on {path}: {what}")
            key = REQUESTED.get(factor, "")
            if swallowed and path == self.path and key in new and not same(key, old[key], new[key]):
                found.append(
                    f"what {path} reports of {TITLES[key]} follows the recipe all the same"
                )
        return found

    def _config(self, path: str, recipe: Recipe) -> Mapping[str, Any]:
        return self.engine.capture(path, "config", recipe, Trace()).scalars

    # Defaults ------------------------------------------------------------------------------------

    def _documented(self, reported: Mapping[str, Any]) -> list[str]:
        """Defaults that are documented as another value than the library has."""
        asked = Trace(scalars={"documented": True})
        found = self.engine.capture(self.path, "defaults", self.base, asked).scalars
        self.documented = sorted(found.keys() & reported.keys())
        return [
            f"{factor} is documented as {short(found[factor])}, the library has {short(reported[factor])}"
            for factor in self.documented
            if _plain(found[factor]) != _plain(reported[factor])
        ]

    def defaults(self) -> tuple[list[str], list[str]]:
        """Defaults that are not in effect where nothing is set or documented otherwise; what is not known."""
        try:
            reported = self.engine.capture(self.path, "defaults", self.base, Trace()).scalars
        except (Unsupported, CaptureError) as error:
            return [], [f"the defaults of {self.path} are not known: {error}"]
        wrong = self._documented(reported)
        shipped = self.engine.shipped(self.path, self.base)
        try:
            settings = self._config(self.path, shipped)
        except NO_ANSWER as error:
            return wrong, [f"which defaults are in effect is not known: {error}"]
        factors, active = shipped.factors(), shipped.active()
        for factor, key in REQUESTED.items():
            # Of what a path does not report nothing is claimed: there the recipe's own default stands.
            if factor not in active.keys() & reported.keys() or not known(
                real := settings.get(key, "unknown")
            ):
                continue
            if not same(key, factors[factor], real):
                wrong.append(
                    f"as shipped {factor} is {short(factors[factor])}, and {short(real)} is in effect"
                )
        return wrong, []


def _without_comparison(found: Effect) -> tuple[Status, str] | None:
    """The status of what gave nothing to compare."""
    if found.absent:
        return Status.NOT_SEEN, found.absent
    if found.refused:
        return Status.REFUSED, found.refused
    if found.failed:
        return Status.FAILED, found.failed
    if found.blind():
        return Status.NOT_SEEN, "it does not repeat itself"
    return None


def _overall(statuses: list[Status]) -> Status:
    """The worst, where what one method does not show another may."""
    seen = [status for status in statuses if status is not Status.NOT_SEEN]
    return min(seen, key=WORST.index, default=Status.NOT_SEEN)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _count(names: list[str]) -> str:
    return f"{len(names)} array{'s' * (len(names) != 1)}"
