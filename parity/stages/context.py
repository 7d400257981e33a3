"""What a stage is given and what it concludes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np

from parity.errors import CaptureError, MissingCapture, UnmatchedNames, Unsupported
from parity.judge import noise as sources
from parity.judge.noise import REPEATS, Noise, Sources, perturb, running_sum_error
from parity.names import each
from parity.recipe import Recipe
from parity.record import Metric
from parity.stages.inputs import OPTIMIZES, REDUCES, loss_inputs, nudged
from parity.trace import Array, Trace

ROUNDED = "the referee's implementation in the recipe's dtype"
APART = "one side alone compiles its step, and"


@dataclass
class Comparison:
    """What a stage found; the engine makes a record of it."""

    metrics: list[Metric] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
    hints: list[str] = field(default_factory=list)
    series: dict[str, list[float]] = field(default_factory=dict)
    passes: dict[str, dict[str, bool]] = field(default_factory=dict)
    facts: dict[str, float] = field(default_factory=dict)
    """Numbers that no verdict depends on; `parity.judge.hints` reads them."""


class Capture(Protocol):
    """Runs one method of one side; results are cached by content."""

    def __call__(self, side: str, method: str, recipe: Recipe, inputs: Trace) -> Trace:
        """A trace of `subject`, `reference` or `referee`."""


class Measured(NamedTuple):
    """A trace that a floor is measured with, or why there is none."""

    trace: Trace | None
    reason: str = ""


@dataclass(frozen=True)
class Pair:
    """Both sides' traces of one capture, and what is measured around the reference on demand.

    `measure` gives, by source of noise: the float64 run, the same implementation in the recipe's
    dtype (`ROUNDED`), the reference with its inputs moved, a repeat of either side.
    """

    subject: Trace
    reference: Trace
    exact: bool
    rounded_is_reference: bool
    model_dtype: str
    half: bool
    main: str
    measure: Callable[[str], Measured]
    reduction: Callable[[], float]
    compiled_apart: Callable[[], bool] = lambda: False
    """Whether only one side compiles its step."""
    _measured: dict[str, Measured] = field(default_factory=dict)
    _noises: dict[str, Noise] = field(default_factory=dict)

    def measured(self, source: str) -> Measured:
        """What a source gives, measured when first asked for."""
        if source not in self._measured:
            self._measured[source] = self.measure(source)
        return self._measured[source]

    @property
    def noise(self) -> Noise:
        """The noise around the reference, by array name."""
        return self.noise_of("")

    def noise_of(self, group: str) -> Noise:
        """The noise of one group of arrays, by name inside the group.

        Within one framework nothing is measured unless bits differ. Then each side is run once more:
        if both repeat themselves bits decide, and the float64 run tells which side is off; if one
        does not, the floor does. It does as well where one side alone compiles its step and the
        compiler moves bits of the reference on this device, as it may on a GPU, or where that could
        not be measured.
        """
        if group not in self._noises:
            self._noises[group] = self._noise(group)
        return self._noises[group]

    def _noise(self, group: str) -> Noise:
        if not self.exact:
            return self._measured_noise(group)
        if _equal(_arrays(self.subject, group), _arrays(self.reference, group)):
            equal = dict.fromkeys(
                (sources.REFEREE, sources.PERTURBED), "not measured: bits are equal"
            )
            return Noise(exact=True, absent=equal)
        repeats, why, absent = self._repeats(group)
        if why:
            return replace(self._measured_noise(group, absent), repeats=repeats, why_floor=why)
        referee = self._trace(sources.REFEREE, absent)
        absent[sources.REFEREE] = absent.get(sources.REFEREE, "not asked for: bits decide")
        return Noise(
            exact=True,
            referee=_arrays(referee, group),
            rounded_is_reference=False,
            perturbed=_arrays(self._trace(sources.PERTURBED, absent), group),
            dtype=self.dtype,
            absent=absent,
        )

    def rounding(self, name: str) -> Sources:
        """The sources of one array of the reference, also where bits are what counts.

        Where the float64 run is another implementation than the reference it is not asked for.
        """
        value = self.reference.arrays[name]
        if self.rounded_is_reference:
            return self._measured_noise("").sources(name, value)
        moved, reason = self.measured(sources.PERTURBED)
        absent = {
            sources.PERTURBED: reason,
            sources.REFEREE: "not measured: it is another implementation than the reference",
        }
        return Noise(False, perturbed=_arrays(moved, ""), dtype=self.dtype, absent=absent).sources(
            name, value
        )

    @property
    def dtype(self) -> str:
        """What the reference declares that its arrays were computed in, no coarser than the recipe's.

        Empty: the arrays' own.
        """
        declared = str(self.reference.scalars.get("dtype", ""))
        if sources.EPS.get(declared, 0.0) > sources.EPS[self.model_dtype]:
            return self.model_dtype
        return declared

    def _measured_noise(self, group: str, absent: Mapping[str, str] | None = None) -> Noise:
        reasons = dict(absent or {})
        rounded = self.reference if self.rounded_is_reference else self._trace(ROUNDED, reasons)
        return Noise(
            exact=False,
            referee=_arrays(self._trace(sources.REFEREE, reasons), group),
            rounded=_arrays(rounded, group),
            rounded_is_reference=self.rounded_is_reference,
            perturbed=_arrays(self._trace(sources.PERTURBED, reasons), group),
            reduction=self.reduction(),
            dtype=self.dtype,
            half=self.half,
            absent=reasons,
            main=self.main,
        )

    def _trace(self, source: str, absent: dict[str, str]) -> Trace | None:
        trace, reason = self.measured(source)
        if trace is None:
            # Without it the distance to the float64 run is not known.
            absent.setdefault(sources.REFEREE if source == ROUNDED else source, reason)
        return trace

    def _repeats(self, group: str) -> tuple[dict[str, Mapping[str, Array]], str, dict[str, str]]:
        """By source how far a side is from itself, why the floor decides, and runs that failed."""
        moved: dict[str, Mapping[str, Array]] = {}
        why: list[str] = []
        absent: dict[str, str] = {}
        runs = [
            (REPEATS[side], trace, f"the {side} does not repeat itself bit for bit on this device")
            for side, trace in (("reference", self.reference), ("subject", self.subject))
        ]
        if self.compiled_apart():
            reason = f"{APART} that moves bits on this device"
            runs.append((sources.COMPILED, self.reference, reason))
        for source, trace, reason in runs:
            again = self._trace(source, absent)
            ours, theirs = _arrays(trace, group), _arrays(again, group)
            if again is None and source == sources.COMPILED:
                why.append(
                    f"{APART} whether that moves bits could not be measured ({absent[source]})"
                )
            if again is None or _equal(ours, theirs):
                continue
            moved[source] = {
                name: np.abs(value.astype(np.float64) - theirs[name])
                for name, value in ours.items()
                if name in theirs and theirs[name].shape == value.shape and value.dtype.kind == "f"
            }
            why.append(reason)
        return moved, " and ".join(why), absent


def _arrays(trace: Trace | None, group: str) -> Mapping[str, Array]:
    if trace is None:
        return {}
    return trace.group(group) if group else trace.arrays


def _equal(a: Mapping[str, Array], b: Mapping[str, Array]) -> bool:
    return a.keys() == b.keys() and all(
        np.array_equal(a[name], b[name], equal_nan=a[name].dtype.kind == "f") for name in a
    )


@dataclass(frozen=True)
class Context:
    """One cell: two sides with their recipes, one seed.

    Attributes:
        recipe: The recipe both sides share; inputs are made from it.
        recipes: The recipe of each side (and of the referee), which a search may have changed.
        shipped: Each side's recipe with its own defaults.
        frameworks: The framework of each side.
        operations: What each side computes otherwise than usual in its framework at this stage.
        environments: Filled with the environment that each side's traces come from.
        files: Filled with the files of the traces, in the order of their use.
        has_referee: Whether there is a float64 run beside the reference.
        rounded_is_reference: Whether the reference is the implementation that runs in float64.
        capture: Runs one method of one side.
        again: Runs it once more: what it gives is no copy of what it gave before.
        both: Runs one method on both sides at once.
        own_factors: Factors that the code of either side decides: no value but the recipe's is asked for.
        deciding: Leave out what no verdict depends on, such as each path as it is shipped.
    """

    recipe: Recipe
    recipes: Mapping[str, Recipe]
    shipped: Mapping[str, Recipe]
    frameworks: Mapping[str, str]
    operations: Mapping[str, str]
    environments: dict[str, dict[str, Any]]
    files: dict[str, None]
    has_referee: bool
    rounded_is_reference: bool
    capture: Capture
    again: Capture
    both: Callable[..., tuple[Trace, Trace]]
    own_factors: tuple[str, ...] = ()
    deciding: bool = False
    notes: dict[str, None] = field(default_factory=dict)
    """Filled with what is to be known of the inputs, in sentences."""

    @property
    def exact(self) -> bool:
        """Whether both sides do the same operations in the same framework."""
        both = self.frameworks, self.operations
        return all(found["subject"] == found["reference"] for found in both)

    @property
    def operations_aside(self) -> str:
        """Why two paths of one framework are not expected bit-identical; empty elsewhere."""
        if self.exact or len(set(self.frameworks.values())) > 1:
            return ""
        return "; ".join(filter(None, self.operations.values()))

    @property
    def seed(self) -> int:
        """The seed of the cell."""
        return self.recipe.seed.value

    def rng(self, stage: int) -> np.random.Generator:
        """The generator of a stage's inputs."""
        return np.random.default_rng([self.seed, stage])

    @cached_property
    def vocabulary(self) -> int:
        """Tokens that the reference's tokenizer and its model both have.

        Raises:
            Unsupported: A training row has a token that the model has not.
        """
        texts = Trace(scalars={"texts": [], "conversations": []})
        tokens = self.given("tokenization", texts)
        size = int(tokens.scalars["vocab_size"])
        rows = [int(row.max(initial=0)) for row in each(tokens.arrays, "row")]
        known = int(tokens.scalars.get("embedded", size))
        if (greatest := max(rows, default=0)) >= known:
            raise Unsupported(
                f"a training row has token id {greatest}, the model has {known} tokens: its "
                "tokenizer is of another model (model.source)"
            )
        return min(size, known)

    def given(self, method: str, inputs: Trace | None = None) -> Trace:
        """What both sides are to be handed: emitted by the reference under the shared recipe.

        Rows of a reference that cannot show its tokens one by one are those of the subject: they are
        inputs here, and not compared.
        """
        try:
            return self.capture("reference", method, self.recipe, inputs or Trace())
        except Unsupported:
            if method != "tokenization":
                raise
            found = self.capture("subject", method, self.recipe, inputs or Trace())
            self.notes["training rows are handed over as the subject tokenizes them"] = None
            return found

    def pair(self, method: str, inputs: Trace, changes: Mapping[str, Any] | None = None) -> Pair:
        """Runs a method on both sides with equal inputs."""
        recipes = {side: recipe.override(changes or {}) for side, recipe in self.recipes.items()}
        subject, reference = self.both(method, recipes, inputs)

        def measure(source: str) -> Measured:
            if source == sources.PERTURBED:
                return self.moved("reference", method, recipes["reference"], inputs)
            if source == sources.REFEREE and not self.has_referee:
                return Measured(None, "the reference runs in float64 itself")
            if source == sources.COMPILED:
                other = recipes["reference"]
                flipped = other.override({"train.compile": not other.train.compile})
                return measured(self.capture, "reference", method, flipped, inputs)
            if source in REPEATS.values():
                try:
                    side = next(side for side, name in REPEATS.items() if name == source)
                    return measured(self.again, side, method, recipes[side], inputs)
                except MissingCapture:
                    return Measured(None, "a bundle cannot be run again")
            recipe = recipes["referee" if source == sources.REFEREE else "reference"]
            return measured(self.capture, "referee", method, recipe, inputs)

        @cache
        def reduction() -> float:
            if method not in REDUCES:
                return 0.0
            # Later stages inherit it from stage 03, measured on its logits.
            logits = inputs.arrays.get("logits")
            logits = self.loss_inputs().arrays["logits"] if logits is None else logits
            return running_sum_error(logits, recipes["reference"].model.dtype)

        main = sources.REFEREE if self.has_referee else ""
        computed = recipes["reference"]
        dtype = computed.model.dtype
        return Pair(
            subject,
            reference,
            exact=self.exact,
            rounded_is_reference=self.rounded_is_reference,
            model_dtype=dtype,
            half=dtype in sources.HALF or computed.train.autocast in sources.HALF,
            main=main,
            measure=measure,
            reduction=reduction,
            compiled_apart=lambda: self.compiled_apart,
        )

    @cached_property
    def compiled_apart(self) -> bool:
        """Whether only one side compiles its step, read from live objects."""
        empty = Trace()
        traces = (
            measured(self.capture, side, "config", self.recipes[side], empty).trace
            for side in ("subject", "reference")
        )
        found = {t.scalars.get("train.compile") if t is not None else None for t in traces}
        return found == {True, False}

    def loss_inputs(self) -> Trace:
        """Logits and targets of stage 03, seeded by the cell."""
        return loss_inputs(self.rng(3), self.vocabulary)

    def moved(self, side: str, method: str, recipe: Recipe, inputs: Trace) -> Measured:
        """One side with its inputs moved by one ulp."""
        rng = np.random.default_rng(self.seed)
        # Optimizers work on float32 weights whatever the model computes in.
        dtype = "float32" if method == "optimizer_step" else recipe.model.dtype
        arrays = {name: perturb(v, rng, dtype) for name, v in inputs.arrays.items()}
        moved = nudged(recipe) if method in OPTIMIZES else recipe
        if moved is recipe and all(arrays[n] is v for n, v in inputs.arrays.items()):
            return Measured(None, "nothing that is handed over can be moved by one ulp")
        return measured(self.capture, side, method, moved, Trace(arrays, inputs.scalars))


def measured(run: Capture, side: str, method: str, recipe: Recipe, inputs: Trace) -> Measured:
    """A capture that a verdict can do without, or the reason why there is none."""
    try:
        return Measured(run(side, method, recipe, inputs))
    except Unsupported as error:
        return Measured(None, f"it cannot be run: {error}")
    except (CaptureError, UnmatchedNames) as error:
        return Measured(None, f"it failed: {error}")


class Stage(Protocol):
    """One numbered question."""

    number: ClassVar[int]
    name: ClassVar[str]
    question: ClassVar[str]

    def run(self, context: Context) -> Comparison:
        """Captures from both sides and compares."""
