"""What a torch path emits at each stage, made of its parts."""

from __future__ import annotations

import contextlib
import itertools
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from parity.names import each
from parity.paths.describe import embedded
from parity.paths.hf import live as _torch
from parity.paths.hf import readback
from parity.paths.hf.kv_cache import forward_dtype, kv_cache_trace
from parity.paths.hf.live import IGNORED, Batch, Clip, Loss, to_numpy
from parity.paths.hf.modules import WatchedGradients, module_outputs, watch
from parity.paths.hf.observed import calls, seeding
from parity.paths.hf.round_trip import adapter_of, forward
from parity.paths.hf.tensors import check_names
from parity.paths.hf.work import (
    Share,
    accumulate,
    completion_loss,
    greedy,
    model_loss,
    supervised_positions,
)
from parity.paths.measured import Calls, loop_facts, probing, seed_facts
from parity.paths.round_trip import Logits, RoundTrips
from parity.paths.targets import config_without_targets
from parity.recipe import Recipe
from parity.trace import Array, Trace

SHOWN = 8
"""Micro-batches that the effective configuration describes."""


class TorchStages(RoundTrips):
    """The stages of a path that can load, adapt, batch and train."""

    def __init__(self, cache: Path) -> None:
        super().__init__(cache)
        self._measured: dict[str, dict[str, Any]] = {}

    @abstractmethod
    def tokenizer(self, recipe: Recipe) -> Any:
        """The tokenizer that comes with the model."""

    @abstractmethod
    def pristine(self, recipe: Recipe) -> AbstractContextManager[Any]:
        """The base model without adapter."""

    @abstractmethod
    def adapted(
        self, recipe: Recipe, adapter: Mapping[str, Array] | None = None
    ) -> AbstractContextManager[Any]:
        """The model with LoRA in it, initialised from the seed or from a given adapter."""

    @abstractmethod
    def iterate(self, recipe: Recipe, tokenizer: Any) -> Iterator[Batch]:
        """Endless batches."""

    @abstractmethod
    def loop(self, recipe: Recipe, model: Any, batches: Iterator[Batch]) -> dict[str, list[float]]:
        """Trains; returns loss, gradient norm and supervised tokens of each optimizer step."""

    def rows(self, recipe: Recipe, tokenizer: Any) -> list[tuple[list[int], int]]:
        """Ids and first supervised token (0: all) of each training row."""
        return _torch.rows(recipe, tokenizer)

    @abstractmethod
    def part(self, name: str) -> TorchStages:
        """The path that a part is taken from."""

    def loss(self, recipe: Recipe) -> Share:
        """The share of a micro-batch in the loss of its step."""
        return model_loss

    def loss_of_logits(self, recipe: Recipe, model: Any) -> Loss:
        """The same loss, taking logits; of a live model without adapter."""
        return model.loss_function  # type: ignore[no-any-return]

    def labels(self, recipe: Recipe, ids: Array, lengths: Array) -> Array:
        """Targets of a batch that its batching made, or of one that was handed over."""
        return _torch.labels(recipe, ids, lengths)

    def clip(self, recipe: Recipe) -> Clip | None:
        """What happens to gradients before the optimizer sees them."""
        return _torch.make_clip(recipe)

    def optimizer(self, recipe: Recipe, parameters: list[Any]) -> tuple[Any, Any]:
        """The optimizer and its schedule, each with `step`."""
        return _torch.make_optimizer(recipe, parameters)

    @contextlib.contextmanager
    def criterion(self, recipe: Recipe) -> Iterator[Loss]:
        """The live loss, taking logits."""
        with self.pristine(recipe) as model:
            yield self.part("loss").loss_of_logits(recipe, model)

    @contextlib.contextmanager
    def updates(self, recipe: Recipe, parameters: list[Any]) -> Iterator[Callable[[], None]]:
        """Clip, optimizer and schedule: each call takes a step and clears the gradients."""
        clip = self.part("clip").clip(recipe)
        made = self.part("optimizer").optimizer(recipe, parameters)
        yield lambda: _torch.update(parameters, clip, *made)

    def tokenization(self, recipe: Recipe, inputs: Trace) -> Trace:
        """See `parity contract tokenization`."""
        tokenizer, trace = self.tokenizer(recipe), Trace()
        for index, (ids, offset) in enumerate(self.part("batching").rows(recipe, tokenizer)):
            trace.arrays[f"row.{index}"] = np.asarray(ids, np.int32)
            trace.arrays[f"offset.{index}"] = np.asarray(offset, np.int32)
        texts = [tokenizer(text)["input_ids"] for text in inputs.scalars["texts"]]
        chats = [
            tokenizer.apply_chat_template(conversation, return_dict=False)
            for conversation in inputs.scalars["conversations"]
        ]
        for stem, rows in (("text", texts), ("chat", chats)):
            for index, ids in enumerate(rows):
                trace.arrays[f"{stem}.{index}"] = np.asarray(ids, np.int32)
        trace.scalars = {
            "decoded": [tokenizer.decode(ids, skip_special_tokens=True) for ids in texts],
            "bos": tokenizer.bos_token_id,
            "eos": tokenizer.eos_token_id,
            "pad": _torch.padding_id(tokenizer),
            "vocab_size": len(tokenizer),
            **embedded(recipe),
        }
        return trace

    def batches(self, recipe: Recipe, inputs: Trace) -> Trace:
        """See `parity contract batches`."""
        count = recipe.train.steps * recipe.train.accumulation
        batching = self.part("batching")
        drawn = itertools.islice(batching.iterate(recipe, self.tokenizer(recipe)), count)
        trace = Trace()
        for _ in _torch.recorded(trace, drawn, prefix=""):
            pass
        return trace

    def supervised_positions(self, recipe: Recipe, inputs: Trace) -> Trace:
        """See `parity contract supervised_positions`."""
        tokenizer, trace, targets = self.tokenizer(recipe), Trace(), set()
        batching = self.part("batching")
        own = itertools.islice(batching.iterate(recipe, tokenizer), inputs.scalars.get("count", 0))
        batches = _torch.recorded(trace, _torch.given(inputs) or own, prefix="")
        with self.criterion(recipe) as loss:
            for index, batch in enumerate(batches):
                found = supervised_positions(loss, batching.labels(recipe, *batch), batch)
                trace.arrays[f"supervised.{index}"] = found
                targets |= set(found[:, 2].tolist())
        trace.scalars["pieces"] = {str(i): tokenizer.decode([i]) for i in sorted(targets)}
        return trace

    def logits(self, recipe: Recipe, inputs: Trace) -> Trace:
        """See `parity contract logits`."""
        import torch

        trace = Trace(scalars={"dtype": recipe.model.dtype})
        watched = inputs.scalars.get("modules", False)
        with self.pristine(recipe) as model, torch.no_grad():
            for index, ids in enumerate(each(inputs.arrays, "ids")):
                replace = inputs.group("replace"), inputs.group("replace_input")
                with module_outputs(model, watched, *replace) as seen:
                    logits = model(input_ids=_torch.ids_tensor(ids), use_cache=False).logits
                trace.scalars["dtype"] = readback.dtype_name(logits.dtype)
                trace.arrays[f"logits.{index}"] = to_numpy(logits.float())
                if not watched:
                    continue
                groups = {"module": seen.outputs}
                if inputs.scalars.get("inputs", False):
                    groups["input"] = seen.inputs
                for group, values in groups.items():
                    for name, value in values.items():
                        trace.arrays[f"{group}.{index}/{name}"] = to_numpy(value.float())
                trace.scalars["order"] = list(seen.outputs)
                trace.scalars |= {
                    "events": [list(event) for event in seen.events],
                    "called": seen.called,
                    "present": seen.present,
                }
        return trace

    def cross_entropy(self, recipe: Recipe, inputs: Trace) -> Trace:
        """See `parity contract cross_entropy`."""
        import torch

        targets = _torch.labels(recipe, inputs.arrays["ids"], inputs.arrays["lengths"])
        dtype = getattr(torch, recipe.model.dtype)
        with self.criterion(recipe) as loss:
            logits = torch.tensor(inputs.arrays["logits"], device=_torch.device()).to(dtype)
            batch = inputs.arrays["ids"], inputs.arrays["lengths"]
            arrays = _torch.probed_loss(loss, logits, targets, batch)
            each_token = _torch.token_losses(loss, logits, inputs.arrays["ids"])
            arrays["token_loss"] = each_token.astype(_torch.loss_dtype(recipe))
        return Trace(arrays, {"tokens": int((targets != IGNORED).sum())})

    def lora_init(self, recipe: Recipe, inputs: Trace) -> Trace:
        """See `parity contract lora_init`."""
        with self.adapted(recipe) as model:
            return readback.adapter_trace(model)

    def gradient(self, recipe: Recipe, inputs: Trace) -> Trace:
        """See `parity contract gradient`; without any dropout, whose masks no two frameworks share."""
        still, replace = recipe.override({"lora.dropout": 0.0}), inputs.group("replace")
        watched = inputs.scalars.get("modules", False) or bool(replace)
        if watched:  # a layer that is run again in the backward pass would be seen twice
            still = still.override({"train.gradient_checkpointing": False})
        batch = inputs.arrays["ids"], inputs.arrays["lengths"]
        with self.adapted(still, inputs.group("adapter")) as model, _torch.undropped(model) as own:
            share, found = self.part("loss").loss(still), WatchedGradients()
            run = partial(accumulate, still, model.train(), [batch], share)
            if watched:
                (loss, tokens), found = watch(model, run, replace)
            else:
                loss, tokens = run()
            norm = _torch.gradient_norm(_torch.trainable(model))
            gradient = _torch.gradient(model)
        dtype = _torch.loss_dtype(recipe)
        arrays = {"loss": np.asarray(loss, dtype), "norm": np.asarray(norm, dtype)}
        scalars = {"tokens": tokens, "own_dropout": own} | (
            {"order": found.order} if watched else {}
        )
        trace = Trace(arrays, scalars)
        for group, tensors in (("activation", found.outputs), ("input", found.inputs)):
            trace = trace.with_group(group, {n: to_numpy(value) for n, value in tensors.items()})
        return trace.with_group("gradient", gradient)

    def optimizer_step(self, recipe: Recipe, inputs: Trace) -> Trace:
        """See `parity contract optimizer_step`."""
        import torch

        def live(array: Array) -> Any:
            values = np.asarray(array, _torch.loss_dtype(recipe))
            return torch.tensor(values, device=_torch.device())

        weights = inputs.group("weight")
        parameters = {name: torch.nn.Parameter(live(value)) for name, value in weights.items()}
        trace, step = Trace(), 0
        with self.updates(recipe, list(parameters.values())) as update:
            while fed := inputs.group(f"gradient.{step}"):
                check_names(parameters, fed)
                for name, parameter in parameters.items():
                    parameter.grad = live(fed[name])
                update()
                moved = {name: to_numpy(value) for name, value in parameters.items()}
                trace = trace.with_group(f"weight.{step}", moved)
                step += 1
        return trace

    def train(self, recipe: Recipe, inputs: Trace) -> Trace:
        """See `parity contract train`."""
        own = self.part("batching").iterate
        batches = _torch.given(inputs, recipe) or own(recipe, self.tokenizer(recipe))
        trace = Trace()
        with self.adapted(recipe, inputs.group("adapter") or None) as model:
            result = self.loop(recipe, model, _torch.recorded(trace, batches))
            adapter = _torch.adapter(model)
        trace.arrays.update({name: np.asarray(values) for name, values in result.items()})
        return trace.with_group("adapter", adapter)

    def forward(self, model: Any, ids: Array) -> Logits:
        """What a live model gives for token ids (B, T)."""
        return forward(model, ids)

    def adapter_of(self, model: Any, recipe: Recipe) -> tuple[dict[str, Array], dict[str, float]]:
        """What is trained of a live model by canonical name; module → scale, of those with LoRA."""
        return (_torch.adapter(model), {}) if recipe.lora.kind == "full" else adapter_of(model)

    def kv_cache(self, recipe: Recipe, inputs: Trace) -> Trace:
        """See `parity contract kv_cache`."""
        adapter = inputs.group("adapter")
        with self.adapted(recipe, adapter) if adapter else self.pristine(recipe) as model:
            return kv_cache_trace(model.eval(), self.prompt_cache, inputs)

    def prompt_cache(self, model: Any) -> Any:
        """A fresh KV cache; None leaves it to transformers, which makes one when it is asked to."""
        return None

    def decode(self, recipe: Recipe, inputs: Trace) -> Trace:
        """See `parity contract decode`."""
        import torch

        tokenizer, trace = self.tokenizer(recipe), Trace()
        losses, texts = [], []
        with self.adapted(recipe, inputs.group("adapter")) as model, torch.no_grad():
            model.eval()
            for index, prompt in enumerate(inputs.scalars["prompts"]):
                start = tokenizer(prompt)["input_ids"]
                whole = tokenizer(prompt + inputs.scalars["expected"])["input_ids"]
                cache = self.prompt_cache(model)
                ids, margins = greedy(recipe, model, start, tokenizer, cache)
                trace.arrays[f"ids.{index}"] = np.asarray(ids, np.int32)
                trace.arrays[f"margin.{index}"] = margins
                texts.append(tokenizer.decode(ids))
                losses.append(completion_loss(model, start, whole))
            dtype = readback.dtype_name(forward_dtype(model, np.array(start)))
        trace.arrays["completion_loss"] = np.asarray(losses, _torch.loss_dtype(recipe))
        trace.scalars |= {"text": texts, "dtype": dtype}
        return trace

    def config(self, recipe: Recipe, inputs: Trace) -> Trace:
        """See `parity contract config`."""
        return config_without_targets(recipe, self._config)

    def _config(self, recipe: Recipe) -> Trace:
        tokenizer = self.tokenizer(recipe)
        batching = self.part("batching")
        drawn = list(itertools.islice(batching.iterate(recipe, tokenizer), SHOWN))
        targets = batching.labels(recipe, *drawn[0])
        measured = self.training_facts(recipe)
        with seeding() as events, self.adapted(recipe) as model:
            facts = readback.model_facts(model, recipe)
            made = self.part("optimizer").optimizer(recipe, _torch.trainable(model))
            base = _torch.without_adapter(model)
            loss = self.part("loss").loss_of_logits(recipe, base)
            supervised = supervised_positions(loss, targets, drawn[0])
            scalars = {
                **facts,
                **readback.optimizer_facts(*made, recipe.train.steps),
                **readback.batch_facts(drawn, supervised),
                **readback.loss_facts(recipe, loss),
                **seed_facts(events),
                **measured,
            }
        return Trace({"supervised": supervised}, scalars)

    def training_facts(self, recipe: Recipe) -> dict[str, Any]:
        """What the real `train` does, measured once for all seeds of a recipe."""
        key = probing(recipe, 1.0).digest()
        if key not in self._measured:
            seen = Calls()
            facts = loop_facts(self, recipe, calls(seen))
            self._measured[key] = facts | seen.facts()
        return self._measured[key]
