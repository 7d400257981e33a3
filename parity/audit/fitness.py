"""Whether a path is fit to be judged: asked of the path alone, on a tiny model."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from typing import Any

from parity.audit import alarm, alarm_torch
from parity.audit import moves as known_moves
from parity.audit.audit import CONTROLS
from parity.audit.concurrent import each
from parity.audit.effects import Effect, difference, effect
from parity.audit.inputs import given, shapes
from parity.capture.engine import Engine
from parity.errors import NO_ANSWER, CaptureError, UnmatchedNames, Unsupported, UsageError
from parity.paths.contract import METHODS
from parity.paths.measured import known
from parity.paths.registry import resolve, takes_parts
from parity.recipe import Recipe
from parity.stages.settings import TITLES, short
from parity.trace import Trace

NOT_ASKED = ("load_adapter", "defaults", "config")
"""Methods that need a saved adapter, or are looked at by themselves."""
REPEATED = ("batches", "lora_init", "gradient", "optimizer_step", "train")


class State(StrEnum):
    """What a check came to."""

    GOOD = "good"
    WRONG = "wrong"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    title: str
    state: State
    text: str


@dataclass
class Fitness:
    """All checks of a path."""

    path: str
    checks: list[Check] = field(default_factory=list)
    stages: list[str] = field(default_factory=list)
    """Stages that it can be judged at."""
    seconds: float = 0.0

    def wrong(self) -> list[Check]:
        """Checks that it did not pass."""
        return [check for check in self.checks if check.state is State.WRONG]


class Examiner:
    """Looks at one path.

    Args:
        engine: Runs captures.
        path: As `registry.resolve` takes it.
        progress: Called with each check.
    """

    def __init__(
        self, engine: Engine, path: str, progress: Callable[[Check], None] = lambda _: None
    ) -> None:
        self.engine, self.path, self.progress = engine, path, progress
        self.kind = resolve(path)
        self.recipe = known_moves.base(self.kind)
        self._start: Mapping[str, Any] = {}

    def examine(self) -> Fitness:
        """All checks, in the order in which they are reported."""
        started = time.perf_counter()
        found = Fitness(self.path)
        with contextlib.suppress(
            Unsupported, CaptureError, UnmatchedNames
        ):  # the contract names it
            self._start = shapes(self.engine, (self.path, *CONTROLS), self.recipe)
        for check in self._checks(found):
            found.checks.append(check)
            self.progress(check)
        found.seconds = time.perf_counter() - started
        return found

    def _checks(self, found: Fitness) -> Iterator[Check]:
        yield from self._contract(found)
        yield from self._repeats()
        yield from self._seed()
        yield from self._settings()
        yield from self._parts()
        yield self._bare()

    def _capture(self, method: str, changes: Mapping[str, Any] | None = None) -> Trace:
        recipe = self.recipe.override(changes or {})
        return self.engine.capture(self.path, method, recipe, given(method, self._start))

    def _effect(self, method: str, after: Recipe) -> Effect:
        run = partial(self.engine.capture, self.path)
        return effect(run, method, self.recipe, after, given(method, self._start))

    # Contract, repeats and seed ------------------------------------------------------------------

    def _contract(self, found: Fitness) -> Iterator[Check]:
        """Each method once: what it gives is held against the contract where it runs."""

        def attempt(method: str) -> Exception | None:
            try:
                self._capture(method)
            except (*NO_ANSWER, UsageError) as error:
                return error
            return None

        asked = [name for name in METHODS if name not in NOT_ASKED]
        absent: dict[str, str] = {}
        for name, error in zip(asked, each(attempt, asked), strict=True):
            if error is None:
                if METHODS[name].stage:
                    found.stages.append(METHODS[name].stage)
            elif isinstance(error, Unsupported):
                absent[name] = str(error)
            else:
                yield Check("contract", State.WRONG, str(error))
        stages = ", ".join(found.stages) or "none"
        state = State.GOOD if found.stages else State.WRONG
        yield Check("contract", state, f"stages that it can be judged at: {stages}")
        if absent:
            first, why = next(iter(absent.items()))
            words = f"it does not run {', '.join(absent)} ({first}: {why[:200]})"
            yield Check("contract", State.UNKNOWN, words)

    def _repeats(self) -> Iterator[Check]:
        effects = each(lambda method: self._effect(method, self.recipe), REPEATED)
        equal = []
        for method, repeated in zip(REPEATED, effects, strict=True):
            if repeated.before is None:
                continue
            if unsteady := sorted(repeated.unsteady):
                yield Check(
                    "repeats",
                    State.WRONG,
                    f"two runs of {method} differ in {len(unsteady)} arrays, first {unsteady[0]}",
                )
            else:
                equal.append(method)
        if equal:
            yield Check("repeats", State.GOOD, f"bit for bit: {', '.join(equal)}")

    def _seed(self) -> Iterator[Check]:
        """Whether another seed draws another adapter, and another order of the data."""
        for method, what in (("lora_init", "adapter"), ("batches", "order of the data")):
            other = self.recipe.override({"seed.value": 5})
            found = self._effect(method, other)
            if not found.seen:
                reason = found.absent or found.refused or found.failed
                yield Check("seed", State.UNKNOWN, f"of the {what} nothing is known: {reason}")
            elif found.unsteady:
                words = (
                    f"one seed gives another {what} each time, so that it is not known what it does"
                )
                yield Check("seed", State.UNKNOWN, words)
            elif found.moved():
                yield Check("seed", State.GOOD, f"another seed gives another {what}")
            else:
                words = f"seeds {self.recipe.seed.value} and 5 give one {what}, bit for bit"
                yield Check("seed", State.WRONG, words)

    # Settings ------------------------------------------------------------------------------------

    def _settings(self) -> Iterator[Check]:
        try:
            settings = self._capture("config").scalars
        except Unsupported as error:
            yield Check("settings", State.UNKNOWN, f"none is reported: {error}")
            return
        except (CaptureError, UnmatchedNames) as error:
            yield Check("settings", State.WRONG, str(error))
            return
        values = {key: settings[key] for key in TITLES if key in settings}
        unknown = {key: value for key, value in values.items() if not known(value)}
        lacking = [title for key, title in TITLES.items() if key not in settings]
        owner = next(base for base in self.kind.__mro__ if "config" in vars(base))
        own = not owner.__module__.startswith("parity.")
        how = (
            f"by `config` of {owner.__module__}: whether they are what it does, `parity audit` sees"
            if own
            else "read from live objects or found by what it does"
        )
        counted = f"{len(values) - len(unknown)} of {len(TITLES)} are known, {how}"
        yield Check("settings", State.UNKNOWN if own else State.GOOD, counted)
        for key, value in unknown.items():
            yield Check("settings", State.UNKNOWN, f"{TITLES[key]}: {short(value)}")
        if lacking:
            yield Check("settings", State.UNKNOWN, f"not reported: {', '.join(lacking)}")

    # Parts ---------------------------------------------------------------------------------------

    def _parts(self) -> Iterator[Check]:
        """Whether each part that could be swapped is taken from where a hybrid puts another."""
        takes = takes_parts(self.path)
        written = alarm.METHODS.get(self.kind.framework, alarm.METHODS["mlx"])
        if fixed := [part for part in written if part not in takes]:
            words = f"{', '.join(fixed)} cannot be swapped: no search names them as a cause"
            yield Check("parts", State.UNKNOWN, words)
        taken = [part for part in written if part in takes]
        # A hybrid of a path that changes its libraries has a process of its own: several at once.
        for part, (state, text) in zip(taken, each(self._part, taken), strict=True):
            methods = written[part]
            owner = next(b for b in self.kind.__mro__ if any(m in vars(b) for m in methods))
            whose = "its own" if owner is self.kind else f"that of {owner.__name__}"
            yield Check("parts", state, f"{part}: {whose}, {text}")

    def _part(self, part: str) -> tuple[State, str]:
        changes: dict[str, Any] = {"train.steps": 1}
        if part == "clip":
            changes |= {"optim.clip": "norm"}
        donor = alarm_torch.SPEC if self.kind.framework == "torch" else alarm.SPEC
        spec = f"{self.path}+{part}={donor}"
        method = alarm.USED_IN.get(part, "train")
        where = "training" if method == "train" else method
        try:
            recipe = known_moves.base(resolve(spec), changes)
            handed = Trace()
            if part in alarm.USED_IN:
                handed = given(method, shapes(self.engine, [self.path], recipe))
            self.engine.capture(spec, method, recipe, handed)
        except Unsupported as error:
            if alarm.called(part) in str(error):
                return State.GOOD, f"and used in {where}"
            return State.UNKNOWN, f"whether it is used could not be seen: {error}"
        except (CaptureError, UnmatchedNames, UsageError) as error:
            return State.UNKNOWN, f"whether it is used could not be seen: {error}"
        return State.WRONG, (
            f"and not used in {where}, which does not take it from self.part({part!r}), "
            "so that a hybrid would keep the path's and be named after another"
        )

    # The bare trainer ----------------------------------------------------------------------------

    def _bare(self) -> Check:
        """The adapter of the watched training against that of the trainer as it is left alone."""
        try:
            watched = self._capture("train").group("adapter")
            bare = self._capture("train_and_load").group("trained")
        except NO_ANSWER as error:
            return Check("watched", State.UNKNOWN, f"no bare training to compare with: {error}")
        if found := difference(Trace(watched), Trace(bare)):
            return Check(
                "watched", State.WRONG, f"watched and bare training end in other adapters: {found}"
            )
        text = f"watched and bare training end in the same bytes, {len(bare)} tensors"
        return Check("watched", State.GOOD, text)
