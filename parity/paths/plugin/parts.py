"""A path on MLX of functions, each in the place of a part; the other parts are those of `mlx`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from parity import resources
from parity.errors import Unsupported, UsageError
from parity.paths.mlx.artefacts import MlxArtefacts, Read
from parity.paths.mlx.live import Batch, Loss, Setup, to_numpy
from parity.paths.mlx.path import MlxPath
from parity.paths.plugin.arrays import Layout, layout
from parity.paths.plugin.calling import call, defaults, title
from parity.paths.plugin.facts import curve, tokens_of
from parity.paths.plugin.given import Function, Rows, lines, plain, read
from parity.paths.plugin.loss import normalised
from parity.paths.plugin.watch import Stop, Watch
from parity.paths.protocol import TrainingPath
from parity.recipe import Recipe
from parity.trace import Array

_OBJECTS = {
    "load": ("path",),
    "wire": ("model",),
    "dataset": ("tokenizer", "rows", "folder"),
    "batches": ("dataset", "tokenizer"),
    "optimizer": (),
    "clip": (),
    "save": ("model", "tokenizer", "folder"),
    "read": ("model", "folder"),
    "fuse": ("model", "dequantize"),
    "loop": ("model", "tokenizer", "optimizer", "loss", "batches", "clip"),
}
"""What each may take beside factors."""


class PluginPath(MlxPath):
    """What `from_parts` makes: subclasses hold the functions."""

    stands_on: ClassVar[str] = "mlx"
    functions: ClassVar[Mapping[str, Function]] = {}
    layout: ClassVar[Layout] = Layout(("ids", "lengths"))
    takes_parts: ClassVar[tuple[str, ...]] = MlxPath.takes_parts

    def environment(self) -> dict[str, Any]:
        """That of `mlx`, and which parts are of whom."""
        return {**super().environment(), "parts": {"own": list(self.own_parts), "others": "mlx"}}

    def shipped(self) -> dict[str, Any]:
        """Defaults of `mlx`, but for what its own functions decide, and theirs."""
        mlx = super().shipped()
        kept = {key: value for key, value in mlx.items() if key not in self.own_factors}
        own = (defaults(f) for key, f in self.functions.items() if key != "loss")
        return kept | {key: value for found in own for key, value in found.items()}

    def documents(self) -> dict[str, Any]:
        """Those of `mlx`, but for what its own functions decide."""
        return {k: v for k, v in super().documents().items() if k not in self.own_factors}

    def _call(self, name: str, recipe: Recipe, first: tuple[Any, ...] = (), **objects: Any) -> Any:
        function = self.functions[name]
        return call(function, recipe, objects, f"{name} {title(function)}", first)

    def load(self, recipe: Recipe) -> tuple[Any, Any]:
        """See `from_parts`."""
        if "load" not in self.functions:
            return super().load(recipe)
        found = self._call("load", recipe, path=resources.model_dir(recipe.model.source))
        model, tokenizer, *_ = found
        return model, tokenizer

    def wire(self, model: Any, recipe: Recipe) -> None:
        """See `from_parts`."""
        if "wire" not in self.functions:
            super().wire(model, recipe)
        elif self._call("wire", recipe, model=model) not in (None, model):
            raise Unsupported("wire gives another model: put the adapter into the one it is given")

    def dataset(self, recipe: Recipe, tokenizer: Any) -> Any:
        """See `from_parts`."""
        if "dataset" not in self.functions:
            return super().dataset(recipe, tokenizer)
        rows, folder = lines(recipe)
        found = self._call("dataset", recipe, tokenizer=tokenizer, rows=rows, folder=folder)
        return Rows(found, recipe.data.max_length)

    def iterate(self, recipe: Recipe, dataset: Any) -> Callable[[], Iterator[Batch]]:
        """See `from_parts`; an iterator that ends is begun again, as for a further epoch."""
        if "batches" not in self.functions:
            return super().iterate(recipe, dataset)
        rows = list(dataset.given if isinstance(dataset, Rows) else plain(dataset))
        known = [row if isinstance(row, (list, tuple)) else [] for row in plain(dataset)]

        def draw() -> Iterator[Batch]:
            while True:
                objects = {"dataset": rows, "tokenizer": self.tokenizer(recipe)}
                epoch = iter(self._call("batches", recipe, **objects))
                if (first := next(epoch, None)) is None:
                    raise Unsupported("batches gives none")
                for raw in itertools.chain([first], epoch):
                    yield batch_of(raw, self.layout, known)

        return draw

    def loss(self, recipe: Recipe) -> Loss:
        """See `from_parts`."""
        if "loss" not in self.functions:
            return super().loss(recipe)
        return normalised(self.functions["loss"], self.layout)

    def clip(self, recipe: Recipe) -> Callable[[Any], Any] | None:
        """See `from_parts`."""
        if "clip" not in self.functions:
            return super().clip(recipe)
        return lambda gradient: self._call("clip", recipe, (gradient,))

    def optimizer(self, recipe: Recipe) -> Any:
        """See `from_parts`."""
        if "optimizer" not in self.functions:
            return super().optimizer(recipe)
        return self._call("optimizer", recipe)

    def save(self, recipe: Recipe, setup: Setup, folder: Path) -> None:
        """See `from_parts`."""
        if "save" not in self.functions:
            super().save(recipe, setup, folder)
        else:
            objects = {"model": setup.model, "tokenizer": setup.tokenizer}
            self._call("save", recipe, **objects, folder=str(folder))

    def read(self, recipe: Recipe, folder: Path, loader: MlxArtefacts) -> Any:
        """See `from_parts`."""
        if "read" not in self.functions:
            return super().read(recipe, folder, loader)
        model = loader.load(recipe)[0]
        found = self._call("read", recipe, model=model, folder=str(folder))
        return model if found is None else found

    def merge(self, recipe: Recipe, folder: Path, read: Read | None, dequantize: bool) -> Any:
        """See `from_parts`."""
        if "fuse" not in self.functions:
            return super().merge(recipe, folder, read, dequantize)
        model = read() if read else self.reloaded(recipe, folder)
        found = self._call("fuse", recipe, model=model, dequantize=dequantize)
        return model if found is None else found

    def loop(
        self, recipe: Recipe, setup: Setup, batches: Iterator[Batch]
    ) -> dict[str, list[float]]:
        """See `from_parts`; what it does is watched from outside."""
        if "loop" not in self.functions:
            return super().loop(recipe, setup, batches)
        watch, drawn = Watch(stop_after=recipe.train.steps), list[tuple[Array, Array]]()

        def handed() -> Iterator[Any]:
            for ids, lengths in batches:
                drawn.append((to_numpy(ids), to_numpy(lengths)))
                raw = self.layout.arguments(ids, lengths)
                yield raw if len(raw) > 1 else raw[0]
                if len(watch.steps) >= recipe.train.steps:
                    raise Stop

        objects = {"model": setup.model, "tokenizer": setup.tokenizer, "optimizer": setup.optimizer}
        clip = None if setup.clip is None else watch.noting(setup.clip)
        objects |= {"loss": getattr(setup.loss, "raw", setup.loss), "clip": clip}
        watch.run(lambda: self._call("loop", recipe, **objects, batches=handed()))
        if len(watch.steps) < recipe.train.steps:
            raise Unsupported(
                f"{self.name} made {len(watch.steps)} updates where train.steps={recipe.train.steps}"
            )
        return curve(watch, tokens_of(watch, drawn, setup.loss))


def batch_of(raw: Any, wanted: Layout, rows: Sequence[Sequence[int]]) -> Batch:
    """A batch of a user's, which is what the loss takes, as ids (B, W) and lengths (B, 2)."""
    import mlx.core as mx

    given = raw if isinstance(raw, (tuple, list)) else (raw,)
    arrays = [to_numpy(a) if isinstance(a, mx.array) else np.asarray(a) for a in given]
    ids, lengths = wanted.batch(arrays, rows)
    return mx.array(ids), mx.array(lengths)


def make(
    functions: Mapping[str, Function],
    module: str,
    name: str = "",
    batch: Function | None = None,
    framework: str = "mlx",
) -> type[TrainingPath]:
    """The path of some functions; see `parity.plugin.from_parts`.

    Raises:
        UsageError: None is given, one is no function, or takes what nobody can give.
    """
    if framework == "torch":
        from parity.paths.plugin.on_torch.parts import make as made

        return made(functions, module, name, batch)
    if framework != "mlx":
        raise UsageError(f"framework={framework!r}: give mlx or torch")
    given = read(functions, _OBJECTS, MlxPath.honours)
    loss = given.functions.get("loss")
    return type(
        "Path",
        (PluginPath,),
        {
            "__module__": module,
            "__doc__": given.described("mlx"),
            "name": name or given.name,
            "functions": given.functions,
            "layout": layout(loss, batch) if loss else Layout(("ids", "lengths"), batch),
            "own_parts": given.own_parts,
            "honours": given.honours,
            "own_factors": given.own_factors,
        },
    )
