"""Variations of the MLX paths that people suspected of making a difference, for the scenarios.

Each changes one thing that is no factor of a recipe.
"""

from __future__ import annotations

import sys
from typing import Any, ClassVar
from unittest import mock

import numpy as np

from parity import resources
from parity.paths.mlx.live import Loss
from parity.paths.mlx.path import MlxPath
from parity.paths.mlx_lm.path import MlxLmPath
from parity.recipe import Recipe
from parity.trace import Trace


class TightSeed(MlxPath):
    """Seeds once more, with nothing between the seed and the making of the adapter."""

    name: ClassVar[str] = "tight-seed"

    def wire(self, model: Any, recipe: Recipe) -> None:
        """Seeds inside the call that makes the adapter."""
        import mlx.core as mx
        from mlx_lm.tuner import utils

        make = utils.linear_to_lora_layers

        def seeded(*args: Any, **kwargs: Any) -> None:
            mx.random.seed(recipe.seed.value)
            make(*args, **kwargs)

        with mock.patch.object(utils, "linear_to_lora_layers", seeded):
            super().wire(model, recipe)


class EarlySeed(MlxPath):
    """Weights are read and evaluated lazily, between the seed and the making of the adapter."""

    name: ClassVar[str] = "early-seed"

    def base(self, recipe: Recipe) -> tuple[Any, Any]:
        """A model whose weights have not been read yet."""
        import mlx_lm

        return mlx_lm.load(resources.model_dir(recipe.model.source), lazy=True)[:2]  # type: ignore[no-any-return]

    def wire(self, model: Any, recipe: Recipe) -> None:
        """Reads the weights first."""
        import mlx.core as mx

        mx.eval(model.parameters())
        super().wire(model, recipe)


class NumpyReseed(MlxPath):
    """Seeds NumPy's generator once more, before the order of the batches is drawn."""

    name: ClassVar[str] = "numpy-reseed"

    def dataset(self, recipe: Recipe, tokenizer: Any) -> Any:
        """Seeds, then reads the rows."""
        seed = recipe.seed
        np.random.seed(seed.value if seed.data is None else seed.data)
        return super().dataset(recipe, tokenizer)


class WiredLimit(MlxPath):
    """Wires as much memory as the device recommends; without Metal there is nothing to wire."""

    name: ClassVar[str] = "wired-limit"

    def train(self, recipe: Recipe, inputs: Trace) -> Trace:
        """Trains under the limit."""
        import mlx.core as mx

        if not mx.metal.is_available():
            return super().train(recipe, inputs)
        before = mx.set_wired_limit(int(mx.device_info()["max_recommended_working_set_size"]))
        try:
            return super().train(recipe, inputs)
        finally:
            mx.set_wired_limit(before)


class FloatMask(MlxPath):
    """A loss of one's own, whose mask is float32 instead of boolean."""

    name: ClassVar[str] = "float-mask"

    def loss(self, recipe: Recipe) -> Loss:
        """Cross-entropy over the supervised positions."""
        import mlx.core as mx
        import mlx.nn as nn

        start, end = recipe.mask.start_shift, recipe.mask.end_shift - 1

        def loss(model: Any, batch: Any, lengths: Any) -> tuple[Any, Any]:
            ids, targets = batch[:, :-1], batch[:, 1:]
            steps = mx.arange(1, targets.shape[1] + 1)
            first = mx.maximum(lengths[:, 0:1], 1) + start
            inside = mx.logical_and(steps >= first, steps <= lengths[:, 1:] + end)
            mask = inside.astype(mx.float32)
            losses = nn.losses.cross_entropy(model(ids), targets) * mask
            tokens = mask.sum()
            return losses.astype(mx.float32).sum() / tokens, tokens

        return loss


class FreshProcess(MlxLmPath):
    """Each training in a process of its own, which has run nothing else."""

    name: ClassVar[str] = "fresh-process"

    def train(self, recipe: Recipe, inputs: Trace) -> Trace:
        """The command line's training in a child process."""
        import tempfile
        from pathlib import Path

        from parity.capture.pool import group_of
        from parity.capture.worker import Worker

        with tempfile.TemporaryDirectory() as folder:
            source, output = Path(folder, "inputs"), Path(folder, "output.safetensors")
            inputs.save(source)
            group = group_of("mlx-lm", MlxLmPath, sys.executable)
            worker = Worker(group, self.cache, Path(folder, "log"))
            try:
                worker.call("mlx-lm", "mlx-lm", "train", recipe, source, output, timeout=3600)
            finally:
                worker.close()
            return Trace.load(output)
