"""A live SFTTrainer: its observed steps, its rows and batches, its loss on logits."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from parity import resources
from parity.errors import Unsupported
from parity.paths.hf import live as _torch
from parity.paths.hf.live import IGNORED, Batch, Loss, to_numpy
from parity.paths.plugin.on_torch.watch import TorchWatch
from parity.recipe import Recipe
from parity.trace import Array

# Observing ---------------------------------------------------------------------------------------


def trained(trainer: Any, recipe: Recipe, gradients: bool = False) -> TorchWatch:
    """Runs the trainer, watched as any training on torch is."""
    watch = TorchWatch(gradients=gradients)
    watch.run(trainer.train)
    check(watch, recipe)
    return watch


def check(watch: TorchWatch, recipe: Recipe) -> None:
    """Refuses a run that was cut short or whose gradient norm is no measurement.

    Raises:
        RuntimeError: Another number of steps than the recipe has, or a norm that never moves.
    """
    steps, norms = recipe.train.steps, [step.norm for step in watch.steps]
    if len(norms) != steps:
        raise RuntimeError(f"SFTTrainer made {len(norms)} steps, the recipe has {steps}")
    if steps > 1 and len(set(norms)) == 1 and recipe.optim.lr:
        raise RuntimeError(f"the gradient norm is {norms[0]:g} at all {steps} steps")


def batches_of(watch: TorchWatch) -> list[tuple[Array, Array, Array]]:
    """Ids (B, W), lengths (B, 2) and labels (B, W) of each micro-batch that was trained on."""
    return [as_arrays(forward.raw) for step in watch.steps for forward in step.forwards]


def tokens_of(batches: list[tuple[Array, Array, Array]]) -> list[int]:
    """Supervised tokens of each."""
    return [int((labels[:, 1:] != IGNORED).sum()) for _, _, labels in batches]


# Rows and batches --------------------------------------------------------------------------------


def own_rows(recipe: Recipe) -> Any:
    """The training rows as a dataset, prepared by the trainer itself.

    A prompt of messages is masked in TRL's own way: as prompt and completion.

    Raises:
        Unsupported: A row of plain text whose prompt is to be masked, or that is not to end in EOS.
    """
    from datasets import Dataset

    file = resources.data_dir(recipe.data.source) / "train.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines if line.strip()]
    for index, row in enumerate(rows):
        conversation = row.get("messages")
        if conversation is None and not recipe.data.append_eos:
            raise Unsupported("SFTTrainer always ends plain text with EOS (data.append_eos=false)")
        if not recipe.mask.prompt:
            continue
        if "text" in row:
            raise Unsupported("rows of plain text have no prompt to mask (mask.prompt)")
        if conversation is not None:
            rest = {key: value for key, value in row.items() if key != "messages"}
            rows[index] = {**rest, "prompt": conversation[:-1], "completion": conversation[-1:]}
    return Dataset.from_list(rows)


def given_rows(recipe: Recipe, batches: list[Batch]) -> Any:
    """Batches that were handed over as tokenized rows of their full width, labels included.

    TRL's collator leaves rows of equal width as they are.

    Raises:
        Unsupported: Batches of unequal numbers of rows.
    """
    from datasets import Dataset

    if len({len(ids) for ids, _ in batches}) > 1:
        raise Unsupported("SFTTrainer takes batches of one number of rows")
    rows: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    for ids, lengths in batches:
        # The trainer shifts: the label of the first token is the target of nothing.
        targets = _torch.labels(recipe, ids, lengths)
        rows["input_ids"] += ids.tolist()
        rows["labels"] += np.pad(targets, ((0, 0), (1, 0)), constant_values=IGNORED).tolist()
    return Dataset.from_dict(rows)


def as_arrays(inputs: Mapping[str, Any]) -> tuple[Array, Array, Array]:
    """Ids (B, W), lengths (B, 2) and labels (B, W) of what a collator made."""
    ids, labels, real = (
        to_numpy(inputs[name]) for name in ("input_ids", "labels", "attention_mask")
    )
    first = (labels != IGNORED).argmax(axis=1)
    lengths = np.column_stack([first, real.sum(axis=1)])
    return ids.astype(np.int32), lengths.astype(np.int32), labels


def drawn(trainer: Any) -> Iterator[tuple[Array, Array, Array]]:
    """Endless ids, lengths and labels from the trainer's own loader, in its order."""
    loader = trainer.get_train_dataloader()
    for epoch in itertools.count():
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(epoch)
        yield from map(as_arrays, loader)


# Loss --------------------------------------------------------------------------------------------


def loss_of_logits(trainer: Any) -> Loss:
    """`trainer.compute_loss` as a function of logits; the trainer is of no other use afterwards.

    It makes its logits itself, out of hidden states and the head's weight. Hidden states of one 1
    each and a weight that holds the logits make exactly these.

    Raises:
        Unsupported: A model that scales or caps what the head gives.
    """
    import torch
    from transformers.modeling_outputs import BaseModelOutputWithPast

    base = _torch.without_adapter(trainer.model)
    config = base.config.get_text_config()
    for name in _SCALES:
        if getattr(config, name, None) not in (None, 1.0):
            raise Unsupported(f"the loss of SFTTrainer applies {name} to the logits it is given")

    class Head(torch.nn.Module):  # type: ignore[misc]
        weight: Any = None
        bias = None

        def forward(self, hidden: Any) -> Any:
            return hidden @ self.weight.T

    head = Head()
    base.set_output_embeddings(head)

    def loss(*, logits: Any, labels: Any, **_: Any) -> Any:
        rows, width, vocabulary = logits.shape
        one = torch.eye(rows * width, dtype=logits.dtype, device=logits.device)
        # One position more, without a target: the trainer shifts.
        hidden = torch.nn.functional.pad(one.view(rows, width, -1), (0, 0, 0, 1))
        output = BaseModelOutputWithPast(last_hidden_state=hidden)
        base.base_model.forward = lambda *_, **__: output
        head.weight = logits.reshape(-1, vocabulary).T
        labels = torch.nn.functional.pad(labels, (1, 0), value=IGNORED)
        ids = torch.zeros_like(labels)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        count = (labels != IGNORED).sum()
        return trainer.compute_loss(trainer.model, inputs, num_items_in_batch=count)

    return loss


_SCALES = (
    "final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier",
    "output_multiplier",
)  # fmt: skip
