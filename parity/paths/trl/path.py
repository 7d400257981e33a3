"""Path `trl`: TRL's SFTTrainer with PEFT, the control between MLX and a plain torch loop.

The base model, LoRA's configuration, the tokenizer and decoding are those of path `hf`.
Tokenization, collation, order, seeding, loss, clip, optimizer, schedule and loop are the trainer's.
Two things make `trl` and `hf` differ by rounding, and nothing else does: the trainer's loss projects
hidden states and takes the logarithm of the softmax in one function of its own, and its forward pass
covers the last position of a row as well, which no target follows.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import itertools
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from parity import resources
from parity.errors import Unsupported
from parity.paths.hf import live as _torch
from parity.paths.hf import readback, wiring
from parity.paths.hf.live import Batch, Loss
from parity.paths.hf.observed import seeding
from parity.paths.hf.path import HfPath
from parity.paths.hf.stages import SHOWN
from parity.paths.hf.tensors import trainable, transplant
from parity.paths.hf.work import supervised_positions
from parity.paths.measured import seed_facts
from parity.paths.plugin.on_torch.seen import curve
from parity.paths.trl import settings
from parity.paths.trl import trainer as _trl
from parity.recipe import Recipe
from parity.trace import Array, Trace

_FUSED = "SFTTrainer computes head and loss in one function of its own"


class TrlPath(HfPath):
    """Fine-tuning with TRL's SFTTrainer."""

    name: ClassVar[str] = "trl"
    packages: ClassVar[tuple[str, ...]] = (*HfPath.packages, "trl", "accelerate", "datasets")
    release: ClassVar[str] = "trl"
    own_parts: ClassVar[tuple[str, ...]] = ()  # one trainer makes and uses them all
    takes_parts: ClassVar[tuple[str, ...]] = ()
    operations: ClassVar[Mapping[str, str]] = {
        "config": "SFTTrainer makes other batches",
        "cross_entropy": _FUSED,
        "gradient": _FUSED,
        "loss_curve": _FUSED,
        "greedy_decode": _FUSED,
    }

    fixed: ClassVar[Mapping[str, Any]] = {
        **HfPath.fixed,
        "train.accumulation_weighting": "token",
        "optim.momentum": 0.0,
    }

    @classmethod
    def refused(cls, recipe: Recipe) -> dict[str, str]:
        """See `TrainingPath.refused`."""
        found = {}
        if recipe.lora.kind == "full":
            found["lora.kind"] = "mlx-parity runs SFTTrainer with an adapter only (lora.kind=full)"
        if recipe.optim.name == "adam":
            found["optim.name"] = "SFTConfig has no Adam without decoupled decay (optim.name=adam)"
        if recipe.optim.clip == "value":
            found["optim.clip"] = "SFTTrainer clips by norm only (optim.clip=value)"
        return found

    def __init__(self, cache: Path) -> None:
        # Read when huggingface_hub is imported: a probe reports to nobody.
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
        super().__init__(cache)

    def shipped(self) -> dict[str, Any]:
        """Defaults of the live SFTConfig and LoraConfig."""
        lora = {k: v for k, v in super().shipped().items() if k.startswith("lora.")}
        return lora | settings.shipped()

    def documents(self) -> dict[str, Any]:
        """From the docstrings of SFTConfig, TrainingArguments and LoraConfig."""
        lora = {k: v for k, v in super().documents().items() if k.startswith("lora.")}
        return lora | settings.documents()

    # The trainer -------------------------------------------------------------------------------

    @contextlib.contextmanager
    def trainer(
        self,
        recipe: Recipe,
        adapter: Mapping[str, Array] | None = None,
        batches: list[Batch] | None = None,
    ) -> Iterator[Any]:
        """A live SFTTrainer, ready to train on its own batches or on those handed over.

        Raises:
            Unsupported: A factor it has no setting for.
        """
        self._check(recipe)
        rows = _trl.given_rows(recipe, batches) if batches else _trl.own_rows(recipe)
        with (
            tempfile.TemporaryDirectory() as folder,
            self.pristine(recipe) as base,
        ):
            from trl import SFTConfig, SFTTrainer

            early = recipe.seed.placement == "before_load"
            trainer = SFTTrainer(
                # The trainer patches the model it is given, so it gets one of its own.
                model=resources.model_dir(recipe.model.source) if early else copy.deepcopy(base),
                args=SFTConfig(folder, **settings.arguments(recipe, batches, early)),
                train_dataset=rows,
                processing_class=self.tokenizer(recipe),
                peft_config=wiring.lora_config(base, recipe),
            )
            try:
                if adapter:
                    transplant(trainable(trainer.model), adapter)
                yield trainer
            finally:
                del trainer
                gc.collect()  # trainer, callbacks and model hold each other

    def _check(self, recipe: Recipe) -> None:
        import torch

        kind = _torch.device().type
        for wrong, reason in (
            (recipe.model.dtype == "float64", "the loss of SFTTrainer is summed in float32"),
            (
                recipe.seed.placement == "before_load" and recipe.model.weights != "stored",
                "SFTTrainer loads weights as they are stored (model.weights)",
            ),
            (kind not in ("cpu", "cuda"), f"SFTTrainer is run on cpu or cuda, not on {kind}"),
            (
                kind == "cuda" and torch.cuda.device_count() > 1,
                "SFTTrainer wants one visible GPU: set CUDA_VISIBLE_DEVICES",
            ),
        ):
            if wrong:
                raise Unsupported(reason)

    def _check_own_batches(self, recipe: Recipe) -> None:
        mask, extra = recipe.mask, recipe.data.pad_extra
        if extra:
            raise Unsupported("SFTTrainer's own batches have no extra padding (data.pad_extra=1)")
        for name, shift in (("start_shift", mask.start_shift), ("end_shift", mask.end_shift)):
            if shift:
                raise Unsupported(f"SFTTrainer's own labels are not shifted (mask.{name}={shift})")

    # Parts -------------------------------------------------------------------------------------

    def rows(self, recipe: Recipe, tokenizer: Any) -> list[tuple[list[int], int]]:
        """Ids and first supervised token of each row, as the trainer prepared it."""
        with self.trainer(recipe) as trainer:
            prepared = trainer.train_dataset
            return [
                (list(ids), next(i for i, label in enumerate(labels) if label != _torch.IGNORED))
                for ids, labels in zip(prepared["input_ids"], prepared["labels"], strict=True)
            ]

    def iterate(self, recipe: Recipe, tokenizer: Any) -> Iterator[Batch]:
        """Endless batches of the trainer's own loader."""
        self._check_own_batches(recipe)
        with self.trainer(recipe) as trainer:
            for ids, lengths, _ in _trl.drawn(trainer):
                yield ids, lengths

    @contextlib.contextmanager
    def saved(
        self, recipe: Recipe, adapter: Mapping[str, Array], see: Callable[[Any], None]
    ) -> Iterator[Path]:
        """By `SFTTrainer.save_model`."""
        with self.trainer(recipe, adapter) as trainer, tempfile.TemporaryDirectory() as folder:
            see(trainer.model)
            trainer.save_model(folder)
            yield Path(folder)

    @contextlib.contextmanager
    def trained(self, recipe: Recipe, inputs: Trace, see: Callable[[Any], None]) -> Iterator[Path]:
        """By `SFTTrainer.train` and the same trainer's `save_model`."""
        batches = list(_torch.given(inputs, recipe) or ())
        if not batches:
            self._check_own_batches(recipe)
        batches = batches[: recipe.train.steps * recipe.train.accumulation]
        live = self.trainer(recipe, inputs.group("adapter"), batches)
        with live as trainer, tempfile.TemporaryDirectory() as folder:
            trainer.train()
            see(trainer.model)
            trainer.save_model(folder)
            yield Path(folder)

    @contextlib.contextmanager
    def criterion(self, recipe: Recipe) -> Iterator[Loss]:
        """`SFTTrainer.compute_loss`, taking logits."""
        with self.trainer(recipe) as trainer:
            yield _trl.loss_of_logits(trainer)

    @contextlib.contextmanager
    def updates(self, recipe: Recipe, parameters: list[Any]) -> Iterator[Callable[[], None]]:
        """The trainer's clip, optimizer and schedule on other parameters than the model's."""
        import torch

        with self.trainer(recipe) as trainer:
            holder = torch.nn.ParameterList(parameters)
            optimizer = trainer.create_optimizer(holder)
            schedule = trainer.create_scheduler(recipe.train.steps, optimizer)

            def update() -> None:
                if limit := trainer.args.max_grad_norm:
                    trainer.accelerator.clip_grad_norm_(holder.parameters(), limit)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()

            yield update

    # Stages ------------------------------------------------------------------------------------

    def lora_init(self, recipe: Recipe, inputs: Trace) -> Trace:
        """See `parity contract lora_init`."""
        with self.trainer(recipe) as trainer:
            return readback.adapter_trace(trainer.model)

    def gradient(self, recipe: Recipe, inputs: Trace) -> Trace:
        """One step of the trainer, its gradient read before anything is done with it."""
        once = recipe.override(
            {"lora.dropout": 0.0, "optim.clip": "none", "train.steps": 1, "train.accumulation": 1}
        )
        batches = [(inputs.arrays["ids"], inputs.arrays["lengths"])]
        made = self.trainer(once, inputs.group("adapter"), batches)
        with made as trainer, _torch.undropped(trainer.model) as own:
            watch = _trl.trained(trainer, once, gradients=True)
        [step], dtype = watch.steps, _torch.loss_dtype(recipe)
        [forward] = step.forwards
        arrays = {"loss": np.asarray(forward.loss, dtype), "norm": np.asarray(step.norm, dtype)}
        tokens = _trl.tokens_of(_trl.batches_of(watch))[0]
        trace = Trace(arrays, {"tokens": tokens, "own_dropout": own})
        return trace.with_group("gradient", forward.gradient)

    def train(self, recipe: Recipe, inputs: Trace) -> Trace:
        """`SFTTrainer.train`, on batches exactly as handed over or on its own."""
        batches = list(_torch.given(inputs, recipe) or ())
        count = recipe.train.steps * recipe.train.accumulation
        if not batches:
            self._check_own_batches(recipe)
        elif len(batches) < count:
            step = len(batches) // recipe.train.accumulation + 1
            raise ValueError(f"the batches that were handed over end in step {step}")
        batches = batches[:count]
        with self.trainer(recipe, inputs.group("adapter"), batches) as trainer:
            watch = _trl.trained(trainer, recipe)
            adapter = _torch.adapter(trainer.model)
        seen = _trl.batches_of(watch)
        for (ids, _), (trained, _, _) in zip(batches, seen, strict=False):
            if not np.array_equal(ids, trained):
                raise RuntimeError("SFTTrainer trained on other batches than were handed over")
        found = curve(watch.steps, _trl.tokens_of(seen))
        trace = Trace({name: np.asarray(values) for name, values in found.items()})
        for _ in _torch.recorded(trace, iter(batches or [(ids, n) for ids, n, _ in seen])):
            pass
        return trace.with_group("adapter", adapter)

    def config(self, recipe: Recipe, inputs: Trace) -> Trace:
        """What the live trainer has in effect; its own batches, whatever the recipe asks of them."""
        measured = self.training_facts(recipe)
        with seeding() as events, self.trainer(recipe) as trainer:
            seed = seed_facts(events)
            batches = list(itertools.islice(_trl.drawn(trainer), SHOWN))
            args = trainer.args
            scalars = readback.model_facts(trainer.model, recipe)
            trainer.create_optimizer_and_scheduler(num_training_steps=args.max_steps)
            rates = readback.optimizer_facts(
                trainer.optimizer, trainer.lr_scheduler, args.max_steps
            )
            loss = _trl.loss_of_logits(trainer)
            supervised = supervised_positions(loss, batches[0][2][:, 1:])
            scalars |= {
                **rates,
                **readback.batch_facts([(ids, n) for ids, n, _ in batches], supervised),
                **readback.loss_facts(recipe, loss),
                **seed,
                **measured,
            }
        return Trace({"supervised": supervised}, scalars)
