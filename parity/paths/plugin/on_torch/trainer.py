"""A whole trainer on torch as a path: the stages that a run of it can answer."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from parity.errors import Unsupported
from parity.paths import parts
from parity.paths.hf import live as _torch
from parity.paths.hf import readback
from parity.paths.hf.live import IGNORED, Batch
from parity.paths.hf.observed import seeding
from parity.paths.hf.path import HfPath
from parity.paths.loss_settings import denominator, loss_batches
from parity.paths.measured import seed_facts, unknown
from parity.paths.plugin.on_torch.arrays import OwnBatch
from parity.paths.plugin.on_torch.facts import training_facts
from parity.paths.plugin.on_torch.parts import NoSchedule, operations
from parity.paths.plugin.on_torch.running import RunningTrainer, beginning
from parity.paths.plugin.on_torch.seen import Forward, curve
from parity.paths.plugin.on_torch.watch import TorchWatch
from parity.recipe import Recipe
from parity.trace import Array, Trace

SHOWN = 8
"""Micro-batches that the effective configuration describes."""
_NO_LOGITS = "its loss takes no logits from the head of its model: what it supervises is not seen"


class TorchTrainerPath(RunningTrainer):
    """What `from_trainer` makes on torch: subclasses hold the function. None of its parts can be swapped."""

    stands_on: ClassVar[str] = "hf"
    takes_parts: ClassVar[tuple[str, ...]] = ()

    def environment(self) -> dict[str, Any]:
        """That of `hf`, and which parts are of whom."""
        return {**super().environment(), "parts": {"own": list(self.own_parts), "others": "hf"}}

    # Data ----------------------------------------------------------------------------------------

    def iterate(self, recipe: Recipe, tokenizer: Any) -> Iterator[Batch]:
        """The micro-batches that it draws, from a run without updates that is as long as the recipe."""
        for ids, lengths, _ in self._own(recipe):
            yield ids, lengths

    def _own(self, recipe: Recipe) -> list[OwnBatch]:
        watch = self.watched(recipe, TorchWatch(stop_after=recipe.train.steps, skip=True))
        return self.drawn(recipe, (f for step in watch.steps for f in step.forwards))

    def supervised_positions(self, recipe: Recipe, inputs: Trace) -> Trace:
        """Of batches that are handed over, or of its own: where its loss moves with the logits."""
        handed = list(_torch.given(inputs) or ())
        count = len(handed) or inputs.scalars.get("count", 0)
        forwards = self._forwards(recipe, count, handed)
        trace, targets = Trace(), set[int]()
        batches = ((ids, lengths) for ids, lengths, _ in self.drawn(recipe, forwards))
        for index, _ in enumerate(_torch.recorded(trace, batches, prefix="")):
            found = _positions(forwards[index])
            trace.arrays[f"supervised.{index}"] = found
            targets |= set(found[:, 2].tolist())
        tokenizer = self.tokenizer(recipe)
        trace.scalars["pieces"] = {str(i): tokenizer.decode([i]) for i in sorted(targets)}
        return trace

    def _forwards(self, recipe: Recipe, count: int, handed: list[Batch]) -> list[Forward]:
        """Forward passes of a run without updates, each with what its loss supervises."""
        steps = -(-count // recipe.train.accumulation)
        batches = itertools.cycle(self.handed(recipe, handed)) if handed else None
        watch = TorchWatch(stop_after=steps, skip=True, logits=True)
        self.watched(recipe.override({"train.steps": steps}), watch, batches)
        found = [forward for step in watch.steps for forward in step.forwards][:count]
        if any(forward.seen is None for forward in found):
            raise Unsupported(f"{self.name}: {_NO_LOGITS}")
        return found

    def cross_entropy(self, recipe: Recipe, inputs: Trace) -> Trace:
        """Steps of it in which the head of its model gives the logits that are handed over."""
        import torch

        ids, lengths = inputs.arrays["ids"], inputs.arrays["lengths"]
        logits = torch.tensor(inputs.arrays["logits"]).to(getattr(torch, recipe.model.dtype))
        width, alone = ids.shape[1] - 1, np.array([[0, 2]], np.int32)
        places = list(np.ndindex(len(ids), width))  # each is a batch of its own as well
        steps = 1 + len(places)
        handed = [(ids, lengths), *((ids[r : r + 1, at : at + 2], alone) for r, at in places)]
        single = [logits[r : r + 1, at : at + 1] for r, at in places]
        watch = TorchWatch(
            stop_after=steps,
            skip=True,
            logits=True,
            given_logits=itertools.cycle([logits, *single]),
        )
        long = recipe.override({"train.steps": steps, "train.accumulation": 1})
        plain = recipe.override({"mask.start_shift": 0, "mask.end_shift": 0})
        first, rest = self.handed(recipe, handed[:1]), self.handed(plain, handed[1:])
        self.watched(long, watch, itertools.cycle([*first, *rest]))
        forwards = [forward for step in watch.steps for forward in step.forwards]
        if (seen := forwards[0]).seen is None:
            raise Unsupported(f"{self.name}: {_NO_LOGITS}")
        supervised = seen.seen.positions[:, :width]
        dtype = _torch.loss_dtype(recipe)
        arrays = {
            "loss": np.asarray(seen.loss, dtype),
            "token_loss": np.array([f.loss for f in forwards[1:steps]], dtype).reshape(-1, width),
            "supervised": supervised,
            "targets": np.where(supervised, seen.seen.targets[:, :width], -1).astype(np.int32),
        }
        return Trace(arrays, {"tokens": int(supervised.sum())})

    # Training ------------------------------------------------------------------------------------

    def lora_init(self, recipe: Recipe, inputs: Trace) -> Trace:
        """The adapter when its first step begins."""
        return readback.adapter_trace(self.begun(recipe).model)

    def gradient(self, recipe: Recipe, inputs: Trace) -> Trace:
        """Of one backward pass of a step of it, before any clip."""
        if inputs.scalars.get("modules", False) or inputs.group("replace"):
            raise Unsupported(f"{self.name} is run as a whole: its modules are not watched")
        batch = inputs.arrays["ids"], inputs.arrays["lengths"]
        [made] = self.handed(recipe, [batch])
        found = self.one_gradient(recipe, inputs.group("adapter"), made)
        dtype = _torch.loss_dtype(recipe)
        arrays = {name: np.asarray(found[name], dtype) for name in ("loss", "norm")}
        trace = Trace(arrays, {"tokens": found["tokens"]})
        return trace.with_group("gradient", found["gradient"])

    def one_gradient(
        self, recipe: Recipe, adapter: Mapping[str, Array] | None, batch: OwnBatch
    ) -> dict[str, Any]:
        """Loss, gradient, its norm, and tokens of one batch.

        Raises:
            Unsupported: A step of it takes several batches, so that one shows a share of its gradient.
        """
        once = recipe.override({"lora.dropout": 0.0, "train.steps": 1, "train.accumulation": 1})
        watch = TorchWatch(beginning(adapter), stop_after=1, skip=True, gradients=True, logits=True)
        self.watched(once, watch, itertools.repeat(batch))
        [step] = watch.steps
        if len(step.forwards) > 1:
            raise Unsupported(f"{self.name} makes a step of {len(step.forwards)} micro-batches")
        [forward] = step.forwards
        [counted] = self._tokens_of(once, [forward])
        return {
            "loss": forward.loss, "gradient": forward.gradient, "norm": step.norm, "tokens": counted,
        }  # fmt: skip

    def optimizer_step(self, recipe: Recipe, inputs: Trace) -> Trace:
        """Its live optimizer, made once more for the weights that are handed over."""
        o = recipe.optim
        if o.clip != "none" or o.schedule != "constant" or o.warmup_steps:
            raise Unsupported(
                f"{self.name} is run as a whole: no gradient can be fed to its clip or schedule"
            )
        watch = TorchWatch(stop_after=1, gradients=True)
        before: dict[str, Array] = {}
        watch.begin = lambda model: before.update(_torch.adapter(model))
        self.watched(recipe.override({"train.steps": 1, "train.accumulation": 1}), watch)
        fed = Trace().with_group("weight", before).with_group("gradient.0", watch.steps[0].given)
        moved = super().optimizer_step(recipe, fed).group("weight.0")
        self.moved_by_optimizer(before, moved, _torch.adapter(watch.model))
        return super().optimizer_step(recipe, inputs)

    def optimizer(self, recipe: Recipe, parameters: list[Any]) -> tuple[Any, Any]:
        """One of the class and options of its live optimizer; its schedule stands in its loop."""
        live = self.begun(recipe).optimizer
        takes = inspect.signature(type(live)).parameters
        group = {k: v for k, v in live.param_groups[0].items() if k in takes and k != "params"}
        return type(live)(parameters, **group), NoSchedule()

    def clip(self, recipe: Recipe) -> Any:
        """None that can be had by itself: see `optimizer_step`."""
        return None

    def train(self, recipe: Recipe, inputs: Trace) -> Trace:
        """A full run of it; its first step begins with the adapter that is handed over, if one is."""
        handed = list(_torch.given(inputs, recipe) or ())
        count = recipe.train.steps * recipe.train.accumulation
        batches = self.handed(recipe, handed[:count]) if handed else None
        adapter = inputs.group("adapter")
        watch = TorchWatch(beginning(adapter), stop_after=recipe.train.steps)
        self.watched(recipe, watch, batches)
        self.ended(recipe, len(watch.steps))
        forwards = [forward for step in watch.steps for forward in step.forwards]
        drawn = [(ids, lengths) for ids, lengths, _ in self.drawn(recipe, forwards)]
        for (ids, _), (trained, _) in zip(handed, drawn, strict=False):
            if not np.array_equal(ids, trained):
                raise Unsupported(f"{self.name} trains on other batches than were handed over")
        trace = Trace()
        for _ in _torch.recorded(trace, iter(handed[: len(drawn)] or drawn)):
            pass
        found = curve(watch.steps, self._tokens_of(recipe, forwards))
        trace.arrays |= {name: np.asarray(values) for name, values in found.items()}
        return trace.with_group("adapter", _torch.adapter(watch.model))

    def _tokens_of(self, recipe: Recipe, forwards: list[Forward]) -> list[int]:
        """Supervised tokens of each pass: its loss's where that was seen, else those of the labels."""
        return [
            int(f.seen.positions.sum()) if f.seen is not None else int((t != IGNORED).sum())
            for f, (_, _, t) in zip(forwards, self.drawn(recipe, forwards), strict=True)
        ]

    # What it saves -------------------------------------------------------------------------------

    @contextlib.contextmanager
    def saved(
        self, recipe: Recipe, adapter: Mapping[str, Array], see: Callable[[Any], None]
    ) -> Iterator[Path]:
        """What it leaves in `out` of an adapter that no update changes."""
        self.saves()
        with tempfile.TemporaryDirectory() as out:
            once = recipe.override({"train.steps": 1})
            watch = TorchWatch(beginning(adapter), skip=True)
            self.watched(once, watch, out=out)
            see(watch.model)
            yield _adapter_in(Path(out))

    @contextlib.contextmanager
    def trained(self, recipe: Recipe, inputs: Trace, see: Callable[[Any], None]) -> Iterator[Path]:
        """What it leaves in `out`, by a run whose steps nobody watches."""
        self.saves()
        handed = _torch.given(inputs, recipe)
        batches = self.handed(recipe, handed) if handed is not None else None
        with tempfile.TemporaryDirectory() as out:
            watch = TorchWatch(beginning(inputs.group("adapter")), passive=True)
            see(self.watched(recipe, watch, batches, out).model)
            yield _adapter_in(Path(out))

    # Settings ------------------------------------------------------------------------------------

    def _config(self, recipe: Recipe) -> Trace:
        with seeding() as events:
            model = self.begun(recipe).model
        seed = seed_facts(events)
        facts = readback.model_facts(model, recipe)
        watch = TorchWatch(stop_after=recipe.train.steps, skip=True, logits=True)
        self.watched(recipe, watch)
        forwards = [f for step in watch.steps for f in step.forwards][:SHOWN]
        drawn = self.drawn(recipe, forwards)
        supervised = _positions(forwards[0])
        measured = training_facts(self, recipe)
        group = watch.optimizer.param_groups[0]
        betas = [float(beta) for beta in group.get("betas", ())]
        scalars = {
            **facts,
            "optim.class": type(watch.optimizer).__name__,
            "optim.betas": betas,
            "optim.eps": group.get("eps"),
            "optim.weight_decay": float(group.get("weight_decay", 0.0)),
            # torch's Adam knows no other way and so has no setting to read
            "optim.bias_correction": True if betas else None,
            "optim.lr": [step.rate for step in watch.steps],
            **readback.batch_facts([(ids, lengths) for ids, lengths, _ in drawn], supervised),
            "loss.denominator": self._denominator(recipe),
            **seed,
            **measured,
        }
        return Trace({"supervised": supervised}, scalars)

    def _denominator(self, recipe: Recipe) -> Any:
        """What its loss divides by, from steps of one micro-batch each."""
        handed = loss_batches()
        try:
            forwards = self._forwards(
                recipe.override({"train.accumulation": 1}), len(handed), handed
            )
        except Unsupported as error:
            return unknown(error)
        weights = []
        for forward, (ids, lengths) in zip(forwards, handed, strict=True):
            assert forward.seen is not None
            weights.append((forward.seen.weights[:, : ids.shape[1] - 1], lengths))
        return denominator(weights)


def _adapter_in(folder: Path) -> Path:
    """Where an adapter lies that PEFT can load."""
    found = [file.parent for file in folder.rglob("adapter_config.json")]
    if not found:
        raise Unsupported("it leaves no adapter_config.json: PEFT cannot load what it saves")
    return min(found, key=lambda path: len(path.parts))


def _positions(forward: Forward) -> Array:
    """(row, position, target id) of what a pass supervises, (K, 3) int64."""
    if forward.seen is None:
        raise Unsupported(_NO_LOGITS)
    where = np.argwhere(forward.seen.positions)
    targets = forward.seen.targets[tuple(where.T)]
    return np.column_stack([where, targets]).astype(np.int64)


def make(own: Mapping[str, Any], packages: tuple[str, ...]) -> type[TorchTrainerPath]:
    """The path of a whole trainer; see `parity.plugin.from_trainer`."""
    return type(
        "Path",
        (TorchTrainerPath,),
        {
            **own,
            "packages": (*HfPath.packages, *packages),
            "takes_parts": (),
            "operations": operations(parts.TRAINING, own["name"]),
        },
    )
