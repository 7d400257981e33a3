"""A path on torch of functions, each in the place of a part; the other parts are those of `hf`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from parity import resources
from parity.errors import Unsupported, UsageError
from parity.paths import parts
from parity.paths.contract import STAGES
from parity.paths.hf import live as _torch
from parity.paths.hf.live import Batch, Clip, Loss
from parity.paths.hf.path import HfPath
from parity.paths.hf.work import Share
from parity.paths.plugin.calling import call, defaults, title
from parity.paths.plugin.given import Function, Rows, lines, plain, read
from parity.paths.plugin.on_torch.arrays import TorchLayout, own_batch, torch_layout
from parity.paths.plugin.on_torch.loss import of_logits, share_of
from parity.paths.plugin.on_torch.seen import curve
from parity.paths.plugin.on_torch.watch import Stop, TorchWatch
from parity.recipe import Recipe
from parity.trace import Array

_OBJECTS = {
    "load": ("path",),
    "wire": ("model",),
    "dataset": ("tokenizer", "rows", "folder"),
    "batches": ("dataset", "tokenizer"),
    "optimizer": ("params",),
    "clip": (),
    "loop": ("model", "tokenizer", "optimizer", "schedule", "loss", "batches", "clip"),
}
"""What each may take beside factors."""
COMPUTES = ("loss", "clip", "optimizer", parts.LOOP)
"""Parts whose functions may do the same in other operations than those of `hf`."""
_BITS = ("config", "tokenization", "supervised_positions")
"""Stages at which nothing is rounded."""


class TorchPluginPath(HfPath):
    """What `from_parts` makes on torch: subclasses hold the functions."""

    stands_on: ClassVar[str] = "hf"
    functions: ClassVar[Mapping[str, Function]] = {}
    layout: ClassVar[TorchLayout] = TorchLayout()
    own_parts: ClassVar[tuple[str, ...]] = ()
    takes_parts: ClassVar[tuple[str, ...]] = HfPath.takes_parts

    def __init__(self, cache: Path) -> None:
        super().__init__(cache)
        self._own: dict[int, tuple[Array, Array]] = {}

    def environment(self) -> dict[str, Any]:
        """That of `hf`, and which parts are of whom."""
        return {**super().environment(), "parts": {"own": list(self.own_parts), "others": "hf"}}

    def shipped(self) -> dict[str, Any]:
        """Defaults of `hf`, but for what its own functions decide, and theirs."""
        kept = {k: v for k, v in super().shipped().items() if k not in self.own_factors}
        own = (defaults(f) for key, f in self.functions.items() if key != "loss")
        return kept | {key: value for found in own for key, value in found.items()}

    def documents(self) -> dict[str, Any]:
        """Those of `hf`, but for what its own functions decide."""
        return {k: v for k, v in super().documents().items() if k not in self.own_factors}

    def _call(self, name: str, recipe: Recipe, first: tuple[Any, ...] = (), **objects: Any) -> Any:
        function = self.functions[name]
        return call(function, recipe, objects, f"{name} {title(function)}", first)

    def load(self, recipe: Recipe) -> Any:
        """See `from_parts`."""
        if "load" not in self.functions:
            return super().load(recipe)
        return self._loaded(recipe)[0]

    def read_tokenizer(self, recipe: Recipe) -> Any:
        """See `from_parts`: that of the model where `load` gives none."""
        if "load" not in self.functions:
            return super().read_tokenizer(recipe)
        _, *more = self._loaded(recipe)
        return more[0] if more else super().read_tokenizer(recipe)

    def _loaded(self, recipe: Recipe) -> tuple[Any, ...]:
        found = self._call("load", recipe, path=resources.model_dir(recipe.model.source))
        return found if isinstance(found, tuple) else (found,)

    def wire(self, base: Any, recipe: Recipe) -> Any:
        """See `from_parts`; it may give the model in a wrapper, as PEFT does."""
        if "wire" not in self.functions:
            return super().wire(base, recipe)
        found = self._call("wire", recipe, model=base)
        return base if found is None else found

    def rows(self, recipe: Recipe, tokenizer: Any) -> list[tuple[list[int], int]]:
        """See `from_parts`."""
        if "dataset" not in self.functions:
            return super().rows(recipe, tokenizer)
        return list(self._rows(recipe, tokenizer))

    def _rows(self, recipe: Recipe, tokenizer: Any) -> Rows:
        if "dataset" not in self.functions:
            return Rows(super().rows(recipe, tokenizer), recipe.data.max_length)
        rows, folder = lines(recipe)
        found = self._call("dataset", recipe, tokenizer=tokenizer, rows=rows, folder=folder)
        return Rows(found, recipe.data.max_length)

    def iterate(self, recipe: Recipe, tokenizer: Any) -> Iterator[Batch]:
        """See `from_parts`; what ends is begun again, as for a further epoch."""
        if "batches" not in self.functions:
            yield from super().iterate(recipe, tokenizer)
            return
        dataset = self._rows(recipe, tokenizer)
        known = list(plain(dataset))
        given = dataset.given if "dataset" in self.functions else known
        labels_of = partial(super().labels, recipe)
        while True:
            epoch = iter(self._call("batches", recipe, dataset=given, tokenizer=tokenizer))
            if (first := next(epoch, None)) is None:
                raise Unsupported("batches gives none")
            for raw in itertools.chain([first], epoch):
                ids, lengths, labels = own_batch(raw, known, labels_of)
                self._own[id(ids)] = ids, labels
                yield ids, lengths

    def labels(self, recipe: Recipe, ids: Array, lengths: Array) -> Array:
        """Those that its own batches bring; of batches that are handed over, those of the recipe."""
        kept, labels = self._own.get(id(ids), (None, None))
        if kept is ids and labels is not None:
            return labels
        return super().labels(recipe, ids, lengths)

    def loss(self, recipe: Recipe) -> Share:
        """See `from_parts`."""
        if "loss" not in self.functions:
            return super().loss(recipe)
        return share_of(self.functions["loss"], self.layout)

    def loss_of_logits(self, recipe: Recipe, model: Any) -> Loss:
        """The same function, given logits."""
        if "loss" not in self.functions:
            return super().loss_of_logits(recipe, model)
        return of_logits(self.functions["loss"], self.layout, model)

    def clip(self, recipe: Recipe) -> Clip | None:
        """See `from_parts`."""
        if "clip" not in self.functions:
            return super().clip(recipe)
        return lambda parameters: self._call("clip", recipe, (parameters,))

    def optimizer(self, recipe: Recipe, parameters: list[Any]) -> tuple[Any, Any]:
        """See `from_parts`; one that comes without a schedule has none."""
        if "optimizer" not in self.functions:
            return super().optimizer(recipe, parameters)
        found = self._call("optimizer", recipe, params=parameters)
        return found if isinstance(found, tuple) else (found, NoSchedule())

    def loop(self, recipe: Recipe, model: Any, batches: Iterator[Batch]) -> dict[str, list[float]]:
        """See `from_parts`; what it does is watched from outside."""
        if "loop" not in self.functions:
            return super().loop(recipe, model, batches)
        tokenizer, loss = self.tokenizer(recipe), self.part("loss")
        watch, tokens = TorchWatch(stop_after=recipe.train.steps), list[int]()
        own = loss.functions.get("loss") if isinstance(loss, TorchPluginPath) else None
        layout = loss.layout if isinstance(loss, TorchPluginPath) else TorchLayout()

        def handed() -> Iterator[Any]:
            for ids, lengths in batches:
                targets = self.part("batching").labels(recipe, ids, lengths)
                tokens.append(int((targets != _torch.IGNORED).sum()))
                made = layout.arguments(ids, lengths, targets, None)[0]
                yield made if len(made) > 1 else made[0]
                if len(watch.steps) >= recipe.train.steps:
                    raise Stop

        def train() -> None:
            optimizer, schedule = self.part("optimizer").optimizer(recipe, _torch.trainable(model))
            self._call(
                "loop", recipe, model=model, tokenizer=tokenizer, optimizer=optimizer,
                schedule=schedule, loss=own or (lambda model, batch: model(**batch).loss),
                batches=handed(), clip=self.part("clip").clip(recipe),
            )  # fmt: skip

        watch.run(train)
        if len(watch.steps) < recipe.train.steps:
            raise Unsupported(
                f"{self.name} made {len(watch.steps)} updates where train.steps={recipe.train.steps}"
            )
        return curve(watch.steps, tokens)


class NoSchedule:
    """What stands for a schedule where there is none."""

    def step(self) -> None:
        """Nothing changes."""


def make(
    functions: Mapping[str, Function], module: str, name: str = "", batch: Function | None = None
) -> type[TorchPluginPath]:
    """The path of some functions; see `parity.plugin.from_parts`.

    Raises:
        UsageError: None is given, one is no function, or takes what nobody can give.
    """
    if files := [key for key in ("save", "read", "fuse") if functions.get(key) is not None]:
        raise UsageError(
            f"{files[0]}= cannot be given with framework='torch': only parts of the training stand in "
            "path hf; write a subclass of it with `saved`, `reloaded` or `merged`"
        )
    given = read(functions, _OBJECTS, HfPath.honours)
    named, loss = name or given.name, given.functions.get("loss")
    fixed = {k: v for k, v in HfPath.fixed.items() if k not in given.own_factors}
    return type(
        "Path",
        (TorchPluginPath,),
        {
            "__module__": module,
            "__doc__": given.described("hf"),
            "name": named,
            "functions": given.functions,
            "layout": torch_layout(loss, batch) if loss else TorchLayout(),
            "own_parts": given.own_parts,
            "takes_parts": TorchPluginPath.takes_parts,
            "undone": "wire" not in given.functions,
            "operations": operations(given.own_parts, named),
            "fixed": fixed,
            "honours": given.honours,
            "own_factors": given.own_factors,
        },
    )


def operations(own: tuple[str, ...], name: str) -> dict[str, str]:
    """Stages at which a function of a user may round otherwise than `hf`, with the reason."""
    found = {}
    for stage in STAGES:
        here = [p for p in own if p in COMPUTES and p in parts.COMPARED.get(stage, parts.ALL)]
        if here and stage not in (*_BITS, "lora_init"):
            found[stage] = f"{', '.join(here)} of {name} may round otherwise than that of hf"
    return found
