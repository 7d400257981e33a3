"""A loss of a user on torch: as the share of a micro-batch in a step, and of logits that are given."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np

from parity.errors import Unsupported
from parity.paths.hf.live import IGNORED, Batch, Loss, ids_tensor, to_numpy
from parity.paths.hf.work import Share, supervised_positions
from parity.paths.plugin.on_torch.arrays import LOGITS, MODEL, TorchLayout
from parity.trace import Array

Function = Callable[..., Any]


def share_of(function: Function, layout: TorchLayout) -> Share:
    """The loss under the signature of `parity.paths.hf.work.model_loss`."""

    def share(
        model: Any, batch: Batch, targets: Array, count: int | None, parts: int
    ) -> tuple[Any, int]:
        value, counted = called(function, layout, model, batch, targets, count)
        if counted is None:
            loss = of_logits(function, layout, _base(model))
            counted = len(supervised_positions(loss, targets, batch))
        if count is None:
            return value / parts, counted
        # A loss that is not given the count is the mean of its own tokens.
        return (value if layout.counts or parts == 1 else value * (counted / count)), counted

    return share


def called(
    function: Function,
    layout: TorchLayout,
    model: Any,
    batch: Batch,
    targets: Array,
    count: int | None = None,
) -> tuple[Any, int | None]:
    """What the loss gives for a batch: a scalar, and its own count of tokens if it has one.

    Raises:
        Unsupported: It gives no scalar.
    """
    import torch

    first, ids = model, batch[0]
    if layout.first != MODEL:
        first = model(
            input_ids=ids_tensor(ids if layout.whole_rows else ids[:, :-1]), use_cache=False
        )
        first = first.logits if layout.first == LOGITS else first
    by_place, by_name = layout.arguments(*batch, targets, count)
    found = function(first, *by_place, **by_name)
    value, *rest = found if isinstance(found, (tuple, list)) else (found,)
    value = getattr(value, "loss", value)
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        raise Unsupported(f"the loss gives {type(value).__name__}, no scalar of torch")
    return value.reshape(()), _count(rest[0]) if rest else None


def _count(value: Any) -> int | None:
    import torch

    if isinstance(value, torch.Tensor):
        return int(value) if value.numel() == 1 else None
    return int(value) if isinstance(value, (int, float)) else None


def of_logits(function: Function, layout: TorchLayout, live: Any) -> Loss:
    """The loss, taking logits: of a stand-in for the model that gives them whatever it is asked."""

    def loss(*, logits: Any, labels: Any, batch: Batch | None = None, **_: Any) -> Any:
        targets = to_numpy(labels)
        if batch is None:
            width = targets.shape[1] + 1
            ids = np.pad(np.where(targets == IGNORED, 0, targets), ((0, 0), (1, 0)))
            batch = ids, np.array([[0, width]] * len(ids), np.int32)
        return called(function, layout, GivenLogits(live, logits), batch, targets)[0]

    loss.takes_batch = True  # type: ignore[attr-defined] # it may look at the ids
    return loss


class GivenLogits:
    """Stands for a model: gives the same logits (B, T, V) for rows of T or of T + 1 tokens."""

    def __init__(self, live: Any, logits: Any) -> None:
        self._live, self._logits = live, logits
        self.config = copy.copy(live.config)
        self.config.vocab_size = logits.shape[-1]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._live, name)

    def __call__(self, input_ids: Any = None, *_: Any, labels: Any = None, **more: Any) -> Any:
        """As the model is called; with labels the loss is that of transformers.

        Raises:
            Unsupported: Other rows than those that the logits are of.
        """
        import torch
        from transformers.modeling_outputs import CausalLMOutputWithPast

        logits, width = self._logits, self._logits.shape[1]
        asked = width if input_ids is None else input_ids.shape[1]
        if asked not in (width, width + 1):
            raise Unsupported(
                f"the loss gives the model rows of {asked} tokens where there are {width + 1}"
            )
        # Of whole rows the last position is the target of nothing.
        logits = torch.nn.functional.pad(logits, (0, 0, 0, asked - width))
        loss = None
        if labels is not None:
            given = {k: v for k, v in more.items() if k in ("shift_labels", "num_items_in_batch")}
            loss = self._live.loss_function(
                logits=logits, labels=labels, vocab_size=logits.shape[-1], **given
            )
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    forward = __call__


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model
