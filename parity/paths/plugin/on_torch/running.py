"""A whole trainer on torch, run under watch, with batches and models handed over."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from parity.errors import Unsupported
from parity.paths.describe import model_key
from parity.paths.hf import live as _torch
from parity.paths.hf.live import IGNORED, Batch, ids_tensor
from parity.paths.hf.path import HfPath
from parity.paths.hf.tensors import trainable, transplant
from parity.paths.plugin.on_torch.arrays import OwnBatch, own_batch
from parity.paths.plugin.on_torch.seen import Forward
from parity.paths.plugin.on_torch.watch import TorchWatch
from parity.paths.plugin.whole import WholeTrainer
from parity.recipe import Recipe
from parity.trace import Array


class RunningTrainer(WholeTrainer, HfPath):
    """Runs the function of a trainer on torch."""

    def __init__(self, cache: Path) -> None:
        super().__init__(cache)
        self._tokens: dict[str, list[list[int]]] = {}

    def watched(
        self,
        recipe: Recipe,
        watch: TorchWatch,
        batches: Iterable[OwnBatch] | None = None,
        out: str | None = None,
    ) -> TorchWatch:
        """Runs the trainer under watch, on batches that are handed over if there are any.

        Raises:
            Unsupported: It cannot be watched, or trains on other batches.
        """
        if batches is not None:
            watch.batches, watch.form = iter(batches), self._as_drawn
        with self.objects(recipe, out) as objects, contextlib.ExitStack() as stack:
            if self.takes & {"model", "adapted", "tokenizer"}:
                objects["tokenizer"] = super().read_tokenizer(recipe)
            if self.takes & {"model", "adapted"}:
                enter = super().adapted if "adapted" in self.takes else super().pristine
                objects["model"] = objects["adapted"] = stack.enter_context(enter(recipe))
            if batches is not None and "batches" in self.takes:
                objects["batches"] = watch.handed()
            else:
                stack.enter_context(
                    self.drawing(lambda own: lambda *a, **k: watch.draw(iter(own(*a, **k))))
                )
            watch.run(lambda: self.called(recipe, objects))
        if batches is not None and not watch.drawn:
            raise Unsupported(
                f"{self.name} does not train on the batches that are handed over: it draws them from "
                "no DataLoader of torch; let it take `batches`, or name the function that draws them "
                "(from_trainer(…, batches=))"
            )
        return watch

    def _as_drawn(self, example: Any, made: OwnBatch) -> Any:
        """A batch in the form of one that the trainer draws."""
        import torch

        ids, lengths, targets = made
        labels = np.pad(targets, ((0, 0), (1, 0)), constant_values=IGNORED)
        row = {
            "input_ids": ids_tensor(ids),
            "attention_mask": ids_tensor(np.arange(ids.shape[1]) < lengths[:, 1:]),
            "labels": ids_tensor(labels),
        }
        if (write := type(self).batch) is not None:
            return write(row["input_ids"], ids_tensor(lengths), row["labels"])
        if example is None:
            return row
        if isinstance(example, Mapping):
            strange = [
                k for k, v in example.items() if isinstance(v, torch.Tensor) and k not in row
            ]
            if strange:
                raise Unsupported(
                    f"its batches hold {', '.join(strange)}, which cannot be told: give `batch=`"
                )
            return {key: row.get(key, value) for key, value in example.items()}
        parts = example if isinstance(example, (tuple, list)) else [example]
        second = parts[1] if len(parts) == 2 else None
        if second is None or len(parts) > 2:
            raise Unsupported("what its batches hold cannot be told: give `batch=`")
        is_labels = second.shape == parts[0].shape
        pair = lengths if second.ndim == 2 else lengths[:, 1]
        return row["input_ids"], row["labels"] if is_labels else ids_tensor(pair)

    def drawn(self, recipe: Recipe, forwards: Iterable[Forward]) -> list[OwnBatch]:
        """Ids, lengths and targets of the batches of forward passes."""
        known = self._known(recipe)
        labels = partial(_torch.labels, recipe)
        return [own_batch(forward.raw, known, labels) for forward in forwards]

    def _known(self, recipe: Recipe) -> list[list[int]]:
        """Training rows as the reference tokenizes them, by which the length of a row is told."""
        key = recipe.override({"train.steps": 1}).digest()
        if key not in self._tokens:
            rows = _torch.rows(recipe, super().read_tokenizer(recipe))
            self._tokens = {key: [ids for ids, _ in rows]}
        return self._tokens[key]

    def handed(self, recipe: Recipe, batches: Iterable[Batch]) -> Iterator[OwnBatch]:
        """Batches of a recipe's mask as the trainer is handed them."""
        for ids, lengths in batches:
            yield ids, lengths, _torch.labels(recipe, ids, lengths)

    def begun(
        self, recipe: Recipe, adapter: Mapping[str, Array] | None = None, **more: Any
    ) -> TorchWatch:
        """What it has made when its first step begins, from a run without any update."""
        first = recipe.override({"train.steps": 1})
        watch = TorchWatch(beginning(adapter), stop_after=1, skip=True, **more)
        return self.watched(first, watch)

    @contextlib.contextmanager
    def adapted(self, recipe: Recipe, adapter: Mapping[str, Array] | None = None) -> Iterator[Any]:
        """The model that it trains, as it is when its first step begins."""
        yield self.begun(recipe, adapter).model

    @contextlib.contextmanager
    def pristine(self, recipe: Recipe) -> Iterator[Any]:
        """The model that it loads, without the adapter that it puts in."""
        if "path" not in self.takes:
            with super().pristine(recipe) as model:
                yield model
            return
        key = ("trainer", *model_key(recipe))
        if key not in self._bases:
            model = self.begun(recipe).model
            self._keep(key, (model.unload() if hasattr(model, "unload") else model).eval())
        yield self._bases[key]


def beginning(adapter: Mapping[str, Array] | None) -> Any:
    """Hands an adapter over, if there is one, where the first step begins."""
    return lambda model: transplant(trainable(model), adapter) if adapter else None
