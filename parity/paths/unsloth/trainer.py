"""The real `MLXTrainer.train()`, run and watched.

Its step is compiled, so that Python sees nothing of it. What it computes leaves in its optimizer's
state, which is among the outputs of the step; what it says of it in its callbacks is held against
that.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np

from parity.errors import Unsupported, WrongChannel
from parity.names import canonical
from parity.paths.mlx import live as _mlx
from parity.paths.mlx.live import Batch, Loss, to_numpy
from parity.paths.unsloth.library import PACKAGE, Library, handed
from parity.paths.unsloth.settings import training
from parity.recipe import Recipe
from parity.trace import Array

CLIPS = ("_clip_grad_by_value", "_clip_grad_by_leaf_norm", "_clip_grad_norm_fp32")
LOSSES = ("make_baseline_loss_fn", "make_cce_loss_fn")
SAID = 1e-5, 1e-3
"""Relative distance of a callback's loss and gradient norm from what was carried out.

Its loss is a product with the tokens divided by them again; its norm one running float32 sum.
"""


@dataclass
class Foreign:
    """Parts of another stack that stand in the place of the trainer's own."""

    loss: Loss | None = None
    optimizer: Any = None
    clip: Callable[[Any], Any] | None = None
    clips: bool = False
    """Whether the clip is another stack's; that of a stack that does not clip is None."""


@dataclass
class Run:
    """What left the steps, by optimizer step, and what the trainer returned at its end."""

    micro_losses: list[Array] = field(default_factory=list)
    micro_tokens: list[Array] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    reports: list[tuple[Any, ...]] = field(default_factory=list)
    weights: list[dict[str, Array]] = field(default_factory=list)
    updates: list[dict[str, Array]] = field(default_factory=list)
    """With fed gradients: the weights after each step, and what its optimizer was given."""
    gradient: dict[str, Array] = field(default_factory=dict)
    """If asked for: the last gradient before any clip."""
    outcome: Mapping[str, Any] = field(default_factory=dict)
    optimizer: Any = None
    trainer: Any = None

    def check(self, steps: int, half: bool) -> None:
        """Refuses a run whose channels contradict each other or cannot be what they should be.

        Raises:
            WrongChannel: With the channel and the step.
        """
        counts = {"callbacks": len(self.reports), "gradient norms": len(self.norms)}
        if wrong := {name: n for name, n in counts.items() if n != steps}:
            raise WrongChannel(f"{steps} steps were trained, but there are {wrong}")
        for step, said in enumerate(self.reports):
            losses, tokens = self.micro_losses[step], self.micro_tokens[step]
            carried = np.average(losses, weights=tokens), self.norms[step]
            for name, ours, theirs, slack in zip(
                ("loss", "gradient norm"), carried, (said[2], said[8]), SAID, strict=True
            ):
                slack = 2e-2 if half and name != "loss" else slack
                if theirs is not None and not np.isclose(
                    ours, theirs, rtol=slack, atol=0, equal_nan=True
                ):
                    raise WrongChannel(
                        f"{name} of step {step + 1}: the trainer reports {theirs:.9g}, "
                        f"but {ours:.9g} left its step"
                    )
        moved = any(said[3] for said in self.reports)
        if steps >= 3 and moved and len(set(self.norms)) == 1:
            raise WrongChannel(
                f"the gradient norm is {self.norms[0]:.9g} at each of {steps} steps: "
                "this is no gradient norm"
            )


class Watch:
    """Entries of an optimizer's state by which losses, tokens and gradient norms leave a step."""

    _LOSSES, _TOKENS, _NORM = "parity_losses", "parity_tokens", "parity_norm"
    _GRADIENT, _UPDATE = "parity_gradient", "parity_update"

    def __init__(self, parts: int, gradients: bool = False, updates: bool = False) -> None:
        self.parts, self.gradients, self.updates = parts, gradients, updates
        self.state: Any = {}
        self._noted = False

    def attach(self, optimizer: Any) -> Any:
        """Makes the entries before the step is compiled: its inputs must not change later."""
        import mlx.core as mx

        self.state = optimizer.state
        self.state[self._LOSSES] = mx.zeros(self.parts)
        self.state[self._TOKENS] = mx.zeros(self.parts)
        self.state[self._NORM] = mx.array(float("nan"))
        inner = optimizer.apply_gradients

        def apply_gradients(gradient: Any, parameters: Any) -> Any:
            self.note(gradient)
            if self.updates:
                self.state[self._UPDATE] = dict(_mlx.flat(gradient))
            return inner(gradient, parameters)

        optimizer.apply_gradients = apply_gradients
        return optimizer

    def scored(self, loss: Any, tokens: Any, gradient: Any) -> None:
        """One micro-batch; of a step of one the gradient is at hand here."""
        import mlx.core as mx

        for name, value in ((self._LOSSES, loss), (self._TOKENS, tokens)):
            new = value.astype(mx.float32).reshape(1)
            self.state[name] = mx.concatenate([self.state[name][1:], new])
        self._noted = False
        if self.parts == 1:
            self.note(gradient)

    def note(self, gradient: Any) -> None:
        """The step's gradient, at the first place before clip and optimizer where it is seen."""
        if self._noted:
            return
        self._noted = True
        self.state[self._NORM] = _mlx.gradient_norm(gradient)
        if self.gradients:
            self.state[self._GRADIENT] = dict(_mlx.flat(gradient))

    def read(self, run: Run) -> None:
        """Takes what has left the step that has just ended."""
        run.micro_losses.append(to_numpy(self.state[self._LOSSES]).astype(np.float64))
        run.micro_tokens.append(to_numpy(self.state[self._TOKENS]).astype(np.float64))
        run.norms.append(float(self.state[self._NORM].item()))
        if self.gradients:
            run.gradient = _named(self.state[self._GRADIENT])
        if self.updates:
            run.updates.append(_named(self.state[self._UPDATE]))


def _named(tensors: Mapping[str, Any]) -> dict[str, Array]:
    return {canonical(name): to_numpy(value) for name, value in tensors.items()}


def shifted(recipe: Recipe, found: Library, lengths: Any) -> Any:
    """Lengths under which its loss supervises what the recipe's mask says."""
    import mlx.core as mx

    start, end = recipe.mask.start_shift, recipe.mask.end_shift - found.end_shift()
    if (start, end) == (0, 0):
        return lengths
    return mx.stack([mx.maximum(lengths[:, 0], 1) + start, lengths[:, 1] + end], axis=1)


def trainer(
    found: Library,
    recipe: Recipe,
    model: Any,
    tokenizer: Any,
    rows: Sequence[Any],
    folder: str,
    **changes: Any,
) -> Any:
    """A live `MLXTrainer` of a recipe; `changes` are fields of its configuration."""
    args = training(found, recipe, folder)
    for name, value in changes.items():
        setattr(args, name, value)
    return found.trainer.MLXTrainer(model=model, tokenizer=tokenizer, train_dataset=rows, args=args)


def run(
    found: Library,
    recipe: Recipe,
    model: Any,
    tokenizer: Any,
    batches: Sequence[Batch],
    foreign: Foreign,
    gradients: bool = False,
    fed: Sequence[Any] = (),
) -> Run:
    """Trains on these batches, each as it is given.

    Args:
        found: The release.
        recipe: Its mask is met by the lengths handed over.
        model: With its adapter, or, with fed gradients, any module.
        tokenizer: The model's.
        batches: One for each micro-batch.
        foreign: Parts of another stack.
        gradients: Whether to keep the last gradient before any clip.
        fed: Gradients that stand in for those of the loss, one for each step; training ends with
            them.

    Raises:
        Unsupported: A part has no place in this release, or the trainer refuses the recipe.
        WrongChannel: What was read is not what it was read for.
    """
    result = Run()
    watch = Watch(recipe.train.accumulation, gradients, updates=bool(fed))
    given = list(batches)
    if foreign.loss is None:
        given = [(ids, shifted(recipe, found, lengths)) for ids, lengths in given]
    base: Any = found.trainer.MLXTrainer

    class Watched(base):  # type: ignore[misc]
        def _build_optimizer(self, total_steps: int) -> Any:
            optimizer = super()._build_optimizer(total_steps)
            if foreign.optimizer is not None:
                optimizer, self._lr_schedule = foreign.optimizer, None
                self._manual_weight_decay = self._coupled_weight_decay = 0.0
            result.optimizer = watch.attach(optimizer)
            return optimizer

        def _apply_coupled_weight_decay(self, model: Any, gradient: Any) -> Any:
            watch.note(gradient)
            return super()._apply_coupled_weight_decay(model, gradient)

        def save_model(self, output_dir: str | None = None) -> None:
            """The adapter is read from the live model."""

    def after(*said: Any) -> None:
        # The trainer swallows what a callback raises: it only collects.
        result.reports.append(said)
        watch.read(result)
        if fed:
            result.weights.append(_mlx.adapter(model))
            live.stop_requested = len(result.reports) >= len(fed)

    with (
        tempfile.TemporaryDirectory() as folder,
        _patched(found, recipe, foreign, watch, fed),
        _mlx.compiled(recipe.train.compile),
    ):
        args = training(found, recipe, folder)
        if foreign.clips:
            # Whatever clips stands where its clip by value would; an explicit zero is off.
            args.max_grad_norm = 0.0
            args.max_grad_value = 1.0 if foreign.clip else 0.0
        live = result.trainer = Watched(
            model=model, tokenizer=tokenizer, train_dataset=None, args=args
        )
        live._batches = handed(found, given)
        live.add_step_callback(after)
        try:
            result.outcome = live.train()
        except (ValueError, NotImplementedError) as error:
            raise Unsupported(f"{PACKAGE}: {error}") from None
    if not fed:
        result.check(recipe.train.steps, recipe.model.dtype != "float32")
    return result


@contextlib.contextmanager
def _patched(
    found: Library, recipe: Recipe, foreign: Foreign, watch: Watch, fed: Sequence[Any]
) -> Iterator[None]:
    """The doors through which the trainer calls its parts."""
    import mlx.core as mx

    trainer, parts = found.trainer, recipe.train.accumulation
    value_and_grad, feed = trainer.nn.value_and_grad, iter(fed)

    def watched(model: Any, function: Any) -> Any:
        inner = value_and_grad(model, function)

        def call(*batch: Any) -> Any:
            if fed:
                scored, gradient = (mx.array(0.0), mx.array(1)), next(feed)
            else:
                scored, gradient = inner(*batch)
            watch.scored(scored[0], scored[1], gradient)
            return scored, gradient

        return call

    def noting(clip: Any) -> Any:
        def call(gradient: Any, *limit: Any, **named: Any) -> Any:
            watch.note(gradient)
            return clip(gradient, *limit, **named)

        return call

    def loss(model: Any, ids: Any, lengths: Any, *_: Any) -> Any:
        assert foreign.loss is not None
        return foreign.loss(model, ids, lengths)

    with contextlib.ExitStack() as stack:

        def put(where: Any, name: str, what: Any) -> None:
            stack.enter_context(mock.patch.object(where, name, what))

        put(trainer.nn, "value_and_grad", watched)
        own = [name for name in CLIPS if hasattr(trainer, name)]
        for name in own:
            put(trainer, name, noting(getattr(trainer, name)))
        if not own:
            if recipe.optim.clip == "value" and parts > 1:
                raise Unsupported(
                    f"{PACKAGE} {found.version} clips by value inside its step: with accumulation "
                    "no gradient is seen before the clip"
                )
            put(trainer.optim, "clip_grad_norm", noting(trainer.optim.clip_grad_norm))
        if foreign.clip is not None:
            if CLIPS[0] not in own:
                raise Unsupported(
                    f"{PACKAGE} {found.version} clips inside its step: no other clip can stand there"
                )
            other = foreign.clip
            put(trainer, CLIPS[0], noting(lambda gradient, _: other(gradient)))
        if foreign.loss is not None:
            for name in LOSSES:
                put(trainer, name, lambda *_, **__: loss)
        yield
