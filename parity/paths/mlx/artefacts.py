"""How an MLX path saves an adapter, reads one into a model and fuses one: three parts, as mlx-lm has them."""

from __future__ import annotations

import contextlib
import tempfile
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from parity.errors import Unsupported
from parity.paths.mlx import live as _mlx
from parity.paths.mlx import settings
from parity.paths.mlx.live import Setup
from parity.paths.mlx.round_trip import save_by_train
from parity.paths.mlx.stages import MlxStages
from parity.paths.mlx.traces import given
from parity.recipe import Recipe
from parity.trace import Array, Trace

Read = Callable[[], Any]
"""Loads the base anew and reads the saved adapter into it."""


class MlxArtefacts(MlxStages):
    """Savers, readers and fuses that can stand in each other's place."""

    donors: Mapping[str, Any]

    @abstractmethod
    def part(self, name: str) -> MlxArtefacts:
        """The path that a part is taken from."""

    @abstractmethod
    def load(self, recipe: Recipe) -> tuple[Any, Any]:
        """Model, loaded anew, and tokenizer."""

    # Parts -------------------------------------------------------------------------------------

    def save(self, recipe: Recipe, setup: Setup, folder: Path) -> None:
        """Writes the adapter of a live model: mlx-lm's `train`, with its command line's settings."""
        save_by_train(setup, settings.fine_tuning(recipe, setup.model), folder)

    def export(self, recipe: Recipe, live: Callable[[], Setup], layout: str, folder: Path) -> None:
        """As `save`, into the files of another stack; `live` makes the live model."""
        raise Unsupported(f"{self.name} ships nothing that writes files of {layout}")

    def read(self, recipe: Recipe, folder: Path, loader: MlxArtefacts) -> Any:
        """A base that `loader` loads anew, with a saved adapter: mlx-lm's `load_adapters`."""
        from mlx_lm.tuner.utils import load_adapters

        return settings.as_trained(load_adapters(loader.load(recipe)[0], str(folder)), recipe)

    def merge(self, recipe: Recipe, folder: Path, read: Read | None, dequantize: bool) -> Any:
        """A model with a saved adapter in its weights: the `fuse` of mlx-lm's layers, in place.

        Args:
            recipe: What was trained.
            folder: Holds the adapter.
            read: Makes the model with the adapter in the place of the path's own reader.
            dequantize: A quantized base is not quantized again.
        """
        from mlx.utils import tree_unflatten
        from mlx_lm.utils import dequantize_model

        model = read() if read else self.reloaded(recipe, folder)
        layers = [
            (name, module.fuse(dequantize=dequantize))
            for name, module in model.named_modules()
            if hasattr(module, "fuse")
        ]
        model.update_modules(tree_unflatten(layers))
        return dequantize_model(model) if dequantize else model

    # What uses them ----------------------------------------------------------------------------

    @contextlib.contextmanager
    def saved(
        self, recipe: Recipe, adapter: Mapping[str, Array], see: Callable[[Any], None]
    ) -> Iterator[Path]:
        """See `RoundTrips.saved`."""
        setup = self.setup(recipe, adapter)
        see(setup.model)
        with self.left(recipe, setup) as folder:
            yield folder

    @contextlib.contextmanager
    def trained(self, recipe: Recipe, inputs: Trace, see: Callable[[Any], None]) -> Iterator[Path]:
        """As `saved`, after the path's loop."""
        setup = self.setup(recipe, inputs.group("adapter"))
        with _mlx.compiled(recipe.train.compile), _mlx.restored_layer_class(setup.model):
            self.loop(recipe, setup, given(inputs, recipe) or setup.iterate())
        see(setup.model)
        with self.left(recipe, setup) as folder:
            yield folder

    @contextlib.contextmanager
    def left(self, recipe: Recipe, setup: Setup) -> Iterator[Path]:
        """A folder with what the saver leaves of a live model."""
        with tempfile.TemporaryDirectory() as folder:
            self.part("saver").save(recipe, setup, Path(folder))
            yield Path(folder)

    @contextlib.contextmanager
    def exported(
        self, recipe: Recipe, adapter: Mapping[str, Array], layout: str, see: Callable[[Any], None]
    ) -> Iterator[Path]:
        """See `RoundTrips.exported`."""

        def live() -> Setup:
            setup = self.setup(recipe, adapter)
            see(setup.model)
            return setup

        with tempfile.TemporaryDirectory() as folder:
            # A saver may insist on making its folder itself.
            target = Path(folder) / layout
            self.part("saver").export(recipe, live, layout, target)
            yield target

    def reloaded(self, recipe: Recipe, folder: Path) -> Any:
        """By the reader, into what the loader gives."""
        return self.part("reader").read(recipe, folder, self.part("loader"))

    def merged(self, recipe: Recipe, folder: Path, dequantize: bool) -> Any:
        """By the fuse; one that reads the adapter by itself does so where no other reader is given."""
        fuse = self.part("fuse")
        own = fuse is self.part("reader") is self.part("loader")
        read = None if own else partial(self.reloaded, recipe, folder)
        return fuse.merge(recipe, folder, read, dequantize)
