"""A whole trainer as a path: a function that is run in full, and watched from outside."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from parity.errors import Unsupported, UsageError
from parity.names import canonical
from parity.paths.mlx import live as _mlx
from parity.paths.mlx.live import Batch, Loss, Setup, to_numpy
from parity.paths.mlx.path import MlxPath
from parity.paths.mlx.pristine import without_adapter
from parity.paths.mlx.settings import one_step
from parity.paths.mlx.traces import given, optimizer_trace
from parity.paths.plugin.facts import curve, tokens_of
from parity.paths.plugin.given import Function
from parity.paths.plugin.live import transplant
from parity.paths.plugin.running import RunningTrainer
from parity.paths.plugin.watch import Watch
from parity.paths.plugin.whole import declared
from parity.paths.protocol import TrainingPath
from parity.recipe import Recipe
from parity.trace import Array, Trace

_FIRST = 8
"""Micro-batches that are looked at first; more are drawn by running it anew."""


class TrainerPath(RunningTrainer):
    """What `from_trainer` makes: subclasses hold the function."""

    stands_on: ClassVar[str] = "mlx"
    takes_parts: ClassVar[tuple[str, ...]] = ("loss",)

    def environment(self) -> dict[str, Any]:
        """That of `mlx`, and which parts are of whom."""
        return {**super().environment(), "parts": {"own": list(self.own_parts), "others": "mlx"}}

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
        loss = self.live_loss(watch, recipe)

        def iterate() -> Iterator[Batch]:
            import mlx.core as mx

            for ids, lengths in self._own_batches(recipe):
                yield mx.array(ids), mx.array(lengths)

        tokenizer = self.tokenizer(recipe)
        return Setup(watch.model, tokenizer, watch.optimizer, None, loss, iterate, None, facts)

    def _own_batches(self, recipe: Recipe) -> Iterator[tuple[Array, Array]]:
        """The micro-batches that it draws, from runs without updates, each longer than the last."""
        rows, count, done = self.rows(recipe), _FIRST, 0
        while True:
            longer = recipe.override({"train.steps": count})
            watch = self.watched(longer, Watch(stop_after=count, skip=True))
            found = self.drawn(watch.steps, rows)
            yield from found[done:]
            if len(watch.steps) < count:
                return
            done, count = len(found), count * 8

    def base(self, recipe: Recipe) -> tuple[Any, Any]:
        """The model that it loads, without the adapter that it puts in."""
        if "path" not in self.takes:
            return self.given_model(recipe)
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
        self.not_alone("loader")

    def wire(self, model: Any, recipe: Recipe) -> None:
        """Not to be had by itself."""
        self.not_alone("wiring")

    def dataset(self, recipe: Recipe, tokenizer: Any) -> Any:
        """Not to be had by itself."""
        self.not_alone("batching")

    def clip(self, recipe: Recipe) -> Any:
        """Not to be had by itself."""
        self.not_alone("clip")

    # Stages that are answered by a run of it ------------------------------------------------------

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
        before: dict[str, Array] = {}
        watch = Watch(
            lambda model: before.update(_mlx.adapter(model)), stop_after=1, gradients=True
        )
        once = recipe.override({"train.steps": 1, "train.accumulation": 1})
        self.watched(once, watch)
        fed = Trace().with_group("weight", before).with_group("gradient.0", watch.steps[0].given)
        moved = self._fed(once, fed).group("weight.0")
        self.moved_by_optimizer(before, moved, _mlx.adapter(watch.model))
        return self._fed(recipe, inputs)

    def _fed(self, recipe: Recipe, inputs: Trace) -> Trace:
        import mlx.core as mx

        optimizer = self.optimizer(recipe)
        # A trainer may have made its state for its own weights already.
        optimizer.init({name: mx.array(value) for name, value in inputs.group("weight").items()})
        return optimizer_trace(optimizer, None, inputs)

    def train(self, recipe: Recipe, inputs: Trace) -> Trace:
        """A full run of it; its first step begins with the adapter that is handed over, if one is."""
        watch = self._trained(recipe, inputs)
        rows = self.rows(recipe)
        loss = self.live_loss(watch, recipe)
        trace, found = Trace(), self.drawn(watch.steps, rows)
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
        self.ended(recipe, len(watch.steps))
        several = [step for step in watch.steps if len(step.forwards) > 1]
        if several and not any(step.clip_seen for step in several):
            clip = self.training_facts(recipe, watch.model)["clip.mode"]
            if clip != "none":
                raise Unsupported(
                    f"{self.name} clips ({clip}) what it makes of several micro-batches, by no "
                    "`clip_grad_norm` of mlx.optimizers: its gradient norm before the clip is not seen"
                )
        return watch

    def loop(
        self, recipe: Recipe, setup: Setup, batches: Iterator[Batch]
    ) -> dict[str, list[float]]:
        """Nothing calls it: the trainer is run as a whole."""
        self.not_alone("loop")

    @contextlib.contextmanager
    def saved(
        self, recipe: Recipe, adapter: Mapping[str, Array], see: Callable[[Any], None]
    ) -> Iterator[Path]:
        """What it leaves in `out` of an adapter that no update changes."""
        self.saves()
        with tempfile.TemporaryDirectory() as out:
            once = recipe.override({"train.steps": 1})
            watch = Watch(lambda model: transplant(model, adapter), skip=True)
            self.watched(once, watch, out=out)
            see(watch.model)
            yield Path(out)

    @contextlib.contextmanager
    def trained(self, recipe: Recipe, inputs: Trace, see: Callable[[Any], None]) -> Iterator[Path]:
        """What it leaves in `out`, by a run whose steps nobody watches."""
        self.saves()
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
    framework: str = "mlx",
) -> type[TrainingPath]:
    """The path of a whole trainer; see `parity.plugin.from_trainer`.

    Raises:
        UsageError: It is no function, or takes what nobody can give.
    """
    own = declared(run, module, name, batches, batch, fixed, shipped)
    if framework == "torch":
        from parity.paths.plugin.on_torch.trainer import make as made

        return made(own, packages)
    if framework != "mlx":
        raise UsageError(f"framework={framework!r}: give mlx or torch")
    return type("Path", (TrainerPath,), own | {"packages": (*MlxPath.packages, *packages)})
