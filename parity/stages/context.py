"""What a stage is given and what it concludes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any, ClassVar, Protocol

import numpy as np

from parity.errors import CaptureError, MissingCapture, UnmatchedNames, Unsupported
from parity.judge import noise as sources
from parity.judge.noise import REPEATS, perturb, running_sum_error
from parity.names import each
from parity.paths.contract import METHODS
from parity.recipe import Recipe
from parity.record import Metric, Verdict
from parity.stages.inputs import OPTIMIZES, REDUCES, loss_inputs, nudged
from parity.stages.pair import Extent, Measured, Pair
from parity.trace import Trace


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
        extent: How much is asked.
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
    extent: Extent = Extent.RECORD
    notes: dict[str, None] = field(default_factory=dict)
    """Filled with what is to be known of the inputs, in sentences."""

    def decided(self, result: Comparison) -> bool:
        """Whether what is asked is known, though there is more to compare."""
        gates = (metric for metric in result.metrics if metric.gate)
        return self.extent <= Extent.VERDICT and any(
            metric.verdict is Verdict.DIVERGE for metric in gates
        )

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
        reads = METHODS[method].read
        compiles, trains = reads("train.compile", inputs), reads("train.steps", inputs)
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
            # What does not read whether a step is compiled runs none that is.
            compiled_apart=lambda: compiles and self.compiled_apart,
            trains=trains,
            extent=self.extent,
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
