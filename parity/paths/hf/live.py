"""What the torch paths share: rows and batches, the adapter, supervision, the optimizer."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from parity import resources
from parity.errors import UnmatchedNames, Unsupported, UsageError
from parity.paths.batches import input_batches
from parity.paths.hf import tensors
from parity.recipe import Recipe
from parity.trace import Array, Trace

Batch = tuple[Array, Array]
"""Ids (B, W) and lengths (B, 2), both int32."""

Loss = Callable[..., Any]
"""transformers' loss: keywords logits, labels, shift_labels and vocab_size.

One that has `takes_batch` gets `batch` as well, ids (B, W) and lengths (B, 2).
"""

Clip = Callable[[list[Any]], Any]
"""Changes the gradients of parameters in place."""

IGNORED = -100
"""The label that torch's cross-entropy leaves out."""

# The process -------------------------------------------------------------------------------------


def device() -> Any:
    """The device of `--device`, or the CPU: on hosted Macs MPS runs out of memory."""
    import torch

    return torch.device(os.environ.get("PARITY_TORCH_DEVICE") or "cpu")


def to_numpy(tensor: Any) -> Array:
    """A tensor as NumPy; bfloat16, which NumPy lacks, as float32 (exact)."""
    import torch

    tensor = tensor.detach().cpu()
    return np.array(tensor.float() if tensor.dtype == torch.bfloat16 else tensor)


def loss_dtype(recipe: Recipe) -> str:
    """The dtype of adapter, loss and optimizer: float32 also over weights of 16 bits."""
    return "float64" if recipe.model.dtype == "float64" else "float32"


def ids_tensor(ids: Array) -> Any:
    """Token ids or labels on the device."""
    import torch

    return torch.as_tensor(np.asarray(ids, np.int64, order="C"), device=device())


# Rows and batches --------------------------------------------------------------------------------


def tokenized(row: Mapping[str, Any], recipe: Recipe, tokenizer: Any) -> tuple[list[int], int]:
    """Ids of a training row and its first supervised token (0: all).

    Raises:
        Unsupported: A prompt is to be masked in a row that has none.
        UsageError: A row of another kind.
    """
    if "text" in row:
        if recipe.mask.prompt:
            raise Unsupported("rows of plain text have no prompt to mask (mask.prompt)")
        ids = list(tokenizer(row["text"])["input_ids"])
        end = [tokenizer.eos_token_id]
        return ids + end if recipe.data.append_eos and ids[-1:] != end else ids, 0
    if "messages" in row:
        messages = row["messages"]
    elif "prompt" in row and "completion" in row:
        turns = {"user": row["prompt"], "assistant": row["completion"]}
        messages = [{"role": role, "content": content} for role, content in turns.items()]
    else:
        raise UsageError(f"a row needs text, messages or prompt and completion, not {sorted(row)}")

    def templated(part: list[Any], **options: Any) -> list[int]:
        tools = row.get("tools")
        return list(tokenizer.apply_chat_template(part, tools=tools, return_dict=False, **options))

    if not recipe.mask.prompt:
        return templated(messages), 0
    answered = messages[-1]["role"] == "assistant"
    return templated(messages), len(templated(messages[:-1], add_generation_prompt=answered))


def rows(recipe: Recipe, tokenizer: Any) -> list[tuple[list[int], int]]:
    """Ids and first supervised token of each training row, cut at the greatest length."""
    file = resources.data_dir(recipe.data.source) / "train.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines()
    found = [tokenized(json.loads(line), recipe, tokenizer) for line in lines if line.strip()]
    return [(ids[: recipe.data.max_length], offset) for ids, offset in found]


def padding_id(tokenizer: Any) -> int:
    """The tokenizer's padding id; 0, as mlx-lm has it, where there is none."""
    return 0 if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)


def padded(rows: list[tuple[list[int], int]], recipe: Recipe, padding: int) -> Batch:
    """A batch at the recipe's width, padded on the right."""
    multiple, longest = recipe.data.pad_multiple, max(len(ids) for ids, _ in rows)
    width = recipe.data.pad_extra + -(-longest // multiple) * multiple
    batch = np.full((len(rows), min(width, recipe.data.max_length)), padding, np.int32)
    for line, (ids, _) in zip(batch, rows, strict=True):
        line[: len(ids)] = ids
    return batch, np.array([(offset, len(ids)) for ids, offset in rows], np.int32)


def given(inputs: Trace, recipe: Recipe | None = None) -> Iterator[Batch] | None:
    """Batches that were handed over, cut to the size of a recipe if one is given; or None."""
    return input_batches(inputs, recipe) if "batches/ids.0" in inputs.arrays else None


def recorded(trace: Trace, batches: Iterator[Batch], prefix: str = "batches/") -> Iterator[Batch]:
    """Writes batches into a trace as they are drawn."""
    for index, (ids, lengths) in enumerate(batches):
        trace.arrays[f"{prefix}ids.{index}"] = ids
        trace.arrays[f"{prefix}lengths.{index}"] = lengths
        yield ids, lengths


# The adapter -------------------------------------------------------------------------------------


def trainable(model: Any) -> list[Any]:
    """The live trainable parameters."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def adapter(model: Any) -> dict[str, Array]:
    """The trainable tensors under canonical names, in MLX's orientation."""
    return {name: to_numpy(tensor.value) for name, tensor in tensors.trainable(model).items()}


def gradient(model: Any) -> dict[str, Array]:
    """Their gradients.

    Raises:
        UnmatchedNames: A tensor that the loss does not depend on.
    """
    found = tensors.trainable(model)
    if lone := sorted(name for name, tensor in found.items() if tensor.gradient is None):
        raise UnmatchedNames(f"{len(lone)} trainable tensors have no gradient, first {lone[0]!r}")
    return {name: to_numpy(tensor.gradient) for name, tensor in found.items()}


def own_dropout(model: Any) -> dict[tuple[Any, str], float]:
    """(module, attribute) → probability, of what the model itself drops out in training; not LoRA's."""
    found = {}
    for name, module in model.named_modules():
        if "lora_dropout" in name:
            continue
        for attribute, value in vars(module).items():
            dropped = "dropout" in attribute or (
                attribute == "p" and "Dropout" in type(module).__name__
            )
            if dropped and isinstance(value, float) and value:
                found[module, attribute] = value
    return found


@contextlib.contextmanager
def undropped(model: Any) -> Iterator[float]:
    """Switches the model's own dropout off; gives its greatest probability."""
    found = own_dropout(model)
    for module, attribute in found:
        setattr(module, attribute, 0.0)
    try:
        yield max(found.values(), default=0.0)
    finally:
        for (module, attribute), value in found.items():
            setattr(module, attribute, value)


def without_adapter(model: Any) -> Any:
    """The transformers model inside a PeftModel, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class Pristine:
    """A loaded base model as it was, before anything of it was made trainable."""

    def __init__(self, base: Any) -> None:
        self.base = base
        self._required = {name: p.requires_grad for name, p in base.named_parameters()}
        self._kept: list[tuple[Any, Any]] = []

    def keep_trained(self) -> None:
        """Copies the base weights that are trainable now: torch changes them in place."""
        own = dict(self.base.named_parameters())
        self._kept = [
            (own[name], own[name].detach().clone())
            for name in self._required.keys() & own.keys()
            if own[name].requires_grad
        ]

    def restore(self, recipe: Recipe, model: Any) -> None:
        """Puts the weights back; takes the adapter out, see `unload`."""
        for parameter, value in self._kept:
            parameter.data.copy_(value)
        unload(recipe, model, self.base, self._required)


def unload(recipe: Recipe, model: Any, base: Any, trainable: Mapping[str, bool]) -> None:
    """Takes the adapter out again and checks that the base is what it was.

    Args:
        recipe: What the adapter was put in for.
        model: The PeftModel around `base`, or `base` where its own weights were trained.
        base: The model that was wrapped.
        trainable: `requires_grad` of each parameter before it was.

    Raises:
        RuntimeError: Something of the adapter stayed behind.
    """
    if model is not base:
        model.unload()
    base.zero_grad(set_to_none=True)
    if recipe.train.gradient_checkpointing:
        base.gradient_checkpointing_disable()
        base.disable_input_require_grads()
    base.eval()
    names = [name for name, _ in base.named_parameters()]
    if names != list(trainable) or hasattr(base, "peft_config"):
        raise RuntimeError("PEFT's unload left parts of the adapter in the base model")
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(trainable[name])


# Supervision -------------------------------------------------------------------------------------


def labels(recipe: Recipe, ids: Array, lengths: Array) -> Array:
    """Targets (B, T) of a batch (B, T + 1), `IGNORED` where nothing is supervised (see Mask)."""
    steps = np.arange(1, ids.shape[1])
    first = np.maximum(lengths[:, :1], 1) + recipe.mask.start_shift
    last = lengths[:, 1:] - 1 + recipe.mask.end_shift
    return np.where((steps >= first) & (steps <= last), ids[:, 1:], IGNORED).astype(np.int64)


def loss_of(loss_function: Loss, logits: Any, targets: Array, batch: Batch | None = None) -> Any:
    """The model's loss on given logits (B, T, V) and targets (B, T), already shifted."""
    shifted = ids_tensor(targets)
    more = {"batch": batch} if getattr(loss_function, "takes_batch", False) else {}
    return loss_function(
        logits=logits, labels=shifted, shift_labels=shifted, vocab_size=logits.shape[-1], **more
    )


def probed_loss(
    loss_function: Loss, logits: Any, targets: Array, batch: Batch | None = None
) -> dict[str, Array]:
    """The loss, with what it supervises found from its gradient.

    The gradient (softmax minus one-hot) is zero where a position is left out and negative at the
    target alone. It is taken in float32, which the loss casts to anyway, lest float16 underflows.
    """
    import torch

    leaf = logits.float().requires_grad_()
    loss = loss_of(loss_function, leaf, targets, batch)
    (slope,) = torch.autograd.grad(loss, leaf)
    supervised = to_numpy((slope != 0).any(dim=-1))
    return {
        "loss": to_numpy(loss),
        "supervised": supervised,
        "targets": np.where(supervised, to_numpy(slope.argmin(dim=-1)), -1).astype(np.int32),
    }


def token_losses(loss_function: Loss, logits: Any, ids: Array) -> Array:
    """The loss (B, T) of each position of a batch (B, T + 1) as the only supervised one."""

    def one(row: int, at: int) -> float:
        batch = ids[row : row + 1, at : at + 2], np.array([[0, 2]], np.int32)
        given = logits[row : row + 1, at : at + 1]
        return float(loss_of(loss_function, given, batch[0][:, 1:], batch))

    rows, width = ids.shape
    return np.array([[one(row, at) for at in range(width - 1)] for row in range(rows)])


# Optimizer ---------------------------------------------------------------------------------------


def make_optimizer(recipe: Recipe, parameters: Iterable[Any]) -> tuple[Any, Any]:
    """The optimizer and its learning-rate schedule.

    Raises:
        Unsupported: Adam without bias correction, or Adam (not AdamW) with weight decay.
    """
    import torch
    from transformers import get_scheduler

    o = recipe.optim
    # Which of its kernels torch takes is left to it, as trainers do.
    options: dict[str, Any] = {}
    if o.name == "sgd":
        kind: Any = torch.optim.SGD
        options |= {"momentum": o.momentum}
    else:
        kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[o.name]
        options |= {"betas": o.betas, "eps": o.eps}
        if not o.bias_correction:
            raise Unsupported("torch's Adam always corrects bias (optim.bias_correction=false)")
    if o.name == "adam" and o.weight_decay:
        raise Unsupported(f"Adam has no weight decay (optim.weight_decay={o.weight_decay})")
    optimizer = kind(list(parameters), lr=o.lr, weight_decay=o.weight_decay, **options)
    schedule = get_scheduler(
        "constant_with_warmup" if o.schedule == "constant" else o.schedule,
        optimizer,
        num_warmup_steps=o.warmup_steps,
        num_training_steps=recipe.train.steps,
    )
    return optimizer, schedule


def gradient_norm(parameters: Iterable[Any]) -> float:
    """Global L2 norm of the gradients, which stay as they are."""
    import torch

    norms = [torch.linalg.vector_norm(p.grad) for p in parameters if p.grad is not None]
    return float(torch.linalg.vector_norm(torch.stack(norms)))


def make_clip(recipe: Recipe) -> Clip | None:
    """What happens to the gradients of some parameters before the optimizer sees them, in place."""
    import torch

    limit = recipe.optim.clip_value
    if recipe.optim.clip == "value":
        return lambda parameters: torch.nn.utils.clip_grad_value_(parameters, limit)
    if recipe.optim.clip == "norm":
        return lambda parameters: torch.nn.utils.clip_grad_norm_(parameters, limit)
    return None


def update(parameters: list[Any], clip: Clip | None, optimizer: Any, schedule: Any) -> None:
    """Clips, steps and clears the gradients."""
    if clip is not None:
        clip(parameters)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
