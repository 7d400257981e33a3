"""A loss of a user under the signature of mlx-lm's: (model, ids, lengths) → (loss, tokens)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

from parity.paths.mlx.live import Loss
from parity.paths.plugin.arrays import Layout


def with_any_model(function: Callable[..., Any], live: Any) -> Callable[..., Any]:
    """A loss that has its model from elsewhere, under a signature with the model first."""

    def loss(model: Any, *batch: Any) -> Any:
        if model is live:
            return function(*batch)
        kind = type(live)
        with mock.patch.object(kind, "__call__", lambda _, *args, **named: model(*args, **named)):
            return function(*batch)

    return loss


def normalised(function: Callable[..., Any], layout: Layout) -> Loss:
    """The loss itself, with its count of tokens, or the positions it depends on where it gives none."""

    def loss(model: Any, ids: Any, lengths: Any) -> tuple[Any, Any]:
        found = function(_callable(model), *layout.arguments(ids, lengths))
        value, *rest = found if isinstance(found, (tuple, list)) else (found,)
        if rest and (count := _count(rest[0])) is not None:
            # mx.compile (0.32.4) fails where an output is computed a second time inside.
            return value, count + 0
        return value, _positions(function, layout, model, ids, lengths)

    loss.raw = function  # type: ignore[attr-defined] # what a loop of the same user calls
    return loss


def _callable(model: Any) -> Any:
    """The model; a function that stands for one, as if it took what a model takes beside ids."""
    import mlx.nn as nn

    return model if isinstance(model, nn.Module) else lambda ids, *_, **__: model(ids)


def _count(value: Any) -> Any:
    import mlx.core as mx

    if isinstance(value, mx.array):
        return value if value.size == 1 else None
    return mx.array(value) if isinstance(value, (int, float)) else None


def _positions(
    function: Callable[..., Any], layout: Layout, model: Any, ids: Any, lengths: Any
) -> Any:
    """How many positions of a batch the loss depends on, from its gradient at flat logits."""
    import mlx.core as mx

    size = getattr(getattr(model, "args", None), "vocab_size", 0)
    entries = size or model(ids[:, :-1]).shape[-1]

    def at(logits: Any) -> Any:
        found = function(lambda *_, **__: logits, *layout.arguments(ids, lengths))
        return found[0] if isinstance(found, (tuple, list)) else found

    slope = mx.grad(at)(mx.zeros((*ids[:, 1:].shape, entries)))
    return (mx.abs(slope).max(axis=-1) > 0).sum()
