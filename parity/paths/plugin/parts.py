"""A path on MLX of functions, each in the place of a part; the other parts are those of `mlx`."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from parity import resources
from parity.errors import Unsupported, UsageError
from parity.paths import parts
from parity.paths.mlx.artefacts import MlxArtefacts, Read
from parity.paths.mlx.live import Batch, Loss, Setup, to_numpy
from parity.paths.mlx.path import MlxPath
from parity.paths.plugin.arrays import Layout, layout
from parity.paths.plugin.calling import call, defaults, taken, title
from parity.paths.plugin.facts import curve, tokens_of
from parity.paths.plugin.loss import normalised
from parity.paths.plugin.watch import Stop, Watch
from parity.recipe import Recipe, factor_names
from parity.trace import Array

Function = Callable[..., Any]

PART = {
    "load": "loader",
    "wire": "wiring",
    "dataset": "batching",
    "batches": "batching",
    "loss": "loss",
    "clip": "clip",
    "optimizer": "optimizer",
    "save": "saver",
    "read": "reader",
    "fuse": "fuse",
    "loop": parts.LOOP,
}
"""What a user gives → the part that it stands for."""
FUNCTION = {part: key for key, part in PART.items()}
"""A part → what a single function for it is."""
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
_DECIDES = {
    "load": ("model.dtype", "model.weights"),
    "wire": ("lora.",),
    "dataset": ("data.append_eos", "mask.prompt"),
    "batches": ("data.max_length", "data.pad_", "seed.data", "train.batch_size"),
    "loss": ("mask.start_shift", "mask.end_shift"),
    "clip": ("optim.clip",),
    "optimizer": tuple(n for n in factor_names() if n.startswith("optim.") and "clip" not in n),
    "save": (),
    "read": (),
    "fuse": (),
    "loop": (
        "train.accumulation", "train.compile", "train.gradient_checkpointing",
    ),
}  # fmt: skip
"""The factors that are the business of each, unless it takes them."""


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
        folder = resources.data_dir(recipe.data.source)
        text = Path(folder, "train.jsonl").read_text(encoding="utf-8")
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        found = self._call("dataset", recipe, tokenizer=tokenizer, rows=rows, folder=str(folder))
        return Rows(found, recipe.data.max_length)

    def iterate(self, recipe: Recipe, dataset: Any) -> Callable[[], Iterator[Batch]]:
        """See `from_parts`; an iterator that ends is begun again, as for a further epoch."""
        if "batches" not in self.functions:
            return super().iterate(recipe, dataset)
        rows = list(dataset.given if isinstance(dataset, Rows) else _plain(dataset))
        known = [row if isinstance(row, (list, tuple)) else [] for row in _plain(dataset)]

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
        objects |= {"loss": getattr(setup.loss, "raw", setup.loss), "clip": setup.clip}
        watch.run(lambda: self._call("loop", recipe, **objects, batches=handed()))
        if len(watch.steps) < recipe.train.steps:
            raise Unsupported(
                f"{self.name} made {len(watch.steps)} updates where train.steps={recipe.train.steps}"
            )
        return curve(watch, tokens_of(watch, drawn, setup.loss))


class Rows(Sequence[tuple[list[int], int]]):
    """Training rows as (ids, offset), made of what a user's data set gives: ids, or such pairs."""

    def __init__(self, given: Any, longest: int) -> None:
        self.given = list(given)
        self._longest = longest

    def __len__(self) -> int:
        return len(self.given)

    def __getitem__(self, index: Any) -> Any:
        """A row, cut as the reference cuts it."""
        row = self.given[index]
        pair = isinstance(row, tuple) and len(row) == 2 and isinstance(row[1], (int, np.integer))
        ids, offset = row if pair else (row, 0)
        return [int(token) for token in ids][: self._longest], int(offset)

    def itemlen(self, index: int) -> int:
        """Tokens of a row, as mlx-lm's batching asks for them."""
        return len(self[index][0])


def _plain(dataset: Any) -> Iterator[Any]:
    """The token ids of each row."""
    return (dataset[index][0] for index in range(len(dataset)))


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
) -> type[PluginPath]:
    """The path of some functions; see `parity.plugin.from_parts`.

    Raises:
        UsageError: None is given, one is no function, or takes what nobody can give.
    """
    given = {key: function for key, function in functions.items() if function is not None}
    if not given:
        raise UsageError(f"a path needs a part of its own: give one of {', '.join(PART)}")
    factors, honours = factor_names(), list(MlxPath.honours)
    honoured = [f for f in factors if f.startswith(tuple(honours))]
    own: list[str] = []
    for key, function in given.items():
        if not callable(function):
            raise UsageError(f"{key}={function!r} is no function")
        takes: tuple[str, ...] = ()
        if key != "loss":
            takes = taken(function, _OBJECTS[key], f"{key} {title(function)}", key == "clip")
        lost = [f for f in factors if f.startswith(_DECIDES[key]) and f not in takes]
        honoured = [f for f in honoured if f not in lost]
        own += lost
    wanted = layout(given["loss"], batch) if "loss" in given else Layout(("ids", "lengths"), batch)
    first = next(iter(given.values()))
    owned = {PART[key] for key in given}
    return type(
        "Path",
        (PluginPath,),
        {
            "__module__": module,
            "__doc__": f"`mlx` with {', '.join(f'{k} {title(f)}' for k, f in given.items())}.",
            "name": name or getattr(first, "__name__", type(first).__name__),
            "functions": given,
            "layout": wanted,
            "own_parts": tuple(part for part in parts.ALL if part in owned),
            "honours": tuple(honoured),
            "own_factors": tuple(itertools.chain(own)),
        },
    )
