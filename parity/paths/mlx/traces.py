"""Traces of live MLX objects, whoever made them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from parity.names import canonical
from parity.paths.batches import input_batches
from parity.paths.describe import row_digests, single, without_adapter
from parity.paths.loss_settings import denominator, loss_batches, padding
from parity.paths.mlx import live as _mlx
from parity.paths.mlx import modules as _mlx_modules
from parity.paths.mlx.live import Batch, Loss, Setup, to_numpy
from parity.paths.mlx.quantized import elements
from parity.paths.mlx.quantized import facts as quantization_facts
from parity.paths.mlx.rope import rope_facts
from parity.recipe import Recipe
from parity.trace import Array, Trace, first_difference


def given(inputs: Trace, recipe: Recipe | None = None) -> Iterator[Batch] | None:
    """Batches that were handed over, cut to the size of a recipe if one is given; or None."""
    import mlx.core as mx

    if "batches/ids.0" not in inputs.arrays:
        return None
    return ((mx.array(ids), mx.array(lengths)) for ids, lengths in input_batches(inputs, recipe))


def recorded(
    trace: Trace, batches: Iterator[Batch], prefix: str = "batches/", lazy: bool = False
) -> Iterator[Batch]:
    """Writes batches into a trace as they are drawn."""

    def draw() -> Iterator[Batch]:
        for index, (ids, lengths) in enumerate(batches):
            trace.arrays[f"{prefix}ids.{index}"] = to_numpy(ids)
            trace.arrays[f"{prefix}lengths.{index}"] = to_numpy(lengths)
            yield ids, lengths

    return draw() if lazy else iter(list(draw()))


def watched_trace(outputs: dict[str, Any], inputs: dict[str, Any]) -> Trace:
    """Gradients at the modules' outputs and inputs, as `parity contract gradient` has them."""
    trace = Trace(scalars={"order": list(outputs)})
    for group, arrays in (("activation", outputs), ("input", inputs)):
        trace = trace.with_group(group, {name: to_numpy(value) for name, value in arrays.items()})
    return trace


def lora_init_trace(model: Any) -> Trace:
    """The adapter and the settings of the live LoRA modules."""
    adapter = _mlx.adapter(model)
    facts = _mlx.lora_facts(model)
    census = _mlx.dtype_census(model.trainable_parameters())
    scalars = {**facts, "trainable": sorted(adapter), "dtype": single(set(census))}
    return Trace(scalars=scalars).with_group("adapter", adapter)


def cross_entropy_trace(loss_function: Loss, recipe: Recipe, inputs: Trace) -> Trace:
    """A loss of signature (model, batch, lengths), probed from outside.

    A position is supervised where the loss depends on its logits; its target is where the
    gradient (softmax minus one-hot) is negative. `token_loss` is absent, and scalar `no_token_loss`
    says why, where the loss cannot be had for one token.
    """
    import mlx.core as mx

    ids, lengths = mx.array(inputs.arrays["ids"]), mx.array(inputs.arrays["lengths"])
    logits = mx.array(inputs.arrays["logits"]).astype(getattr(mx, recipe.model.dtype))
    arrays, tokens = probed_loss(loss_function, logits, ids, lengths)
    trace = Trace(arrays, {"tokens": tokens})
    token_loss = token_losses(loss_function, logits, ids)
    if token_loss is None:
        trace.scalars["no_token_loss"] = "no lengths make it supervise one position alone"
    else:
        trace.arrays["token_loss"] = token_loss
    return trace


def token_losses(loss_function: Loss, logits: Any, ids: Any) -> Array | None:
    """The live loss (B, T) float32 of each position of a batch (B, T + 1) as the only one there is.

    Each position is a row of its own, as short as the loss still supervises, so that the loss divides
    by one whatever it divides by. None where there is no such row.
    """
    import mlx.core as mx

    if (row := _row_of_one_target(loss_function)) is None:
        return None
    width, lengths = row
    found = np.zeros(ids[:, 1:].shape, np.float32)
    for at, position in np.ndindex(*found.shape):
        values = mx.broadcast_to(logits[at, position], (1, width, logits.shape[-1]))
        target = mx.broadcast_to(ids[at, position + 1], (1, width + 1))
        loss, _ = loss_function(lambda _, values=values: values, target, mx.array([lengths]))
        found[at, position] = loss.item()
    return found


def _row_of_one_target(loss_function: Loss) -> tuple[int, tuple[int, int]] | None:
    """The least width, and lengths, of a row of which a loss supervises the last position alone."""
    for width in range(1, 5):
        ids = np.ones((1, width + 1), np.int32)
        for lengths in itertools.product(range(width + 1), range(width, width + 4)):
            found = supervised_positions(loss_function, ids, np.array([lengths], np.int32))
            if found[:, 1].tolist() == [width - 1]:
                return width, (lengths[0], lengths[1])
    return None


def probed_loss(
    loss_function: Loss, logits: Any, ids: Any, lengths: Any
) -> tuple[dict[str, Array], int]:
    """`loss` (), `supervised` (B, T) and `targets` (B, T) of a live loss; the tokens it counts."""
    import mlx.core as mx

    def loss_of(values: Any) -> Any:
        return loss_function(lambda _: values, ids, lengths)

    loss, tokens = loss_of(logits)
    slope = to_numpy(mx.grad(lambda values: loss_of(values)[0])(logits).astype(mx.float32))
    supervised = np.abs(slope).max(axis=-1) > 0
    arrays = {
        "loss": to_numpy(loss),
        "supervised": supervised,
        "targets": np.where(supervised, slope.argmin(axis=-1), -1).astype(np.int32),
    }
    return arrays, int(tokens.item())


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

    trace, texts, losses, dtypes = Trace(), [], [], set()
    for index, prompt in enumerate(inputs.scalars["prompts"]):
        ids, margins = [], []
        for token, logprobs in generate(prompt):
            top = mx.sort(logprobs.astype(mx.float32))[-2:]
            dtypes.add(_mlx.dtype_name(logprobs.dtype))
            ids.append(token)
            margins.append(float(to_numpy(top[1] - top[0])))
        trace.arrays[f"ids.{index}"] = np.asarray(ids, np.int32)
        trace.arrays[f"margin.{index}"] = np.asarray(margins, np.float32)
        texts.append(tokenizer.decode(ids))
        start = tokenizer.encode(prompt)
        whole = tokenizer.encode(prompt + inputs.scalars["expected"])
        common = first_difference(start, whole)
        logits = model(mx.array([whole[:-1]]))[0, common - 1 :].astype(mx.float32)
        loss = nn.losses.cross_entropy(logits, mx.array(whole[common:]), reduction="mean")
        losses.append(loss.item())
    trace.arrays["completion_loss"] = np.asarray(losses, np.float32)
    trace.scalars |= {"text": texts, "dtype": single(dtypes)}
    return trace


def config_trace(recipe: Recipe, setup: Setup, measured: Mapping[str, Any]) -> Trace:
    """What is really in effect: from the live objects of one run, and as measured by what they do."""
    model = setup.model
    trainable = _mlx.flat(model.trainable_parameters())
    frozen = {k: v for k, v in _mlx.flat(model.parameters()).items() if k not in trainable}
    facts = _mlx.lora_facts(model)
    packed = elements(model)
    optimizer = _mlx.optimizer_facts(setup.optimizer, recipe.train.steps)
    batches = [(to_numpy(a), to_numpy(b)) for a, b in itertools.islice(setup.iterate(), 8)]
    ids, lengths = batches[0]
    supervised = supervised_positions(setup.loss, ids, lengths)
    scalars = {
        **quantization_facts(model),
        "model.dropout": _mlx.own_dropout(model),
        "dtype.parameters": _mlx.dtype_census(frozen, packed),
        "dtype.adapter": _mlx.dtype_census(trainable),
        "dtype.activations": _activations(setup, ids),
        **rope_facts(model),
        "lora.trainable": len(trainable),
        "lora.parameters": sum(int(v.size) for v in trainable.values()),
        "lora.names": sorted(canonical(name) for name in trainable),
        "lora.without": without_adapter(map(canonical, [*frozen, *trainable]), recipe),
        **{f"lora.{key}": value for key, value in facts.items()},
        **optimizer,
        "batch.shapes": [list(batch.shape) for batch, _ in batches],
        "batch.pad_id": padding(batches),
        "batch.rows": [row_digests(a, b) for a, b in batches],
        "mask.supervised": [int((supervised[:, 0] == row).sum()) for row in range(len(ids))],
        "loss.denominator": denominator(
            (token_weights(setup.loss, *batch), batch[1]) for batch in loss_batches()
        ),
        # MLX has no automatic casts of a forward pass; what its modules give is counted above.
        "train.autocast": "none",
        **measured,
        **setup.facts,
    }
    return Trace({"supervised": supervised}, scalars)


def token_weights(loss_function: Loss, ids: Array, lengths: Array) -> Array:
    """What each position (B, T) weighs in a live loss, from its gradient at flat logits.

    The gradient of a cross-entropy at the target of flat logits over V entries is 1 / V - 1.
    """
    import mlx.core as mx

    entries = int(ids.max()) + 2
    batch = mx.array(ids), mx.array(lengths)
    slope = mx.grad(lambda logits: loss_function(lambda _: logits, *batch)[0])(
        mx.zeros((*ids[:, 1:].shape, entries))
    )
    return np.asarray(-to_numpy(slope).min(axis=-1) / (1 - 1 / entries))


def _activations(setup: Setup, ids: Array) -> dict[str, int]:
    import mlx.core as mx

    with _mlx_modules.module_outputs(setup.model) as seen:
        setup.model(mx.array(ids[:1, :-1]))
    return _mlx.activation_census(seen.outputs.values())


def supervised_positions(loss_function: Loss, ids: Array, lengths: Array) -> Array:
    """Rows (row, position, target id) of what a loss supervises in a batch; (K, 3) int64.

    Found from the gradient of the loss with respect to flat logits over a vocabulary just large
    enough for the ids.
    """
    import mlx.core as mx

    # Two at least: over one entry every softmax is flat.
    flat_logits = mx.zeros((*ids[:, 1:].shape, int(ids.max()) + 2))
    arrays, _ = probed_loss(loss_function, flat_logits, mx.array(ids), mx.array(lengths))
    where = np.argwhere(arrays["supervised"])
    return np.column_stack([where, arrays["targets"][tuple(where.T)]]).astype(np.int64)


def supervised_trace(setup: Setup, batches: Iterator[Batch]) -> Trace:
    """What the live loss supervises in each batch."""
    trace, targets = Trace(), set()
    for index, (ids, lengths) in enumerate(recorded(trace, batches, prefix="")):
        found = supervised_positions(setup.loss, to_numpy(ids), to_numpy(lengths))
        trace.arrays[f"supervised.{index}"] = found
        targets |= set(found[:, 2].tolist())
    trace.scalars["pieces"] = {str(i): setup.tokenizer.decode([i]) for i in sorted(targets)}
    return trace
