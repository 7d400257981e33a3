"""Settings read from live torch objects: module outputs, dtypes, rope, LoRA, optimizer."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from parity.names import canonical
from parity.paths.describe import row_digests, single, trained, without_adapter
from parity.paths.hf import tensors
from parity.paths.hf.live import (
    Batch,
    Loss,
    adapter,
    device,
    labels,
    loss_of,
    own_dropout,
    to_numpy,
    trainable,
)
from parity.paths.hf.modules import module_outputs
from parity.paths.loss_settings import denominator, loss_batches, padding
from parity.paths.measured import unknown
from parity.paths.quantized import by_setting
from parity.recipe import Recipe
from parity.trace import Array, Trace


def dtype_name(dtype: Any) -> str:
    """`float32` of `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def dtype_census(parameters: Iterable[Any]) -> dict[str, int]:
    """Number of elements by dtype."""
    census: dict[str, int] = {}
    for parameter in parameters:
        name = dtype_name(parameter.dtype)
        census[name] = census.get(name, 0) + parameter.numel()
    return census


def forward_facts(model: Any) -> dict[str, Any]:
    """Dtypes of module outputs, and by layer the rotary embedding (see `parity.paths.mlx.rope`).

    From one forward pass of two tokens. A layer is handed the cosines and sines of each position; those
    of position 1 are the frequencies.
    """
    import torch

    training = model.training
    with contextlib.ExitStack() as stack, torch.no_grad():
        seen = stack.enter_context(module_outputs(model, True))
        given = stack.enter_context(_rotary(model))
        model.eval()(input_ids=torch.tensor([[1, 2]], device=model.device), use_cache=False)
    model.train(training)
    outputs = (value for name, value in seen.outputs.items() if "#" not in name)  # each once
    census = Counter(dtype_name(value.dtype) for value in outputs)
    return {"dtype.activations": dict(census), **_rope_facts(model, given)}


@contextlib.contextmanager
def _rotary(model: Any) -> Iterator[dict[int, Any]]:
    """Layer → cosines and sines that it is handed; in full precision where they were rounded."""
    given: dict[int, Any] = {}
    exact: dict[int, Any] = {}

    def rounded(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        if isinstance(output, tuple) and args:
            # kept with its output, so that no other tensor gets its id
            exact[id(output[0])] = output, module.forward(args[0].float(), *args[1:], **kwargs)

    def layer(index: int) -> Any:
        def before(_: Any, args: Any, kwargs: Any) -> None:
            pair = kwargs.get("position_embeddings")
            if pair is not None:
                given[index] = exact.get(id(pair[0]), (None, pair))[1]

        return before

    hooks = [
        module.register_forward_pre_hook(layer(index), with_kwargs=True)
        for index, module in _layers(model).items()
    ] + [
        module.register_forward_hook(rounded, with_kwargs=True)
        for module in model.modules()
        if any(name.endswith("inv_freq") for name, _ in module.named_buffers(recurse=False))
    ]
    try:
        yield given
    finally:
        for hook in hooks:
            hook.remove()


def _layers(model: Any) -> dict[int, Any]:
    return {
        int(match[1]): module
        for name, module in model.named_modules()
        if (match := re.fullmatch(r"layers\.(\d+)", canonical(name)))
    }


def _rope_facts(model: Any, given: Mapping[int, Any]) -> dict[str, Any]:
    settings = {
        name: value
        for name, value in model.config.get_text_config().to_dict().items()
        if name.startswith("rope") or name == "partial_rotary_factor"
    }
    kind = "by length" if re.search("dynamic|longrope", str(settings)) else "fixed"
    found: list[tuple[Any, ...]] = []
    for index, module in sorted(_layers(model).items()):
        attention = getattr(module, "self_attn", None)
        if attention is None or not getattr(attention, "use_rope", True):
            found.append(([], 0, 1.0, "none"))
        elif index in given:
            found.append((*rotations(*given[index]), kind))
        elif not settings:
            found.append(([], 0, 1.0, "none"))
        else:
            found.append((unknown("its layers are handed no cosines and sines"),) * 4)
    keys = ("rope.frequencies", "rope.width", "rope.attention_scaling", "rope.kind")
    return {
        **{key: [layer[at] for layer in found] for at, key in enumerate(keys)},
        "rope.configuration": settings,
    }


def rotations(cosines: Any, sines: Any) -> tuple[list[float], int, float]:
    """Inverse frequencies, width and scale from cosines and sines (B, T, width) of positions from 0."""
    cos, sin = (to_numpy(value.float())[0, 1].astype(np.float64) for value in (cosines, sines))
    half = len(cos) // 2
    # Each value stands twice: in both halves, or in neighbours.
    once = slice(None, half) if np.array_equal(cos[:half], cos[half:]) else slice(None, None, 2)
    cos, sin = cos[once], sin[once]
    turned = sin != 0
    scale = float(np.median(np.hypot(cos, sin))) if len(cos) else 1.0
    frequencies = [float(f"{f:.9g}") for f in np.arctan2(sin, cos)[turned]]
    return frequencies, 2 * len(frequencies), float(f"{scale:.7g}")


def lora_facts(model: Any) -> dict[str, Any]:
    """Rank, scale, dropout, layers and modules as the live LoRA modules have them."""
    modules = {canonical(n): m for n, m in model.named_modules() if hasattr(m, "lora_A")}
    return {
        "rank": single({int(m.r["default"]) for m in modules.values()}),
        "scale": single({float(m.scaling["default"]) for m in modules.values()}),
        # without dropout PEFT puts an Identity there
        "dropout": single({getattr(m.lora_dropout["default"], "p", 0.0) for m in modules.values()}),
        **trained(tensors.trainable(model)),
    }


def adapter_trace(model: Any) -> Trace:
    """The adapter of a live PEFT model and the settings of its LoRA modules; see `parity contract lora_init`."""
    values = adapter(model)
    scalars = {
        **lora_facts(model),
        "trainable": sorted(values),
        "dtype": single(set(dtype_census(trainable(model)))),
    }
    added = {n: t.offset for n, t in tensors.trainable(model).items() if t.offset}
    scalars |= {"offsets": added} if added else {}
    return Trace(scalars=scalars).with_group("adapter", values)


def model_facts(model: Any, recipe: Recipe) -> dict[str, Any]:
    """Dtypes, rope and LoRA of a live model, in the vocabulary of probe 00."""
    parameters, names = trainable(model), sorted(tensors.trainable(model))
    # Set by `parity.paths.hf.loading`, which computes with what packed weights are worth.
    packed = getattr(model, "packed", {})
    return {
        "model.quantization": by_setting(packed),
        "model.dropout": max(own_dropout(model).values(), default=0.0),
        "dtype.parameters": dtype_census(p for p in model.parameters() if not p.requires_grad),
        "dtype.adapter": dtype_census(parameters),
        **forward_facts(model),
        "lora.trainable": len(names),
        "lora.parameters": sum(p.numel() for p in parameters),
        "lora.names": names,
        "lora.without": without_adapter(tensors.tensors(model), recipe),
        **{f"lora.{key}": value for key, value in lora_facts(model).items()},
    }


def batch_facts(drawn: list[Batch], supervised: Array) -> dict[str, Any]:
    """Micro-batches, and what is supervised in the first of them, in the words of probe 00."""
    rows = range(len(drawn[0][0]))
    return {
        "batch.shapes": [list(ids.shape) for ids, _ in drawn],
        "batch.rows": [row_digests(*batch) for batch in drawn],
        "mask.supervised": [int((supervised[:, 0] == row).sum()) for row in rows],
        "batch.pad_id": padding(drawn),
    }


def loss_facts(recipe: Recipe, loss_function: Loss) -> dict[str, Any]:
    """What a live loss divides by, from its gradient at flat logits."""
    import torch

    def weights(ids: Array, lengths: Array) -> Array:
        targets = labels(recipe, ids, lengths)
        entries = int(ids.max()) + 2
        logits = torch.zeros(*targets.shape, entries, device=device(), requires_grad=True)
        (slope,) = torch.autograd.grad(
            loss_of(loss_function, logits, targets, (ids, lengths)), logits
        )
        return np.asarray(-to_numpy(slope).min(axis=-1) / (1 - 1 / entries))

    found = [(weights(ids, lengths), lengths) for ids, lengths in loss_batches()]
    return {"loss.denominator": denominator(found)}


def optimizer_facts(optimizer: Any, schedule: Any, steps: int) -> dict[str, Any]:
    """Hyperparameters of the live optimizer; it must not hold gradients, for it is stepped."""
    group, rates = optimizer.param_groups[0], []
    for _ in range(steps):
        rates.append(float(group["lr"]))
        optimizer.step()
        schedule.step()
    betas = [float(beta) for beta in group.get("betas", ())]
    return {
        "optim.class": type(optimizer).__name__,
        "optim.betas": betas,
        "optim.eps": group.get("eps"),
        "optim.weight_decay": float(group.get("weight_decay", 0.0)),
        # torch's Adam knows no other way and so has no setting to read
        "optim.bias_correction": True if betas else None,
        "optim.lr": rates,
    }
