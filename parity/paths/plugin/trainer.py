"""A whole trainer as a path: a function that is run in full, and watched from outside."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import numpy as np

from parity import resources
from parity.errors import Unsupported, UsageError
from parity.names import canonical
from parity.paths import parts
from parity.paths.describe import model_key
from parity.paths.measured import HALF, Calls, micro_batches
from parity.paths.mlx import live as _mlx
from parity.paths.mlx.live import Batch, Loss, Setup, to_numpy
from parity.paths.mlx.observed import calls
from parity.paths.mlx.path import MlxPath
from parity.paths.mlx.pristine import Pristine, without_adapter
from parity.paths.mlx.settings import one_step
from parity.paths.mlx.traces import given
from parity.paths.plugin.arrays import Layout, layout
from parity.paths.plugin.calling import call, defaults, taken, title
from parity.paths.plugin.facts import LOUD, QUIET, curve, loop_facts, tokens_of
from parity.paths.plugin.live import in_place, restored_calls, transplant
from parity.paths.plugin.loss import normalised, with_any_model
from parity.paths.plugin.watch import Step, Watch
from parity.recipe import PINNED, Recipe, factor_names
from parity.trace import Array, Trace

Function = Callable[..., Any]

OBJECTS = {
    "path": "the model's folder, for a trainer that loads the model itself",
    "model": "else the loaded model without adapter",
    "adapted": "or the loaded model with LoRA in it",
    "tokenizer": "the tokenizer that comes with the model",
    "folder": "the folder of train.jsonl",
    "rows": "else its lines, as dicts",
    "batches": "None to draw its own, else an iterator of what its loss takes after the model",
    "out": "an empty folder for the adapter",
}
"""What a trainer may take beside factors."""
_FIRST = 8
"""Micro-batches that are looked at first; more are drawn by running it anew."""


class TrainerPath(MlxPath):
    """What `from_trainer` makes: subclasses hold the function."""

    stands_on: ClassVar[str] = "mlx"
    trainer: ClassVar[Function]
    draws: ClassVar[Function | None] = None
    batch: ClassVar[Function | None] = None
    reads: ClassVar[Function | None] = None
    takes: ClassVar[frozenset[str]] = frozenset()
    takes_parts: ClassVar[tuple[str, ...]] = ("loss",)

    def __init__(self, cache: Path) -> None:
        super().__init__(cache)
        self._layout: Layout | None = None
        self._taken = False

    def environment(self) -> dict[str, Any]:
        """That of `mlx`, and which parts are of whom."""
        return {**super().environment(), "parts": {"own": list(self.own_parts), "others": "mlx"}}

    def shipped(self) -> dict[str, Any]:
        """The defaults that its parameters have, and those that `shipped` reads.

        Raises:
            Unsupported: One that it takes is not known, so that no run is as it is shipped.
        """
        kind = type(self)
        found = {**defaults(kind.trainer), **(kind.reads() if kind.reads else {})}
        takes = taken(kind.trainer, OBJECTS, kind.name)
        if lacking := [f for f in takes if f not in found and not f.startswith(PINNED)]:
            raise Unsupported(
                f"{self.name} is given {', '.join(lacking)} and nobody knows its defaults: read them in "
                "from_trainer(…, shipped=), or give its parameters the defaults of the trainer"
            )
        return found

    # Running it --------------------------------------------------------------------------------

    def watched(
        self,
        recipe: Recipe,
        watch: Watch,
        batches: Iterator[Batch] | None = None,
        out: str | None = None,
    ) -> Watch:
        """Runs the trainer under watch; with batches handed over where it takes them."""
        kind = type(self)
        if donor := self.donors.get("loss"):
            watch.replaced = partial(in_place, donor.loss(recipe), kind.batch)
        folder = resources.data_dir(recipe.data.source)
        with contextlib.ExitStack() as stack:
            objects: dict[str, Any] = {
                "path": resources.model_dir(recipe.model.source),
                "folder": str(folder),
                "out": out or stack.enter_context(tempfile.TemporaryDirectory()),
                "batches": None,
            }
            if "rows" in self.takes:
                text = Path(folder, "train.jsonl").read_text(encoding="utf-8")
                objects["rows"] = [json.loads(line) for line in text.splitlines() if line.strip()]
            if self.takes & {"model", "adapted", "tokenizer"}:
                model, objects["tokenizer"] = self._given_model(recipe)
                if "adapted" in self.takes:
                    self.seed(recipe)
                    super().wire(model, recipe)
                objects["model"] = objects["adapted"] = model
            if batches is not None:
                raw = self._as_taken(batches)
                if "batches" in self.takes:
                    objects["batches"] = raw
                elif kind.draws is None:
                    raise Unsupported(
                        f"{self.name} draws its own batches: to train on others it must take "
                        "`batches`, or name the function that draws them (from_trainer(…, batches=))"
                    )
                else:
                    home = importlib.import_module(kind.draws.__module__)
                    stand_in = mock.patch.object(home, kind.draws.__name__, lambda *_, **__: raw)
                    stack.enter_context(stand_in)
            stack.enter_context(restored_calls(objects["path"]))
            stack.enter_context(_mlx.compiled(recipe.train.compile))
            stack.enter_context(mock.patch.object(sys, "argv", [self.name]))
            self._taken = False
            watch.run(lambda: call(kind.trainer, recipe, objects, f"trainer {title(kind.trainer)}"))
        if batches is not None and not self._taken:
            raise Unsupported(
                f"{self.name} does not train on the batches that are handed over: the function that "
                "from_trainer(…, batches=) names must be the one that it looks up in that module"
            )
        return watch

    def _as_taken(self, batches: Iterator[Batch]) -> Iterator[Any]:
        """Batches as the trainer's loss takes them: one array, or a tuple of several."""
        wanted = self._layout
        for ids, lengths in batches:
            self._taken = True
            made = wanted.arguments(ids, lengths) if wanted else (ids, lengths)
            yield made if len(made) > 1 else made[0]

    def _loss(self, watch: Watch, recipe: Recipe) -> Any:
        assert watch.loss is not None
        try:
            self._layout = layout(watch.loss, type(self).batch, watch.model_first)
        except UsageError as error:
            raise Unsupported(str(error)) from None
        if donor := self.donors.get("loss"):
            return donor.loss(recipe)
        function = watch.loss if watch.model_first else with_any_model(watch.loss, watch.model)
        return normalised(function, self._layout)

    def _rows(self, recipe: Recipe) -> list[list[int]]:
        """Training rows as the reference tokenizes them, by which a batch's rows are told apart."""
        tokenizer = self.tokenizer(recipe)
        rows = MlxPath.dataset(self, recipe, tokenizer)
        return [list(rows[index][0]) for index in range(len(rows))]

    def tokenizer(self, recipe: Recipe) -> Any:
        """The tokenizer that comes with the model, as mlx-lm loads it."""
        from mlx_lm.utils import load_tokenizer

        return load_tokenizer(Path(resources.model_dir(recipe.model.source)))

    def _drawn(self, steps: list[Step], rows: list[list[int]]) -> list[tuple[Array, Array]]:
        assert self._layout is not None
        return [
            self._layout.batch(forward.arguments, rows)
            for step in steps
            for forward in step.forwards
        ]

    # Live objects ------------------------------------------------------------------------------

    def setup(self, recipe: Recipe, adapter: Mapping[str, Array] | None = None) -> Setup:
        """What it has made when its first step begins, from a run without any update."""
        facts: dict[str, Any] = {}

        def begin(model: Any) -> None:
            facts["seed.rng"] = _mlx.rng_state()
            if adapter:
                transplant(model, adapter)

        first = recipe.override({"train.steps": 1})
        watch = self.watched(first, Watch(begin, stop_after=1, skip=True))
        loss = self._loss(watch, recipe)

        def iterate() -> Iterator[Batch]:
            import mlx.core as mx

            for ids, lengths in self._own_batches(recipe):
                yield mx.array(ids), mx.array(lengths)

        tokenizer = self.tokenizer(recipe)
        return Setup(watch.model, tokenizer, watch.optimizer, None, loss, iterate, None, facts)

    def _own_batches(self, recipe: Recipe) -> Iterator[tuple[Array, Array]]:
        """The micro-batches that it draws, from runs without updates, each longer than the last."""
        rows, count, done = self._rows(recipe), _FIRST, 0
        while True:
            longer = recipe.override({"train.steps": count})
            watch = self.watched(longer, Watch(stop_after=count, skip=True))
            found = self._drawn(watch.steps, rows)
            yield from found[done:]
            if len(watch.steps) < count:
                return
            done, count = len(found), count * 8

    def _given_model(self, recipe: Recipe) -> tuple[Any, Any]:
        """The model of path `mlx`, for a trainer that loads none; kept over calls as there."""
        if (key := model_key(recipe)) not in self._loaded:
            self._loaded = {key: super().load(recipe)}
            self._pristine = {key: Pristine(self._loaded[key][0])}
        return self._pristine[key].restore().eval(), self._loaded[key][1]

    def base(self, recipe: Recipe) -> tuple[Any, Any]:
        """The model that it loads, without the adapter that it puts in."""
        if "path" not in self.takes:
            return self._given_model(recipe)
        setup = self.setup(recipe)
        return without_adapter(setup.model).eval(), setup.tokenizer

    # What another path can take from it -----------------------------------------------------------

    def loss(self, recipe: Recipe) -> Loss:
        """Its live loss, which any model can be given to."""
        return self.setup(recipe).loss

    def optimizer(self, recipe: Recipe) -> Any:
        """Its live optimizer before the first update."""
        return self.setup(recipe).optimizer

    def load(self, recipe: Recipe) -> Any:
        """Not to be had by itself."""
        raise Unsupported(f"{self.name} is run as a whole: its loader cannot be run by itself")

    def wire(self, model: Any, recipe: Recipe) -> None:
        """Not to be had by itself."""
        raise Unsupported(f"{self.name} is run as a whole: its wiring cannot be run by itself")

    def dataset(self, recipe: Recipe, tokenizer: Any) -> Any:
        """Not to be had by itself."""
        raise Unsupported(f"{self.name} is run as a whole: its batching cannot be run by itself")

    def clip(self, recipe: Recipe) -> Any:
        """Not to be had by itself."""
        raise Unsupported(f"{self.name} is run as a whole: its clip cannot be run by itself")

    # Stages that are answered by a run of it ------------------------------------------------------

    def tokenization(self, recipe: Recipe, inputs: Trace) -> Trace:
        """Rows are seen in batches alone, in no order of their own."""
        raise Unsupported(
            f"{self.name} is run as a whole: its rows are seen in its batches (probe 09), not one by one"
        )

    def gradient(self, recipe: Recipe, inputs: Trace) -> Trace:
        """Of the live loss at the live model, taken outside of its step."""
        import mlx.core as mx
        import mlx.nn as nn

        if inputs.scalars.get("modules", False) or inputs.group("replace"):
            return super().gradient(recipe, inputs)
        setup = self.setup(one_step(recipe), inputs.group("adapter"))
        batch = mx.array(inputs.arrays["ids"]), mx.array(inputs.arrays["lengths"])
        (loss, tokens), tree = nn.value_and_grad(setup.model.train(), setup.loss)(
            setup.model, *batch
        )
        norm = _mlx.gradient_norm(tree)
        trace = Trace({"loss": to_numpy(loss), "norm": to_numpy(norm)}, {"tokens": tokens.item()})
        gradient = {canonical(k): to_numpy(v) for k, v in _mlx.flat(tree).items()}
        return trace.with_group("gradient", gradient)

    def optimizer_step(self, recipe: Recipe, inputs: Trace) -> Trace:
        """Its live optimizer; a clip stands in its loop, where no gradient can be fed."""
        if recipe.optim.clip != "none":
            raise Unsupported(f"{self.name} is run as a whole: no gradient can be fed to its clip")
        return super().optimizer_step(recipe, inputs)

    def train(self, recipe: Recipe, inputs: Trace) -> Trace:
        """A full run of it; its first step begins with the adapter that is handed over, if one is."""
        watch = self._trained(recipe, inputs)
        rows = self._rows(recipe)
        loss = self._loss(watch, recipe)
        trace, found = Trace(), self._drawn(watch.steps, rows)
        for index, (ids, lengths) in enumerate(found):
            trace.arrays[f"batches/ids.{index}"] = ids
            trace.arrays[f"batches/lengths.{index}"] = lengths
        for name, values in curve(watch, tokens_of(watch, found, loss)).items():
            trace.arrays[name] = np.asarray(values)
        return trace.with_group("adapter", _mlx.adapter(watch.model))

    def _trained(self, recipe: Recipe, inputs: Trace) -> Watch:
        adapter, handed = inputs.group("adapter"), given(inputs, recipe)
        if handed is not None and self._layout is None:
            self.setup(recipe)  # what its loss takes
        watch = Watch(_beginning(adapter), stop_after=recipe.train.steps)
        self.watched(recipe, watch, handed)
        if len(watch.steps) < recipe.train.steps:
            raise Unsupported(
                f"{self.name} made {len(watch.steps)} updates where train.steps={recipe.train.steps}"
            )
        return watch

    def loop(
        self, recipe: Recipe, setup: Setup, batches: Iterator[Batch]
    ) -> dict[str, list[float]]:
        """Nothing calls it: the trainer is run as a whole."""
        raise Unsupported(f"{self.name} is run as a whole: its loop cannot be run by itself")

    @contextlib.contextmanager
    def saved(
        self, recipe: Recipe, adapter: Mapping[str, Array], see: Callable[[Any], None]
    ) -> Iterator[Path]:
        """What it leaves in `out` of an adapter that no update changes."""
        self._saves()
        with tempfile.TemporaryDirectory() as out:
            once = recipe.override({"train.steps": 1})
            watch = Watch(lambda model: transplant(model, adapter), skip=True)
            self.watched(once, watch, out=out)
            see(watch.model)
            yield Path(out)

    @contextlib.contextmanager
    def trained(self, recipe: Recipe, inputs: Trace, see: Callable[[Any], None]) -> Iterator[Path]:
        """What it leaves in `out`, by a run whose steps nobody watches."""
        self._saves()
        adapter, handed = inputs.group("adapter"), given(inputs, recipe)
        if handed is not None and self._layout is None:
            self.setup(recipe)  # what its loss takes
        with tempfile.TemporaryDirectory() as out:
            watch = Watch(_beginning(adapter), passive=True)
            see(self.watched(recipe, watch, handed, out).model)
            yield Path(out)

    def reloaded(self, recipe: Recipe, folder: Path) -> Any:
        """As path `mlx` loads it; without a configuration beside it, its tensors into a fresh model."""
        from mlx_lm.tuner.utils import load_adapters

        if (folder / "adapter_config.json").exists():
            return load_adapters(super().load(recipe)[0], str(folder))
        files = sorted(folder.glob("*.safetensors"))
        if len(files) != 1:
            raise Unsupported(
                f"{self.name} leaves {len(files)} files of tensors and no configuration"
            )
        model = self.setup(recipe).model
        model.load_weights(str(files[0]), strict=False)
        return model

    def _saves(self) -> None:
        if "out" not in self.takes:
            raise Unsupported(f"{self.name} takes no `out`, a folder: what it saves is not seen")

    # Settings ----------------------------------------------------------------------------------

    def training_facts(self, recipe: Recipe, model: Any) -> dict[str, Any]:
        """Clip and accumulation, from gradients that are made short and long in steps of its own."""
        key = recipe.override({"seed.value": 0}).digest()
        if key not in self._measured:
            self._measured[key] = self._facts(recipe)
        return self._measured[key]

    def _facts(self, recipe: Recipe) -> dict[str, Any]:
        seen = Calls()
        with contextlib.ExitStack() as stack:
            quiet = self._one_update(
                recipe, QUIET, lambda model: stack.enter_context(calls(model, seen))
            )
        loud = self._one_update(recipe, LOUD, lambda _: None)
        tokens = tokens_of(
            quiet, self._drawn(quiet.steps, self._rows(recipe)), self._loss(quiet, recipe)
        )
        found = loop_facts(quiet, loud, tokens, recipe.model.dtype in HALF)
        return {**found, **seen.facts(), "train.compile": quiet.compiled and recipe.train.compile}

    def _one_update(self, recipe: Recipe, gain: float, begin: Callable[[Any], Any]) -> Watch:
        """A step on unlike micro-batches, or on its own where none can be handed over."""
        once = recipe.override({"train.steps": 1})
        unlike = itertools.cycle(given(micro_batches(2 * recipe.train.accumulation)) or ())
        for batches in (unlike, None):
            watch = Watch(begin, stop_after=1, gain=gain, gradients=True)
            try:
                return self.watched(once, watch, batches)
            except Unsupported:
                if batches is None:
                    raise
        raise AssertionError


def _beginning(adapter: Mapping[str, Array]) -> Callable[[Any], None]:
    """Hands an adapter over, if there is one, where the first step begins."""
    return (lambda model: transplant(model, adapter)) if adapter else (lambda _: None)


def make(
    run: Function,
    module: str,
    name: str = "",
    batches: Function | None = None,
    batch: Function | None = None,
    packages: tuple[str, ...] = (),
    fixed: Mapping[str, Any] | None = None,
    shipped: Function | None = None,
) -> type[TrainerPath]:
    """The path of a whole trainer; see `parity.plugin.from_trainer`.

    Raises:
        UsageError: It is no function, or takes what nobody can give.
    """
    given = {"run": run, "batches": batches, "batch": batch, "shipped": shipped}
    for what, function in given.items():
        if function is not None and not callable(function):
            raise UsageError(f"{what}={function!r} is no function")
    import inspect

    factors = factor_names()
    honoured = set(taken(run, OBJECTS, f"trainer {title(run)}"))
    takes = frozenset(inspect.signature(run).parameters) & set(OBJECTS)
    own = {*parts.TRAINING} - {"loader" if takes & {"model", "adapted"} else ""}
    own -= {"wiring" if "adapted" in takes else ""}
    honoured |= {"model.source", "train.compile", "decode.max_tokens"}
    if takes & {"folder", "rows"}:
        honoured.add("data.source")
    if "adapted" in takes:
        honoured |= {f for f in factors if f.startswith(("model.", "lora.", "seed.value"))}
    elif "model" in takes:
        honoured |= {f for f in factors if f.startswith("model.")}
    return type(
        "Path",
        (TrainerPath,),
        {
            "__module__": module,
            "__doc__": f"The trainer {title(run)}.",
            "name": name or getattr(run, "__name__", "trainer"),
            "trainer": staticmethod(run),
            "draws": staticmethod(batches) if batches else None,
            "batch": staticmethod(batch) if batch else None,
            "takes": takes,
            "packages": (*MlxPath.packages, *packages),
            "own_parts": tuple(part for part in parts.ALL if part in own),
            "honours": tuple(sorted(honoured)),
            "reads": staticmethod(shipped) if shipped else None,
            "fixed": dict(fixed or {}),
            "own_factors": tuple(
                f for f in factors if f not in {*honoured, *(fixed or {})} and "decode" not in f
            ),
            "patches": True,
        },
    )
