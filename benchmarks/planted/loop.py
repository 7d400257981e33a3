"""Faults of the loop: what it reports, which step it takes, what it does with micro-batches."""

from __future__ import annotations

import itertools
from typing import Any

from benchmarks.planted.registry import planted
from parity.paths.mlx.path import MlxPath

ROWS = {"data.source": "mixed", "train.batch_size": 2}
ALL_STEPS = tuple(range(1, 31))


@planted("loop", "loss_curve", parts="loop", steps=(2,), differs="the loss that is reported")
def reports_the_loss_before() -> type[MlxPath]:
    """The loss that is reported is that of the step before."""

    class Path(MlxPath):
        def loop(self, recipe: Any, setup: Any, batches: Any) -> Any:
            result = super().loop(recipe, setup, batches)
            result["loss"] = result["loss"][:1] + result["loss"][:-1]
            return result

    return Path


@planted("loop", "gradient", {"half": 0.5, "1e-4": 1.0001}, parts="loop", steps=(1,))
def reports_a_scaled_loss(factor: float) -> type[MlxPath]:
    """The loss that is reported is a multiple of the real one."""

    class Path(MlxPath):
        def loop(self, recipe: Any, setup: Any, batches: Any) -> Any:
            result = super().loop(recipe, setup, batches)
            result["loss"] = [factor * loss for loss in result["loss"]]
            return result

    return Path


@planted(
    "loop", "loss_curve", parts="loop", steps=(1,), differs="the gradient norm that is reported"
)
def reports_a_squared_norm() -> type[MlxPath]:
    """The gradient norm that is reported is squared."""

    class Path(MlxPath):
        def loop(self, recipe: Any, setup: Any, batches: Any) -> Any:
            result = super().loop(recipe, setup, batches)
            result["gradient_norm"] = [norm**2 for norm in result["gradient_norm"]]
            return result

    return Path


@planted(
    "loop",
    "loss_curve",
    parts="loop",
    steps=(3, 4),
    differs="the adapter after it",
    settings="train.compile",
)
def skips_the_third_update() -> type[MlxPath]:
    """The third update is not made."""

    class Path(MlxPath):
        def loop(self, recipe: Any, setup: Any, batches: Any) -> Any:
            update, count = setup.optimizer.update, itertools.count(1)

            def skipping(model: Any, gradient: Any) -> None:
                if next(count) != 3:
                    update(model, gradient)

            setup.optimizer.update = skipping
            return super().loop(recipe.override({"train.compile": False}), setup, batches)

        def train(self, recipe: Any, inputs: Any) -> Any:
            return super().train(recipe.override({"train.compile": False}), inputs)

    return Path


@planted(
    "loop",
    "loss_curve",
    parts="loop",
    steps=(1, 2),
    differs="the gradient that the loop makes|the adapter after it",
)
def only_lora_b_is_trained() -> type[MlxPath]:
    """Updates of `lora_a` are dropped."""

    class Path(MlxPath):
        def loop(self, recipe: Any, setup: Any, batches: Any) -> Any:
            inner = setup.optimizer.apply_gradients

            def apply_gradients(gradient: Any, parameters: Any) -> Any:
                from mlx.utils import tree_flatten, tree_unflatten

                old = dict(tree_flatten(parameters))
                moved = tree_flatten(inner(gradient, parameters))
                return tree_unflatten(
                    [(n, old[n] if n.endswith("lora_a") and n in old else v) for n, v in moved]
                )

            setup.optimizer.apply_gradients = apply_gradients
            return super().loop(recipe, setup, batches)

    return Path


@planted(
    "loop",
    "loss_curve",
    parts="loop",
    steps=(1, 2),
    recipe=ROWS,
    differs="the batches|the loss that is reported",
)
def each_batch_twice() -> type[MlxPath]:
    """Each batch is trained on twice in a row, every other one never."""

    class Path(MlxPath):
        def loop(self, recipe: Any, setup: Any, batches: Any) -> Any:
            kept = itertools.islice(batches, 0, None, 1)
            twice = (batch for batch in kept for _ in range(2))
            return super().loop(recipe, setup, twice)

    return Path


@planted("loop", "gradient", {"5 %": 1.05, "1e-4": 1.0001}, parts="loop", steps=(1, 2))
def gradient_scaled(factor: float) -> type[MlxPath]:
    """The gradient is scaled between loss and optimizer."""

    class Path(MlxPath):
        def loop(self, recipe: Any, setup: Any, batches: Any) -> Any:
            inner = setup.loss

            def loss(model: Any, ids: Any, lengths: Any) -> Any:
                from benchmarks.planted.tools import on_way_back

                value, tokens = inner(model, ids, lengths)
                return on_way_back(lambda g: factor * g)(value), tokens

            setup.loss = loss
            return super().loop(recipe, setup, batches)

    return Path


@planted(
    "loop",
    "loss_curve",
    parts="loop",
    steps=(1,),
    recipe={**ROWS, "train.accumulation": 3},
    settings="accumulation.steps accumulation.weighting",
    differs="the batches|the loss that is reported|the gradient that the loop makes",
)
def accumulation_ignored() -> type[MlxPath]:
    """Three micro-batches are asked for, one is used."""

    class Path(MlxPath):
        def loop(self, recipe: Any, setup: Any, batches: Any) -> Any:
            return super().loop(recipe.override({"train.accumulation": 1}), setup, batches)

    return Path


@planted(
    "loop",
    "loss_curve",
    parts="loop",
    references=("hf",),  # against mlx-lm the rounding of g * tokens / tokens shows at once
    steps=(1,),
    recipe={**ROWS, "train.accumulation": 2},
    settings="accumulation.weighting",
    differs="the loss that is reported|the gradient that the loop makes",
)
def weighted_by_token() -> type[MlxPath]:
    """Micro-batches are weighted by their tokens, though a plain mean is asked for."""

    class Path(MlxPath):
        def loop(self, recipe: Any, setup: Any, batches: Any) -> Any:
            return super().loop(
                recipe.override({"train.accumulation_weighting": "token"}), setup, batches
            )

    return Path


@planted("loop", "loss_curve", parts="loop", steps=(5, 6), differs="the loss that is reported")
def starts_again_at_five() -> type[MlxPath]:
    """After the fourth step the adapter is what it was at the start."""

    class Path(MlxPath):
        def loop(self, recipe: Any, setup: Any, batches: Any) -> Any:
            import mlx.core as mx
            from mlx.utils import tree_map

            start = tree_map(mx.array, setup.model.trainable_parameters())

            def watched() -> Any:
                for index, batch in enumerate(batches):
                    if index == 4:
                        setup.model.update(start)
                    yield batch

            return super().loop(recipe, setup, watched())

    return Path


@planted("loop", "gradient", parts="loop", steps=(1,))
def dropout_in_the_loop() -> type[MlxPath]:
    """Training drops a tenth of the adapters' inputs, though nobody asked for it."""

    class Path(MlxPath):
        def loop(self, recipe: Any, setup: Any, batches: Any) -> Any:
            import mlx.nn as nn

            for _, module in setup.model.named_modules():
                if hasattr(module, "lora_a"):
                    module.dropout = nn.Dropout(0.1)
            return super().loop(recipe, setup, batches)

    return Path
