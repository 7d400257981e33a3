"""What is seen of a training on torch: forward passes, what their losses supervise, updates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from parity.paths.hf.live import to_numpy
from parity.trace import Array


@dataclass
class Supervised:
    """What a loss depends on, from its gradient at the logits (softmax minus one-hot, times a weight)."""

    positions: Array
    """(B, T) bool: whether the loss depends on the logits there."""
    targets: Array
    """(B, T): the target id."""
    weights: Array
    """(B, T) float64: what each position weighs in the loss; 0 where it does not count."""


@dataclass
class Forward:
    """One backward pass and what led to it."""

    raw: Any
    """The batch that was drawn for it, or what the model was given."""
    loss: float
    gradient: dict[str, Array]
    """What it added to the gradient, under canonical names, if asked for."""
    seen: Supervised | None
    """What it supervises, if asked for and if the model's head gave the logits of its loss."""


@dataclass
class Step:
    """What went into one update of the optimizer."""

    forwards: list[Forward]
    norm: float
    """Global L2 norm of the gradient after the last backward pass, before any clip."""
    given: dict[str, Array]
    """What the optimizer was given, under canonical names, if asked for."""
    rate: float
    """Its learning rate in this update."""


def curve(steps: list[Step], tokens: list[int]) -> dict[str, list[float]]:
    """Loss, gradient norm and supervised tokens of each update.

    The loss of an update is the sum of those whose backward passes led to it: their gradients add up.

    Args:
        steps: As watched.
        tokens: Supervised tokens of each of their forward passes.
    """
    counts = iter(tokens)
    by_step = [[next(counts) for _ in step.forwards] for step in steps]
    return {
        "loss": [sum(forward.loss for forward in step.forwards) for step in steps],
        "gradient_norm": [step.norm for step in steps],
        "tokens": [sum(counted) for counted in by_step],
    }


def supervised(logits: Any, slope: Any) -> Supervised:
    """What a loss supervises, from its gradient (B, T, V) at logits (B, T, V)."""
    import torch

    slope = slope.float()
    positions, targets = (slope != 0).any(dim=-1), slope.argmin(dim=-1)
    # Of all tokens but the target: where that one is almost sure, its own entry is mostly rounding.
    wrong = torch.softmax(logits.double(), dim=-1).scatter(-1, targets.unsqueeze(-1), 0.0).sum(-1)
    weights = torch.where(positions, slope.clamp(min=0).double().sum(dim=-1) / wrong, 0.0)
    return Supervised(*map(to_numpy, (positions, targets, weights)))


def kept(raw: Any) -> Any:
    """A batch as it is now: the training may change it."""
    import torch

    if isinstance(raw, torch.Tensor):
        return raw.detach().clone()
    if isinstance(raw, Mapping):
        return {key: kept(value) for key, value in raw.items()}
    if isinstance(raw, (tuple, list)):
        return tuple(kept(value) for value in raw)
    return np.copy(raw) if isinstance(raw, np.ndarray) else raw
