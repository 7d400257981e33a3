"""What a stage is given and what it concludes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Protocol

import numpy as np

from parity.errors import CaptureError, Unsupported
from parity.judge.numerics import Noise, compare, perturb
from parity.recipe import Recipe
from parity.record import Metric
from parity.stages.inputs import OPTIMIZES, REDUCES, loss_inputs, nudged, sorted_logits
from parity.trace import Array, Trace


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
class Pair:
    """Both sides' traces of one capture, and what is measured around the reference on demand."""

    subject: Trace
    reference: Trace
    exact: bool
    _referee: Callable[[], Trace | None]
    _perturbed: Callable[[], Trace | None]
    _own: Callable[[], Trace | None]
    _reduction: Callable[[], float]

    @cached_property
    def referee(self) -> Trace | None:
        """The float64 run of the same thing, or None where there is none."""
        return self._referee()

    @cached_property
    def perturbed(self) -> Trace | None:
        """The reference with its input moved by one ulp, or None."""
        return self._perturbed()

    @cached_property
    def own(self) -> Trace | None:
        """The subject with its input moved likewise, in half precision, or None."""
        return self._own()

    @cached_property
    def noise(self) -> Noise:
        """The noise around the reference, by array name."""
        return self.noise_of("")

    def noise_of(self, group: str) -> Noise:
        """The noise of one group of arrays, by name inside the group.

        Within one framework nothing is measured unless bits differ: then the referee tells which
        side is off.
        """

        def arrays(trace: Trace | None) -> Mapping[str, Array]:
            if trace is None:
                return {}
            return trace.group(group) if group else trace.arrays

        if self.exact and self._equal(group):
            return Noise(exact=True)
        if self.exact:
            return Noise(True, arrays(self.referee), arrays(self.perturbed))
        ours, moved = arrays(self.subject), arrays(self.own)
        own = {
            name: np.abs(ours[name].astype(np.float64) - value)
            for name, value in moved.items()
            if name in ours and ours[name].shape == value.shape and value.dtype.kind == "f"
        }
        return Noise(False, arrays(self.referee), arrays(self.perturbed), own, self._reduction())

    def _equal(self, group: str) -> bool:
        a, b = (t.group(group) if group else t.arrays for t in (self.subject, self.reference))
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
        capture: Runs one method of one side.
        both: Runs one method on both sides at once.
    """

    recipe: Recipe
    recipes: Mapping[str, Recipe]
    shipped: Mapping[str, Recipe]
    frameworks: Mapping[str, str]
    operations: Mapping[str, str]
    environments: dict[str, dict[str, Any]]
    files: dict[str, None]
    has_referee: bool
    capture: Capture
    both: Callable[..., tuple[Trace, Trace]]

    @property
    def exact(self) -> bool:
        """Whether both sides do the same operations in the same framework."""
        return all(
            side["subject"] == side["reference"] for side in (self.frameworks, self.operations)
        )

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
        """Size of the reference's vocabulary."""
        texts = Trace(scalars={"texts": [], "conversations": []})
        return int(self.given("tokenization", texts).scalars["vocab_size"])

    def given(self, method: str, inputs: Trace | None = None) -> Trace:
        """What both sides are to be handed: emitted by the reference under the shared recipe."""
        return self.capture("reference", method, self.recipe, inputs or Trace())

    def pair(self, method: str, inputs: Trace, changes: Mapping[str, Any] | None = None) -> Pair:
        """Runs a method on both sides with equal inputs."""
        recipes = {side: recipe.override(changes or {}) for side, recipe in self.recipes.items()}
        subject, reference = self.both(method, recipes, inputs)

        def referee() -> Trace | None:
            if not self.has_referee:
                return None
            return self._optional("referee", method, recipes["referee"], inputs)

        def perturbed() -> Trace | None:
            return self.moved("reference", method, recipes["reference"], inputs)

        def own() -> Trace | None:
            half = recipes["subject"].model.dtype in ("bfloat16", "float16")
            return self.moved("subject", method, recipes["subject"], inputs) if half else None

        def reduction() -> float:
            if method == "cross_entropy":
                return self.order_noise()
            return self.loss_noise() if method in REDUCES else 0.0

        return Pair(subject, reference, self.exact, referee, perturbed, own, reduction)

    def loss_inputs(self) -> Trace:
        """Logits and targets of stage 03, seeded by the cell."""
        return loss_inputs(self.rng(3), self.vocabulary)

    def loss_noise(self) -> float:
        """How much of a loss, or relatively of a gradient, the rounding of the loss explains.

        Later stages inherit it from stage 03, measured on its inputs: how much the cross-entropy
        depends on the order of its sum, and, if 03 finds both sides in agreement, how far a token's
        loss typically (root mean square) is apart.
        """
        noise = self.order_noise()
        try:
            pair = self.pair("cross_entropy", self.loss_inputs())
            ours, theirs = (t.arrays["token_loss"] for t in (pair.subject, pair.reference))
            if compare("token_loss", ours, theirs, pair.noise).verdict.green:
                rms = np.sqrt(np.mean((ours - theirs).astype(np.float64) ** 2))
                noise = max(noise, float(rms))
        except (Unsupported, CaptureError, KeyError):
            pass
        return noise

    def order_noise(self) -> float:
        """How much the logarithm of a softmax's normaliser depends on the order of its sum.

        The same logits are handed over with the vocabulary sorted: the same cross-entropy, summed in
        another order. What differs is rounding. MLX on the CPU keeps one running sum: 5e-7 at 512
        entries, 5e-5 at 49,152, where torch has 1e-6.
        """
        inputs = self.loss_inputs()
        noise = 0.0
        for side in ("subject", "reference"):
            recipe = self.recipes[side]
            try:
                losses = [
                    self.capture(side, "cross_entropy", recipe, given).arrays["token_loss"]
                    for given in (inputs, sorted_logits(inputs))
                ]
            except (Unsupported, CaptureError, KeyError):
                continue
            noise = max(noise, float(np.abs(losses[0] - losses[1]).max()))
        return noise

    def moved(self, side: str, method: str, recipe: Recipe, inputs: Trace) -> Trace | None:
        """One side with its inputs moved by one ulp, or None where nothing can be moved."""
        rng = np.random.default_rng(self.seed)
        # Optimizers work on float32 weights whatever the model computes in.
        dtype = "float32" if method == "optimizer_step" else recipe.model.dtype
        arrays = {name: perturb(v, rng, dtype) for name, v in inputs.arrays.items()}
        moved = nudged(recipe) if method in OPTIMIZES else recipe
        if moved is recipe and all(arrays[n] is v for n, v in inputs.arrays.items()):
            return None
        return self._optional(side, method, moved, Trace(arrays, inputs.scalars))

    def _optional(self, side: str, method: str, recipe: Recipe, inputs: Trace) -> Trace | None:
        try:
            return self.capture(side, method, recipe, inputs)
        except (Unsupported, CaptureError):
            return None


class Stage(Protocol):
    """One numbered question."""

    number: ClassVar[int]
    name: ClassVar[str]
    question: ClassVar[str]

    def run(self, context: Context) -> Comparison:
        """Captures from both sides and compares."""
