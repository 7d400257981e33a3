"""What an MLX path emits at each stage, made of its parts."""

from __future__ import annotations

import contextlib
import itertools
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from parity.names import canonical, each
from parity.paths.describe import embedded
from parity.paths.measured import Calls, loop_facts, probing, seed_facts, unknown
from parity.paths.mlx import live as _mlx
from parity.paths.mlx import modules as _mlx_modules
from parity.paths.mlx.kv_cache import kv_cache_trace
from parity.paths.mlx.live import Batch, Setup, to_numpy
from parity.paths.mlx.observed import calls, seeding
from parity.paths.mlx.round_trip import adapter_of, forward
from parity.paths.mlx.settings import one_step
from parity.paths.mlx.traces import (
    config_trace,
    cross_entropy_trace,
    decode_trace,
    given,
    lora_init_trace,
    optimizer_trace,
    recorded,
    supervised_trace,
    watched_trace,
)
from parity.paths.round_trip import Logits, RoundTrips
from parity.paths.targets import config_without_targets
from parity.recipe import Recipe
from parity.trace import Array, Trace


class MlxStages(RoundTrips):
    """The stages of a path that can set up its live objects and run its loop."""

    def __init__(self, cache: Path) -> None:
        super().__init__(cache)
        self._measured: dict[str, dict[str, Any]] = {}

    @abstractmethod
    def part(self, name: str) -> MlxStages:
        """The path that a part is taken from."""

    @abstractmethod
    def base(self, recipe: Recipe) -> tuple[Any, Any]:
        """Model, without adapter, and tokenizer."""

    @abstractmethod
    def tokenizer(self, recipe: Recipe) -> Any:
        """The tokenizer, also of a model that does not load."""

    @abstractmethod
    def dataset(self, recipe: Recipe, tokenizer: Any) -> Any:
        """The training rows: a sequence of (ids, offset)."""

    @abstractmethod
    def setup(self, recipe: Recipe, adapter: Mapping[str, Array] | None = None) -> Setup:
        """All live objects just before the first step."""

    @abstractmethod
    def loop(
        self, recipe: Recipe, setup: Setup, batches: Iterator[Batch]
    ) -> dict[str, list[float]]:
        """Trains; returns loss, gradient norm and supervised tokens of each optimizer step."""

    def tokenization(self, recipe: Recipe, inputs: Trace) -> Trace:
        """See `parity contract tokenization`."""
        tokenizer = self.tokenizer(recipe)
        dataset = self.part("batching").dataset(recipe, tokenizer)
        trace = Trace()
        for index in range(len(dataset)):
            ids, offset = dataset[index]
            limit = recipe.data.max_length
            trace.arrays[f"row.{index}"] = np.asarray(ids[:limit], np.int32)
            trace.arrays[f"offset.{index}"] = np.asarray(offset, np.int32)
        decoded = []
        for index, text in enumerate(inputs.scalars["texts"]):
            ids = tokenizer.encode(text)
            trace.arrays[f"text.{index}"] = np.asarray(ids, np.int32)
            decoded.append(tokenizer.decode(ids, skip_special_tokens=True))
        for index, conversation in enumerate(inputs.scalars["conversations"]):
            ids = tokenizer.apply_chat_template(conversation, return_dict=False)
            trace.arrays[f"chat.{index}"] = np.asarray(ids, np.int32)
        trace.scalars = {
            "decoded": decoded,
            "bos": tokenizer.bos_token_id,
            "eos": tokenizer.eos_token_id,
            "pad": 0,  # iterate_batches pads with zeros, whatever the tokenizer says
            "vocab_size": len(tokenizer),
            **embedded(recipe),
        }
        return trace

    def batches(self, recipe: Recipe, inputs: Trace) -> Trace:
        """See `parity contract batches`."""
        setup = self.setup(recipe)
        count = recipe.train.steps * recipe.train.accumulation
        trace = Trace()
        recorded(trace, itertools.islice(setup.iterate(), count), prefix="")
        return trace

    def supervised_positions(self, recipe: Recipe, inputs: Trace) -> Trace:
        """See `parity contract supervised_positions`."""
        setup = self.setup(recipe)
        own = itertools.islice(setup.iterate(), inputs.scalars.get("count", 0))
        return supervised_trace(setup, given(inputs) or own)

    def logits(self, recipe: Recipe, inputs: Trace) -> Trace:
        """See `parity contract logits`."""
        import mlx.core as mx

        model, _ = self.base(recipe)
        trace = Trace(scalars={"dtype": recipe.model.dtype})
        replace = inputs.group("replace"), inputs.group("replace_input")
        watched = inputs.scalars.get("modules", False)
        for index, ids in enumerate(each(inputs.arrays, "ids")):
            with contextlib.ExitStack() as stack:
                seen = None
                if watched or any(replace):
                    seen = stack.enter_context(_mlx_modules.module_outputs(model, *replace))
                logits = model(mx.array(ids))
            trace.scalars["dtype"] = str(logits.dtype).removeprefix("mlx.core.")
            trace.arrays[f"logits.{index}"] = to_numpy(logits.astype(mx.float32))
            if not watched or seen is None:
                continue
            groups = {"module": seen.outputs}
            if inputs.scalars.get("inputs", False):
                groups["input"] = seen.inputs
            for group, values in groups.items():
                for name, value in values.items():
                    trace.arrays[f"{group}.{index}/{name}"] = to_numpy(value.astype(mx.float32))
            trace.scalars["order"] = list(seen.outputs)
            trace.scalars |= {
                "events": [list(event) for event in seen.events],
                "called": seen.called,
                "present": seen.present,
            }
        return trace

    def cross_entropy(self, recipe: Recipe, inputs: Trace) -> Trace:
        """See `parity contract cross_entropy`."""
        return cross_entropy_trace(self.setup(recipe).loss, recipe, inputs)

    def lora_init(self, recipe: Recipe, inputs: Trace) -> Trace:
        """See `parity contract lora_init`."""
        return lora_init_trace(self.setup(recipe).model)

    def gradient(self, recipe: Recipe, inputs: Trace) -> Trace:
        """What one step of the path's own loop hands to its optimizer; without dropout.

        Taken outside of the compiled step the same gradient would be made of other kernels. At
        modules it is taken outside, of the live model and loss: they cannot be seen inside.
        """
        import mlx.core as mx

        once = one_step(recipe)
        setup = replace(self.setup(once, inputs.group("adapter")), clip=None)
        batch = mx.array(inputs.arrays["ids"]), mx.array(inputs.arrays["lengths"])
        if inputs.scalars.get("modules", False) or inputs.group("replace"):
            found = _mlx_modules.gradients(
                setup.model.train(), setup.loss, batch, inputs.group("replace")
            )
            trace = watched_trace(found.outputs, found.inputs)
            norm = _mlx.gradient_norm(found.parameters)
            trace.arrays |= {"loss": to_numpy(found.loss), "norm": to_numpy(norm)}
            trace.scalars["tokens"] = found.tokens.item()
            gradient = {canonical(k): to_numpy(v) for k, v in _mlx.flat(found.parameters).items()}
            return trace.with_group("gradient", gradient)
        observer = _mlx.Observer(setup.optimizer, gradients=True)
        with _mlx.compiled(recipe.train.compile), _mlx.restored_layer_class(setup.model):
            result = self.loop(once, setup, iter([batch]))
        trace = Trace(
            {
                "loss": np.asarray(result["loss"][0], np.float32),
                "norm": np.asarray(observer.norm(), np.float32),
            },
            {"tokens": result["tokens"][0]},
        )
        return trace.with_group("gradient", observer.gradient())

    def optimizer_step(self, recipe: Recipe, inputs: Trace) -> Trace:
        """See `parity contract optimizer_step`."""
        setup = self.setup(recipe)
        return optimizer_trace(setup.optimizer, setup.clip, inputs)

    def train(self, recipe: Recipe, inputs: Trace) -> Trace:
        """See `parity contract train`."""
        setup = self.setup(recipe, inputs.group("adapter"))
        trace = Trace()
        batches = recorded(trace, given(inputs, recipe) or setup.iterate(), lazy=True)
        with _mlx.compiled(recipe.train.compile), _mlx.restored_layer_class(setup.model):
            result = self.loop(recipe, setup, batches)
        trace.arrays.update({name: np.asarray(values) for name, values in result.items()})
        return trace.with_group("adapter", _mlx.adapter(setup.model))

    def forward(self, model: Any, ids: Array) -> Logits:
        """What a live model gives for token ids (B, T)."""
        return forward(model, ids)

    def adapter_of(self, model: Any, recipe: Recipe) -> tuple[dict[str, Array], dict[str, float]]:
        """What is trained of a live model by canonical name; module → scale, of those with LoRA."""
        return (_mlx.adapter(model), {}) if recipe.lora.kind == "full" else adapter_of(model)

    def kv_cache(self, recipe: Recipe, inputs: Trace) -> Trace:
        """See `parity contract kv_cache`."""
        adapter = inputs.group("adapter")
        model = self.setup(recipe, adapter).model if adapter else self.base(recipe)[0]
        return kv_cache_trace(model.eval(), self.prompt_cache, inputs)

    def prompt_cache(self, model: Any) -> list[Any]:
        """A fresh KV cache, one entry a layer, as mlx-lm makes it."""
        from mlx_lm.models.cache import make_prompt_cache

        return list(make_prompt_cache(model))

    def decode(self, recipe: Recipe, inputs: Trace) -> Trace:
        """See `parity contract decode`."""
        import mlx.core as mx
        from mlx_lm.generate import generate_step

        setup = self.setup(recipe, inputs.group("adapter"))
        setup.model.eval()

        def generate(prompt: str) -> Iterator[tuple[int, Any]]:
            ids = mx.array(setup.tokenizer.encode(prompt))
            for token, logprobs in generate_step(
                ids,
                setup.model,
                max_tokens=recipe.decode.max_tokens,
                prompt_cache=self.prompt_cache(setup.model),
            ):
                yield int(token), logprobs
                if int(token) in setup.tokenizer.eos_token_ids:
                    return

        return decode_trace(setup.model, setup.tokenizer, generate, inputs)

    def config(self, recipe: Recipe, inputs: Trace) -> Trace:
        """See `parity contract config`."""
        return config_without_targets(recipe, self._config)

    def _config(self, recipe: Recipe) -> Trace:
        with seeding() as events:
            setup = self.setup(recipe)
        without = self._without_seed(recipe) if _unseeded(events) else ""
        facts = seed_facts(events, without)
        if without == "nowhere" and any(what == "seed" for what, _ in events):
            late = unknown("no seed was set before the adapter was drawn")
            facts |= {"seed.value": late, "seed.placement": "after_lora"}
        facts |= self.training_facts(recipe, setup.model)
        # Measuring trained a model, and that may have been the same one.
        return config_trace(recipe, self.setup(recipe), facts)

    def training_facts(self, recipe: Recipe, model: Any) -> dict[str, Any]:
        """What the real `train` does, measured once for all seeds of a recipe."""
        key = probing(recipe, 1.0).digest()
        if key not in self._measured:
            seen = Calls()
            facts = loop_facts(self, recipe, calls(model, seen))
            self._measured[key] = facts | seen.facts()
        return self._measured[key]

    def _without_seed(self, recipe: Recipe) -> str:
        """The placement where no seed was seen: nowhere, if the generator's state tells in the adapter."""
        import mlx.core as mx

        states = []
        for other in (0, 1):
            mx.random.seed(other)
            states.append(_mlx.adapter(self.setup(recipe).model))
        equal = all(np.array_equal(states[0][name], states[1][name]) for name in states[0])
        return unknown("it is set in another way than by mx.random.seed") if equal else "nowhere"


def _unseeded(events: list[tuple[str, Any]]) -> bool:
    """Whether no seed was set before the adapter was drawn."""
    last = max((at for at, (what, _) in enumerate(events) if what == "draw"), default=len(events))
    return all(what != "seed" for what, _ in events[:last])
