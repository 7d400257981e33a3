"""Mistakes that loops are shipped with: what they forget, leave out and save."""

from __future__ import annotations

import itertools
from typing import Any

from benchmarks.planted.registry import planted
from parity.paths.mlx.path import MlxPath

ROWS = {"data.source": "mixed", "train.batch_size": 2}


@planted(
    "loop",
    "loss_curve",
    parts="loop",
    steps=(4,),
    differs="the adapter after it",
    settings="train.compile",
)
def state_lost_at_the_fourth() -> type[MlxPath]:
    """Before the fourth step the optimizer forgets its moments, as after a resumed run."""

    class Path(MlxPath):
        def train(self, recipe: Any, inputs: Any) -> Any:
            return super().train(recipe.override({"train.compile": False}), inputs)

        def loop(self, recipe: Any, setup: Any, batches: Any) -> Any:
            import mlx.core as mx
            from mlx.utils import tree_map

            def watched() -> Any:
                for index, batch in enumerate(batches):
                    if index == 3 * recipe.train.accumulation:
                        kept = {k: setup.optimizer.state[k] for k in ("step", "learning_rate")}
                        setup.optimizer.state = tree_map(mx.zeros_like, setup.optimizer.state)
                        setup.optimizer.state.update(kept)
                    yield batch

            return super().loop(recipe.override({"train.compile": False}), setup, watched())

    return Path


@planted("loop", "round_trip", parts="loop")
def saves_before_the_last_step() -> type[MlxPath]:
    """The adapter that is saved is that of the step before the last."""

    class Path(MlxPath):
        def trained(self, recipe: Any, inputs: Any, see: Any) -> Any:
            import contextlib

            @contextlib.contextmanager
            def late() -> Any:
                last = recipe.train.steps - 1
                with super(Path, self).trained(recipe, inputs, see):
                    pass
                shorter = recipe.override({"train.steps": max(1, last)})
                with super(Path, self).trained(shorter, inputs, lambda model: None) as folder:
                    yield folder

            return late()

    return Path


@planted(
    "loop",
    "loss_curve",
    parts="loop",
    recipe={**ROWS, "train.accumulation": 3},
    steps=(1,),
    differs="the batches|the loss that is reported|the gradient that the loop makes",
    settings="accumulation.steps",
)
def last_micro_batch_forgotten() -> type[MlxPath]:
    """Of three micro-batches the third is drawn and not used."""

    class Path(MlxPath):
        def loop(self, recipe: Any, setup: Any, batches: Any) -> Any:
            used = (
                batch
                for index, batch in enumerate(batches)
                if (index + 1) % recipe.train.accumulation or recipe.train.accumulation < 3
            )
            fewer = max(1, recipe.train.accumulation - 1) if recipe.train.accumulation > 2 else 1
            return super().loop(recipe.override({"train.accumulation": fewer}), setup, used)

    return Path


@planted("harmless", references=("hf",))
def batches_counted_twice() -> type[MlxPath]:
    """The loop draws batches through two iterators that hand on the same."""

    class Path(MlxPath):
        def loop(self, recipe: Any, setup: Any, batches: Any) -> Any:
            return super().loop(recipe, setup, itertools.tee(batches)[0])

    return Path
