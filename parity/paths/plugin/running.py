"""A whole trainer on MLX, run under watch, with batches and models handed over."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from parity import resources
from parity.errors import Unsupported, UsageError
from parity.paths.describe import model_key
from parity.paths.measured import HALF, Calls, micro_batches
from parity.paths.mlx import live as _mlx
from parity.paths.mlx.live import Batch
from parity.paths.mlx.observed import calls
from parity.paths.mlx.path import MlxPath
from parity.paths.mlx.pristine import Pristine
from parity.paths.mlx.traces import given
from parity.paths.plugin.arrays import Layout, layout
from parity.paths.plugin.facts import LOUD, QUIET, loop_facts, tokens_of
from parity.paths.plugin.live import in_place, restored_calls
from parity.paths.plugin.loss import normalised, with_any_model
from parity.paths.plugin.watch import Step, Watch
from parity.paths.plugin.whole import WholeTrainer
from parity.recipe import Recipe
from parity.trace import Array


class RunningTrainer(WholeTrainer, MlxPath):
    """Runs the function of a trainer on MLX."""

    def __init__(self, cache: Path) -> None:
        super().__init__(cache)
        self._layout: Layout | None = None
        self._taken = 0

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
        with self.objects(recipe, out) as objects, contextlib.ExitStack() as stack:
            if self.takes & {"model", "adapted", "tokenizer"}:
                model, objects["tokenizer"] = self.given_model(recipe)
                if "adapted" in self.takes:
                    self.seed(recipe)
                    super().wire(model, recipe)
                objects["model"] = objects["adapted"] = model
            if batches is not None:
                raw = self._as_taken(batches)
                if "batches" in self.takes:
                    objects["batches"] = raw
                elif kind.draws is None:
                    self.draws_others()
                else:
                    stack.enter_context(self.drawing(lambda _: lambda *_, **__: raw))
            stack.enter_context(restored_calls(objects["path"]))
            stack.enter_context(_mlx.compiled(recipe.train.compile))
            self._taken = 0
            watch.run(lambda: self.called(recipe, objects))
        if batches is not None:
            self.did_take(self._taken)
        return watch

    def _as_taken(self, batches: Iterator[Batch]) -> Iterator[Any]:
        """Batches as the trainer's loss takes them: one array, or a tuple of several."""
        wanted = self._layout
        for ids, lengths in batches:
            self._taken += 1
            made = wanted.arguments(ids, lengths) if wanted else (ids, lengths)
            yield made if len(made) > 1 else made[0]

    def live_loss(self, watch: Watch, recipe: Recipe) -> Any:
        """The loss that a watched run trained with, under the signature of mlx-lm's."""
        assert watch.loss is not None
        try:
            self._layout = layout(watch.loss, type(self).batch, watch.model_first)
        except UsageError as error:
            raise Unsupported(str(error)) from None
        if donor := self.donors.get("loss"):
            return donor.loss(recipe)
        function = watch.loss if watch.model_first else with_any_model(watch.loss, watch.model)
        return normalised(function, self._layout)

    def rows(self, recipe: Recipe) -> list[list[int]]:
        """Training rows as the reference tokenizes them, by which a batch's rows are told apart."""
        tokenizer = self.tokenizer(recipe)
        rows = MlxPath.dataset(self, recipe, tokenizer)
        return [list(rows[index][0]) for index in range(len(rows))]

    def tokenizer(self, recipe: Recipe) -> Any:
        """The tokenizer that comes with the model, as mlx-lm loads it."""
        from mlx_lm.utils import load_tokenizer

        return load_tokenizer(Path(resources.model_dir(recipe.model.source)))

    def drawn(self, steps: list[Step], rows: list[list[int]]) -> list[tuple[Array, Array]]:
        """Ids and lengths of the micro-batches of watched steps."""
        assert self._layout is not None
        return [
            self._layout.batch(forward.arguments, rows)
            for step in steps
            for forward in step.forwards
        ]

    def given_model(self, recipe: Recipe) -> tuple[Any, Any]:
        """The model of path `mlx`, for a trainer that loads none; kept over calls as there."""
        if (key := model_key(recipe)) not in self._loaded:
            self._loaded = {key: super().load(recipe)}
            self._pristine = {key: Pristine(self._loaded[key][0])}
        return self._pristine[key].restore().eval(), self._loaded[key][1]

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
        loss = self.live_loss(quiet, recipe)
        tokens = tokens_of(quiet, self.drawn(quiet.steps, self.rows(recipe)), loss)
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
