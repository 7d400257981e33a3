"""The real `MLXTrainer.train()`, run and observed."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from parity.errors import Unsupported
from parity.paths.mlx import live as _mlx
from parity.paths.mlx.live import Batch, Loss
from parity.paths.unsloth.library import PACKAGE, Library, ready_batches
from parity.paths.unsloth.observer import Run, StepObserver
from parity.paths.unsloth.settings import training
from parity.recipe import Recipe

CLIPS = ("_clip_grad_by_value", "_clip_grad_by_leaf_norm", "_clip_grad_norm_fp32")
LOSSES = ("make_baseline_loss_fn", "make_cce_loss_fn")


@dataclass
class ReplacedParts:
    """Parts of another stack that stand in the place of the trainer's own."""

    loss: Loss | None = None
    optimizer: Any = None
    clip: Callable[[Any], Any] | None = None
    clips: bool = False
    """Whether the clip is another stack's; that of a stack that does not clip is None."""


def shifted(recipe: Recipe, found: Library, lengths: Any) -> Any:
    """Lengths under which its loss supervises the positions of the recipe's mask."""
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
    replaced: ReplacedParts,
    gradients: bool = False,
    fed: Sequence[Any] = (),
    keep: Path | None = None,
) -> Run:
    """Trains on these batches, each as it is.

    Args:
        found: The release.
        recipe: Its mask becomes the lengths that the loss is given.
        model: With its adapter, or, with fed gradients, any module.
        tokenizer: The model's.
        batches: One for each micro-batch.
        replaced: Parts of another stack.
        gradients: Whether to keep the last gradient before any clip.
        fed: Gradients that stand in for those of the loss, one for each step; training ends with
            them.
        keep: Takes the files that the trainer saves at its end; None: it saves none.

    Raises:
        Unsupported: A part has no place in this release, or the trainer refuses the recipe.
        WrongChannel: What was read is not what it was read for.
    """
    result = Run()
    observer = StepObserver(recipe.train.accumulation, gradients, updates=bool(fed))
    given = list(batches)
    if replaced.loss is None:
        given = [(ids, shifted(recipe, found, lengths)) for ids, lengths in given]
    base: Any = found.trainer.MLXTrainer

    class ObservedTrainer(base):  # type: ignore[misc]
        def _build_optimizer(self, total_steps: int) -> Any:
            optimizer = super()._build_optimizer(total_steps)
            if replaced.optimizer is not None:
                optimizer, self._lr_schedule = replaced.optimizer, None
                self._manual_weight_decay = self._coupled_weight_decay = 0.0
            result.optimizer = observer.attach(optimizer)
            return optimizer

        def _apply_coupled_weight_decay(self, model: Any, gradient: Any) -> Any:
            observer.record(gradient)
            return super()._apply_coupled_weight_decay(model, gradient)

        def save_model(self, output_dir: str | None = None) -> None:
            """The adapter is read from the live model, unless its files are asked for."""
            if keep is not None:
                super().save_model(str(keep))

    def after(*report: Any) -> None:
        # The trainer swallows what a callback raises: it only collects.
        result.reports.append(report)
        observer.read(result)
        if fed:
            result.weights.append(_mlx.adapter(model))
            live.stop_requested = len(result.reports) >= len(fed)

    with (
        tempfile.TemporaryDirectory() as folder,
        _patched(found, recipe, replaced, observer, fed),
        _mlx.compiled(recipe.train.compile),
    ):
        args = training(found, recipe, folder)
        if replaced.clips:
            # Whatever clips stands where its clip by value would; an explicit zero is off.
            args.max_grad_norm = 0.0
            args.max_grad_value = 1.0 if replaced.clip else 0.0
        live = result.trainer = ObservedTrainer(
            model=model, tokenizer=tokenizer, train_dataset=None, args=args
        )
        live._batches = ready_batches(found, given)
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
    found: Library,
    recipe: Recipe,
    replaced: ReplacedParts,
    observer: StepObserver,
    fed: Sequence[Any],
) -> Iterator[None]:
    """Patches the names by which the trainer calls its parts."""
    import mlx.core as mx

    trainer, parts = found.trainer, recipe.train.accumulation
    value_and_grad, feed = trainer.nn.value_and_grad, iter(fed)

    def observed(model: Any, function: Any) -> Any:
        inner = value_and_grad(model, function)

        def call(*batch: Any) -> Any:
            if fed:
                scored, gradient = (mx.array(0.0), mx.array(1)), next(feed)
            else:
                scored, gradient = inner(*batch)
            observer.micro_batch(scored[0], scored[1], gradient)
            return scored, gradient

        return call

    def recorded(clip: Any) -> Any:
        def call(gradient: Any, *limit: Any, **named: Any) -> Any:
            observer.record(gradient)
            return clip(gradient, *limit, **named)

        return call

    def loss(model: Any, ids: Any, lengths: Any, *_: Any) -> Any:
        assert replaced.loss is not None
        return replaced.loss(model, ids, lengths)

    with contextlib.ExitStack() as stack:

        def patch(where: Any, name: str, what: Any) -> None:
            stack.enter_context(mock.patch.object(where, name, what))

        patch(trainer.nn, "value_and_grad", observed)
        own = [name for name in CLIPS if hasattr(trainer, name)]
        for name in own:
            patch(trainer, name, recorded(getattr(trainer, name)))
        if not own:
            if recipe.optim.clip == "value" and parts > 1:
                raise Unsupported(
                    f"{PACKAGE} {found.version} clips by value inside its step: with accumulation "
                    "no gradient is seen before the clip"
                )
            patch(trainer.optim, "clip_grad_norm", recorded(trainer.optim.clip_grad_norm))
        if replaced.clip is not None:
            if CLIPS[0] not in own:
                raise Unsupported(
                    f"{PACKAGE} {found.version} clips inside its step: no other clip can stand there"
                )
            other = replaced.clip
            patch(trainer, CLIPS[0], recorded(lambda gradient, _: other(gradient)))
        if replaced.loss is not None:
            for name in LOSSES:
                patch(trainer, name, lambda *_, **__: loss)
        yield
