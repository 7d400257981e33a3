"""A live transformers model at work: micro-batches, supervision, greedy decoding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from parity.paths.hf import live as _torch
from parity.paths.hf.live import IGNORED, Batch, Loss, to_numpy
from parity.paths.hf.process import autocast
from parity.recipe import Recipe
from parity.trace import Array, first_difference

Share = Callable[[Any, Batch, Array, int | None, int], tuple[Any, int]]
"""As `model_loss`."""
Labels = Callable[[Recipe, Array, Array], Array]
"""As `parity.paths.hf.live.labels`."""


def model_loss(
    model: Any, batch: Batch, targets: Array, count: int | None, parts: int
) -> tuple[Any, int]:
    """The share of a micro-batch in the loss of its step, and its supervised tokens.

    There is no attention mask: padding stands on the right, where the causal mask hides it from
    all real tokens, and a supervised padding position must see what it sees in mlx-lm.

    Args:
        model: Whose own loss it is.
        batch: Ids (B, W) and lengths (B, 2).
        targets: (B, W - 1), `IGNORED` where nothing is supervised.
        count: Supervised tokens of the whole step, which its loss is divided by; None: it is the mean of
            those of its micro-batches.
        parts: Micro-batches of the step.
    """
    shifted = _torch.ids_tensor(targets)
    loss = model(
        input_ids=_torch.ids_tensor(batch[0][:, :-1]),
        labels=shifted,
        shift_labels=shifted,
        use_cache=False,
        # With a count transformers divides the sum of a micro-batch by it, as its Trainer does.
        **({} if count is None else {"num_items_in_batch": count}),
    ).loss
    return loss if count is not None else loss / parts, int((targets != IGNORED).sum())


def accumulate(
    recipe: Recipe, model: Any, parts: list[Batch], share: Share, labels: Labels = _torch.labels
) -> tuple[float, int]:
    """Leaves the gradient of one step in the parameters; returns its loss and supervised tokens."""
    targets = [labels(recipe, ids, lengths) for ids, lengths in parts]
    by_token = recipe.train.accumulation_weighting == "token"
    count = sum(int((target != IGNORED).sum()) for target in targets) if by_token else None
    total, tokens = 0.0, 0
    for batch, target in zip(parts, targets, strict=True):
        with autocast(recipe):
            loss, counted = share(model, batch, target, count, len(parts))
        loss.backward()
        total += loss.item()
        tokens += counted
    return total, tokens


def supervised_positions(loss_function: Loss, targets: Array, batch: Batch | None = None) -> Array:
    """What a live loss supervises of targets (B, T): (row, position, target id), (K, 3) int64.

    Flat logits over a vocabulary just large enough for the targets.
    """
    import torch

    logits = torch.zeros(*targets.shape, max(int(targets.max()), 0) + 2, device=_torch.device())
    arrays = _torch.probed_loss(loss_function, logits, targets, batch)
    where = np.argwhere(arrays["supervised"])
    return np.column_stack([where, arrays["targets"][tuple(where.T)]]).astype(np.int64)


def greedy(
    recipe: Recipe, model: Any, prompt: list[int], tokenizer: Any, cache: Any = None
) -> tuple[list[int], Array]:
    """Ids that `generate` appends to a prompt, an end-of-sequence id included, and their margins.

    A margin (top-1 minus top-2 logit) is that of the logits which `generate` chose from, so that
    it has come through the cache.
    """
    from transformers import GenerationConfig

    ids, own = _torch.ids_tensor(np.array([prompt])), model.generation_config.eos_token_id
    # Whatever is left open here is filled from the model's own generation config.
    config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        max_new_tokens=recipe.decode.max_tokens,
        eos_token_id=tokenizer.eos_token_id if own is None else own,
        pad_token_id=_torch.padding_id(tokenizer),
        return_dict_in_generate=True,
        output_logits=True,
    )
    output = model.generate(
        input_ids=ids,
        attention_mask=ids.new_ones(ids.shape),
        generation_config=config,
        **({} if cache is None else {"past_key_values": cache}),
    )
    top = [to_numpy(logits[0].float().topk(2).values) for logits in output.logits]
    margins = np.array([first - second for first, second in top], top[0].dtype)
    return [int(token) for token in output.sequences[0, len(prompt) :]], margins


def completion_loss(model: Any, prompt: list[int], whole: list[int]) -> float:
    """Mean cross-entropy of what follows the prefix that `whole` shares with the prompt."""
    common = first_difference(prompt, whole)
    targets = _torch.ids_tensor(np.array([[IGNORED] * (common - 1) + whole[common:]]))
    inputs = _torch.ids_tensor(np.array([whole[:-1]]))
    loss = model(input_ids=inputs, labels=targets, shift_labels=targets, use_cache=False).loss
    return float(loss)
