"""Path `mlx`: an in-process loop on mlx-lm's loader, adapter wiring, batching and loss.

Every factor is honoured. The parts (load, wire, dataset, iterate, loss, optimizer, clip, loop) are
methods, so that a subclass can put in a part of another stack.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import types
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path as FilePath
from typing import Any, ClassVar

import numpy as np

from parity import resources
from parity.errors import Unsupported
from parity.paths import _mlx
from parity.paths._mlx import Batch, Loss, Setup, to_numpy
from parity.paths.base import Path, describe_process
from parity.recipe import Recipe
from parity.trace import Array, Trace, canonical, each


class MlxPath(Path):
    """In-process fine-tuning on mlx-lm's parts."""

    name: ClassVar[str] = "mlx"
    framework: ClassVar[str] = "mlx"
    packages: ClassVar[tuple[str, ...]] = ("mlx", "mlx-lm", "transformers", "numpy")

    def __init__(self, cache: FilePath) -> None:
        super().__init__(cache)
        self._loaded: dict[tuple[str, ...], tuple[Any, Any]] = {}

    # What it does when nobody says anything, and where it runs ---------------------------------

    def shipped(self) -> dict[str, Any]:
        """mlx-lm's own defaults, from its live modules."""
        import mlx.optimizers as optim
        from mlx_lm.lora import CONFIG_DEFAULTS as defaults

        name = str(defaults["optimizer"])
        kind = {"adam": optim.Adam, "adamw": optim.AdamW, "sgd": optim.SGD}[name]
        signature = {k: p.default for k, p in inspect.signature(kind).parameters.items()}
        lora: Any = defaults["lora_parameters"]
        return {
            "lora.rank": lora["rank"],
            "lora.scale": lora["scale"],
            "lora.dropout": lora["dropout"],
            "lora.num_layers": defaults["num_layers"],
            "optim.name": name,
            "optim.betas": signature["betas"],
            "optim.eps": signature["eps"],
            "optim.weight_decay": signature.get("weight_decay", 0.0),
            "optim.bias_correction": signature["bias_correction"],
            "mask.prompt": defaults["mask_prompt"],
            "mask.end_shift": 1,
            "data.pad_multiple": 32,
            "data.pad_extra": 1,
            "train.accumulation": defaults["grad_accumulation_steps"],
        }

    def environment(self) -> dict[str, Any]:
        """Versions, device, BLAS and variables of this process."""
        import mlx.core as mx

        return {**describe_process(self.packages), "device": str(mx.default_device())}

    # Parts -------------------------------------------------------------------------------------

    def load(self, recipe: Recipe) -> tuple[Any, Any]:
        """Model and tokenizer, cast to the recipe's dtype."""
        import mlx.core as mx
        import mlx_lm

        if recipe.model.dtype == "float64":
            raise Unsupported("MLX has no float64 on the GPU and no fast kernels for it elsewhere")
        model, tokenizer = mlx_lm.load(resources.model_dir(recipe.model.source))[:2]
        model.set_dtype(getattr(mx, recipe.model.dtype))
        mx.eval(model.parameters())
        return model, tokenizer

    def wire(self, model: Any, recipe: Recipe) -> None:
        """Freezes the base and puts LoRA into it."""
        from mlx_lm.tuner.utils import linear_to_lora_layers

        model.freeze()
        layers = len(model.layers)
        if recipe.lora.num_layers > layers:
            raise Unsupported(
                f"lora.num_layers={recipe.lora.num_layers}, but the model has {layers} layers"
            )
        linear_to_lora_layers(model, recipe.lora.num_layers, lora_parameters(recipe, model))

    def dataset(self, recipe: Recipe, tokenizer: Any) -> Any:
        """mlx-lm's dataset over the training rows."""
        from mlx_lm.tuner.datasets import CacheDataset, load_dataset

        args = types.SimpleNamespace(
            data=str(resources.data_dir(recipe.data.source)),
            train=True,
            test=False,
            mask_prompt=recipe.mask.prompt,
        )
        try:
            train, _, _ = load_dataset(args, tokenizer)
        except ValueError as error:
            raise Unsupported(str(error)) from None
        rows = CacheDataset(train)
        if not recipe.data.append_eos:
            for index in range(len(rows)):
                ids, offset = rows[index]
                if ids[-1] == tokenizer.eos_token_id:
                    rows._proc_data[index] = (ids[:-1], offset)
        return rows

    def iterate(self, recipe: Recipe, dataset: Any) -> Callable[[], Iterator[Batch]]:
        """mlx-lm's batches, padded anew where the recipe pads otherwise."""
        from mlx_lm.tuner.trainer import iterate_batches

        def batches() -> Iterator[Batch]:
            for ids, lengths in iterate_batches(
                dataset, recipe.train.batch_size, recipe.data.max_length, loop=True
            ):
                yield pad(ids, lengths, recipe), lengths

        return batches

    def loss(self, recipe: Recipe) -> Loss:
        """mlx-lm's loss; another mask rule is other lengths handed to the same function."""
        import mlx.core as mx
        from mlx_lm.tuner.trainer import default_loss

        start, end = recipe.mask.start_shift, recipe.mask.end_shift - 1
        if (start, end) == (0, 0):
            return default_loss  # type: ignore[no-any-return]

        def shifted(model: Any, batch: Any, lengths: Any) -> tuple[Any, Any]:
            first = mx.maximum(lengths[:, 0], 1) + start
            return default_loss(  # type: ignore[no-any-return]
                model, batch, mx.stack([first, lengths[:, 1] + end], axis=1)
            )

        return shifted

    def optimizer(self, recipe: Recipe) -> Any:
        """The optimizer with its schedule."""
        import mlx.optimizers as optim
        from mlx_lm.tuner.utils import build_schedule

        kind = {"adam": optim.Adam, "adamw": optim.AdamW, "sgd": optim.SGD}[recipe.optim.name]
        schedule = lr_schedule(recipe)
        rate = build_schedule(schedule) if schedule else recipe.optim.lr
        return kind(learning_rate=rate, **optimizer_config(recipe))

    def clip(self, recipe: Recipe) -> Callable[[Any], Any] | None:
        """What happens to a gradient before the optimizer sees it."""
        import mlx.core as mx
        import mlx.optimizers as optim
        from mlx.utils import tree_map

        limit = recipe.optim.clip_value
        if recipe.optim.clip == "value":
            return lambda gradient: tree_map(lambda g: mx.clip(g, -limit, limit), gradient)
        if recipe.optim.clip == "norm":
            return lambda gradient: optim.clip_grad_norm(gradient, limit)[0]
        return None

    def setup(self, recipe: Recipe, adapter: Mapping[str, Array] | None = None) -> Setup:
        """All live objects just before the first step, in the order mlx-lm makes them."""
        import mlx.core as mx

        seed = recipe.seed
        np.random.seed(seed.value if seed.data is None else seed.data)
        if seed.placement == "before_load":
            mx.random.seed(seed.value)
            model, tokenizer = self.load(recipe)
        else:
            model, tokenizer = self.base(recipe)
            mx.random.seed(seed.value)
        self.wire(model, recipe)
        if adapter:
            model.load_weights(list(_mlx.renamed(model, adapter).items()), strict=False)
        dataset = self.dataset(recipe, tokenizer)
        return Setup(
            model,
            tokenizer,
            self.optimizer(recipe),
            dataset,
            self.loss(recipe),
            self.iterate(recipe, dataset),
            self.clip(recipe),
        )

    def base(self, recipe: Recipe) -> tuple[Any, Any]:
        """The loaded model without adapter, kept over calls: training never changes its weights."""
        from mlx_lm.tuner.utils import remove_lora_layers

        source = resources.model_dir(recipe.model.source)
        key = (source, recipe.model.dtype, resources.fingerprint(source))
        if key not in self._loaded:
            self._loaded = {key: self.load(recipe)}
        model, tokenizer = self._loaded[key]
        return remove_lora_layers(model).eval(), tokenizer

    def loop(self, recipe: Recipe, setup: Setup, batches: Iterator[Batch]) -> dict[str, list[float]]:
        """Trains; returns loss, gradient norm and supervised tokens of each optimizer step."""
        import mlx.core as mx
        import mlx.nn as nn
        from mlx.utils import tree_map
        from mlx_lm.tuner.trainer import grad_checkpoint

        model, optimizer, parts = setup.model, setup.optimizer, recipe.train.accumulation
        if recipe.train.gradient_checkpointing:
            grad_checkpoint(model.layers[0])
        by_token = recipe.train.accumulation_weighting == "token"
        value_and_grad = nn.value_and_grad(model, setup.loss)
        state = [model.state, optimizer.state, mx.random.state]

        @partial(mx.compile, inputs=state, outputs=state)
        def step(ids: Any, lengths: Any, previous: Any, seen: Any, update: bool) -> Any:
            (loss, tokens), gradient = value_and_grad(model, ids, lengths)
            if by_token:
                gradient = tree_map(lambda g: g * tokens, gradient)
            if previous is not None:
                gradient = tree_map(lambda g, p: g + p, gradient, previous)
            seen = tokens if seen is None else seen + tokens
            if not update:
                return loss, tokens, gradient, seen, mx.array(0.0)
            if by_token:
                gradient = tree_map(lambda g: g / seen, gradient)
            elif parts > 1:
                gradient = tree_map(lambda g: g / parts, gradient)
            norm = _mlx.gradient_norm(gradient)
            if setup.clip is not None:
                gradient = setup.clip(gradient)
            optimizer.update(model, gradient)
            return loss, tokens, None, None, norm

        model.train()
        result: dict[str, list[float]] = {"loss": [], "gradient_norm": [], "tokens": []}
        for _ in range(recipe.train.steps):
            gradient = seen = None
            losses, counts = [], []
            for part, (ids, lengths) in enumerate(itertools.islice(batches, parts)):
                loss, tokens, gradient, seen, norm = step(
                    ids, lengths, gradient, seen, part == parts - 1
                )
                mx.eval(state, loss, tokens, gradient, seen, norm)
                losses.append(loss.item())
                counts.append(tokens.item())
            weights = counts if by_token else None
            result["loss"].append(float(np.average(losses, weights=weights)))
            result["gradient_norm"].append(norm.item())
            result["tokens"].append(sum(counts))
        return result

    # Stages ------------------------------------------------------------------------------------

    def tokenization(self, recipe: Recipe, inputs: Trace) -> Trace:
        """See `Path.tokenization`."""
        _, tokenizer = self.base(recipe)
        dataset = self.dataset(recipe, tokenizer)
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
        }
        return trace

    def batches(self, recipe: Recipe, inputs: Trace) -> Trace:
        """See `Path.batches`."""
        setup = self.setup(recipe)
        count = recipe.train.steps * recipe.train.accumulation
        trace = Trace()
        _record(trace, itertools.islice(setup.iterate(), count), prefix="")
        return trace

    def logits(self, recipe: Recipe, inputs: Trace) -> Trace:
        """See `Path.logits`."""
        import mlx.core as mx

        model, _ = self.base(recipe)
        trace = Trace(scalars={"dtype": recipe.model.dtype})
        observe = _mlx.module_outputs(model) if inputs.scalars.get("modules") else None
        for index, ids in enumerate(each(inputs.arrays, "ids")):
            with observe or contextlib.nullcontext([]) as seen:
                logits = model(mx.array(ids))
            observe = _mlx.module_outputs(model) if observe else None
            trace.scalars["dtype"] = str(logits.dtype).removeprefix("mlx.core.")
            trace.arrays[f"logits.{index}"] = to_numpy(logits.astype(mx.float32))
            for name, value in seen:
                trace.arrays[f"module.{index}/{name}"] = to_numpy(value.astype(mx.float32))
            if seen:
                trace.scalars["order"] = list(dict.fromkeys(name for name, _ in seen))
        return trace

    def cross_entropy(self, recipe: Recipe, inputs: Trace) -> Trace:
        """See `Path.cross_entropy`."""
        return cross_entropy_trace(self.setup(recipe).loss, recipe, inputs)

    def lora_init(self, recipe: Recipe, inputs: Trace) -> Trace:
        """See `Path.lora_init`."""
        return lora_init_trace(self.setup(recipe).model)

    def gradient(self, recipe: Recipe, inputs: Trace) -> Trace:
        """See `Path.gradient`."""
        import mlx.core as mx
        import mlx.nn as nn

        setup = self.setup(recipe, inputs.group("adapter"))
        setup.model.train()
        (loss, tokens), gradient = nn.value_and_grad(setup.model, setup.loss)(
            setup.model, mx.array(inputs.arrays["ids"]), mx.array(inputs.arrays["lengths"])
        )
        named = {canonical(k): to_numpy(v) for k, v in _mlx.flat(gradient).items()}
        norm = _mlx.gradient_norm(gradient)
        trace = Trace({"loss": to_numpy(loss), "norm": to_numpy(norm)}, {"tokens": tokens.item()})
        return trace.with_group("gradient", named)

    def optimizer_step(self, recipe: Recipe, inputs: Trace) -> Trace:
        """See `Path.optimizer_step`."""
        setup = self.setup(recipe)
        return optimizer_trace(setup.optimizer, setup.clip, inputs)

    def train(self, recipe: Recipe, inputs: Trace) -> Trace:
        """See `Path.train`."""
        setup = self.setup(recipe, inputs.group("adapter"))
        trace = Trace()
        batches = _record(trace, given(inputs) or setup.iterate(), lazy=True)
        with _mlx.compiled(recipe.train.compile), _mlx.restored_layer_class(setup.model):
            result = self.loop(recipe, setup, batches)
        trace.arrays.update({name: np.asarray(values) for name, values in result.items()})
        return trace.with_group("adapter", _mlx.adapter(setup.model))

    def decode(self, recipe: Recipe, inputs: Trace) -> Trace:
        """See `Path.decode`."""
        import mlx.core as mx
        from mlx_lm.generate import generate_step

        setup = self.setup(recipe, inputs.group("adapter"))
        setup.model.eval()

        def generate(prompt: str) -> Iterator[tuple[int, Any]]:
            ids = mx.array(setup.tokenizer.encode(prompt))
            for token, logprobs in generate_step(
                ids, setup.model, max_tokens=recipe.decode.max_tokens
            ):
                yield int(token), logprobs
                if int(token) in setup.tokenizer.eos_token_ids:
                    return

        return decode_trace(setup.model, setup.tokenizer, generate, inputs)

    def config(self, recipe: Recipe, inputs: Trace) -> Trace:
        """See `Path.config`."""
        return config_trace(recipe, self.setup(recipe))


# Settings in mlx-lm's own words ------------------------------------------------------------------


def lora_parameters(recipe: Recipe, model: Any) -> dict[str, Any]:
    """mlx-lm's `lora_parameters`, its keys being the names of the modules inside a layer."""
    wanted = set(recipe.lora.target_modules)
    keys = {
        name
        for layer in model.layers
        for name, _ in layer.named_modules()
        if name.rpartition(".")[2] in wanted
    }
    if missing := wanted - {key.rpartition(".")[2] for key in keys}:
        raise Unsupported(f"the model has no modules {sorted(missing)} (lora.target_modules)")
    return {
        "rank": recipe.lora.rank,
        "scale": recipe.lora.scale,
        "dropout": recipe.lora.dropout,
        "keys": sorted(keys),
    }


def optimizer_config(recipe: Recipe) -> dict[str, Any]:
    """Keyword arguments of the optimizer's class."""
    o = recipe.optim
    if o.name == "sgd":
        return {"weight_decay": o.weight_decay}
    config: dict[str, Any] = {
        "betas": list(o.betas),
        "eps": o.eps,
        "bias_correction": o.bias_correction,
    }
    if o.name == "adamw":
        config["weight_decay"] = o.weight_decay
    elif o.weight_decay:
        raise Unsupported(f"Adam has no weight decay (optim.weight_decay={o.weight_decay})")
    return config


def lr_schedule(recipe: Recipe) -> dict[str, Any] | None:
    """mlx-lm's `lr_schedule`, or None for a constant rate."""
    o, steps = recipe.optim, recipe.train.steps
    decay = steps - o.warmup_steps
    if o.schedule == "constant" and not o.warmup_steps:
        return None
    name, arguments = {
        "constant": ("linear_schedule", [o.lr, o.lr, decay]),
        "linear": ("linear_schedule", [o.lr, 0.0, decay]),
        "cosine": ("cosine_decay", [o.lr, decay]),
    }[o.schedule]
    return {"name": name, "arguments": arguments, "warmup": o.warmup_steps}


def pad(ids: Any, lengths: Any, recipe: Recipe) -> Any:
    """A batch of mlx-lm's at the width the recipe asks for."""
    import mlx.core as mx

    multiple, extra = recipe.data.pad_multiple, recipe.data.pad_extra
    if (multiple, extra) == (32, 1):
        return ids
    longest = int(lengths[:, 1].max())
    width = min(extra + -(-longest // multiple) * multiple, recipe.data.max_length)
    cut = ids[:, :width]
    return mx.pad(cut, [(0, 0), (0, width - cut.shape[1])])


# Traces of live objects --------------------------------------------------------------------------


def given(inputs: Trace) -> Iterator[Batch] | None:
    """Batches that were handed over, or None."""
    import mlx.core as mx

    ids = [mx.array(value) for value in each(inputs.arrays, "batches/ids")]
    lengths = [mx.array(value) for value in each(inputs.arrays, "batches/lengths")]
    return zip(ids, lengths, strict=True) if ids else None


def _record(
    trace: Trace, batches: Iterator[Batch], prefix: str = "batches/", lazy: bool = False
) -> Iterator[Batch]:
    """Writes batches into a trace as they are drawn."""

    def draw() -> Iterator[Batch]:
        for index, (ids, lengths) in enumerate(batches):
            trace.arrays[f"{prefix}ids.{index}"] = to_numpy(ids)
            trace.arrays[f"{prefix}lengths.{index}"] = to_numpy(lengths)
            yield ids, lengths

    return draw() if lazy else iter(list(draw()))


def lora_init_trace(model: Any) -> Trace:
    """The adapter and what the live modules say of it."""
    adapter = _mlx.adapter(model)
    facts = _mlx.lora_facts(model)
    census = _mlx.dtype_census(model.trainable_parameters())
    scalars = {**facts, "trainable": sorted(adapter), "dtype": _mlx.single(set(census))}
    return Trace(scalars=scalars).with_group("adapter", adapter)


def cross_entropy_trace(loss_function: Loss, recipe: Recipe, inputs: Trace) -> Trace:
    """A loss of signature (model, batch, lengths), probed from outside.

    A position is supervised where the loss depends on its logits; its target is where the
    gradient (softmax minus one-hot) is negative.
    """
    import mlx.core as mx
    from mlx_lm.tuner.trainer import default_loss

    logits = mx.array(inputs.arrays["logits"]).astype(getattr(mx, recipe.model.dtype))
    ids, lengths = mx.array(inputs.arrays["ids"]), mx.array(inputs.arrays["lengths"])

    def loss_of(values: Any) -> Any:
        return loss_function(lambda _: values, ids, lengths)

    loss, tokens = loss_of(logits)
    slope = to_numpy(mx.grad(lambda values: loss_of(values)[0])(logits).astype(mx.float32))
    supervised = np.abs(slope).max(axis=-1) > 0
    token_loss = np.zeros(supervised.shape, np.float32)
    for row, position in np.ndindex(*supervised.shape):
        only = mx.array([[position + 1, position + 1]])
        one = default_loss(lambda _, row=row: logits[row : row + 1], ids[row : row + 1], only)[0]
        token_loss[row, position] = one.item()
    arrays = {
        "loss": to_numpy(loss),
        "supervised": supervised,
        "targets": np.where(supervised, slope.argmin(axis=-1), -1).astype(np.int32),
        "token_loss": token_loss,
    }
    return Trace(arrays, {"tokens": int(tokens.item())})


def optimizer_trace(optimizer: Any, clip: Callable[[Any], Any] | None, inputs: Trace) -> Trace:
    """Hand-fed gradients through the live clip and optimizer."""
    import mlx.core as mx

    weights = {name: mx.array(value) for name, value in inputs.group("weight").items()}
    trace, step = Trace(), 0
    while fed := inputs.group(f"gradient.{step}"):
        gradient = {name: mx.array(value) for name, value in fed.items()}
        weights = optimizer.apply_gradients(clip(gradient) if clip else gradient, weights)
        mx.eval(weights, optimizer.state)
        trace = trace.with_group(f"weight.{step}", {k: to_numpy(v) for k, v in weights.items()})
        step += 1
    return trace


def decode_trace(
    model: Any,
    tokenizer: Any,
    generate: Callable[[str], Iterator[tuple[int, Any]]],
    inputs: Trace,
) -> Trace:
    """Greedy ids with their margins, and the loss on the expected completion."""
    import mlx.core as mx
    import mlx.nn as nn

    trace, texts, losses = Trace(), [], []
    for index, prompt in enumerate(inputs.scalars["prompts"]):
        ids, margins = [], []
        for token, logprobs in generate(prompt):
            top = mx.sort(logprobs.astype(mx.float32))[-2:]
            ids.append(token)
            margins.append(float((top[1] - top[0]).item()))
        trace.arrays[f"ids.{index}"] = np.asarray(ids, np.int32)
        trace.arrays[f"margin.{index}"] = np.asarray(margins, np.float32)
        texts.append(tokenizer.decode(ids))
        start = tokenizer.encode(prompt)
        whole = tokenizer.encode(prompt + inputs.scalars["expected"])
        common = sum(1 for _ in itertools.takewhile(lambda p: p[0] == p[1], zip(start, whole, strict=False)))
        logits = model(mx.array([whole[:-1]]))[0, common - 1 :].astype(mx.float32)
        loss = nn.losses.cross_entropy(logits, mx.array(whole[common:]), reduction="mean")
        losses.append(loss.item())
    trace.arrays["completion_loss"] = np.asarray(losses, np.float32)
    trace.scalars["text"] = texts
    return trace


def config_trace(recipe: Recipe, setup: Setup) -> Trace:
    """What is really in effect, from the live objects of one run."""
    model = setup.model
    trainable = _mlx.flat(model.trainable_parameters())
    frozen = {k: v for k, v in _mlx.flat(model.parameters()).items() if k not in trainable}
    facts = _mlx.lora_facts(model)
    optimizer = _mlx.optimizer_facts(setup.optimizer, recipe.train.steps)
    drawn = Trace()
    batches = list(_record(drawn, itertools.islice(setup.iterate(), 8)))
    ids, lengths = (to_numpy(part) for part in batches[0])
    supervised = supervised_positions(setup.loss, ids, lengths)
    shapes = [list(to_numpy(batch).shape) for batch, _ in batches]
    scalars = {
        "dtype.parameters": _mlx.dtype_census(frozen),
        "dtype.adapter": _mlx.dtype_census(trainable),
        "rope.theta": _mlx.rope_thetas(model),
        "lora.trainable": len(trainable),
        "lora.parameters": sum(int(v.size) for v in trainable.values()),
        "lora.names": sorted(canonical(name) for name in trainable),
        **{f"lora.{key}": value for key, value in facts.items()},
        **optimizer,
        "clip.mode": recipe.optim.clip if setup.clip else "none",
        "clip.value": recipe.optim.clip_value if setup.clip else None,
        "batch.shapes": shapes,
        "batch.pad_id": 0,
        "batch.rows": [_mlx.row_digests(to_numpy(a), to_numpy(b)) for a, b in batches],
        "mask.supervised": [int((supervised[:, 0] == row).sum()) for row in range(len(ids))],
        "loss.denominator": "supervised tokens",
        "accumulation.steps": recipe.train.accumulation,
        "accumulation.weighting": recipe.train.accumulation_weighting,
        "seed.value": recipe.seed.value,
        "seed.placement": recipe.seed.placement,
        **setup.facts,
    }
    return Trace({"supervised": supervised}, scalars)


def supervised_positions(loss_function: Loss, ids: Array, lengths: Array) -> Array:
    """Rows (row, position, target id) of what a loss supervises in a batch; (K, 3) int64.

    Found from the gradient of the loss with respect to flat logits over a vocabulary just large
    enough for the ids.
    """
    recipe = Recipe()
    vocabulary = int(ids.max()) + 1
    flat_logits = np.zeros((*ids[:, 1:].shape, vocabulary), np.float32)
    inputs = Trace({"logits": flat_logits, "ids": ids, "lengths": lengths})
    trace = cross_entropy_trace(loss_function, recipe, inputs)
    where = np.argwhere(trace.arrays["supervised"])
    targets = trace.arrays["targets"][where[:, 0], where[:, 1]]
    return np.column_stack([where, targets]).astype(np.int64)
