"""Adam by its formula, in float64: which variant gives the weights that a path was captured with.

Kingma and Ba, arXiv 1412.6980; decoupled weight decay: Loshchilov and Hutter, arXiv 1711.05101.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from parity.judge.noise import HEADROOM
from parity.trace import Array

Tensors = Mapping[str, Array]
CLIPS = (1.0, 0.5, 5.0)
"""Limits that clips have by default, tried besides the recipe's own."""
FITS = 1 / HEADROOM**2
"""Share of the difference between two sides that may be left once one of them is computed, so that what
is left is small beside the least difference that diverges; nor may it be more than rounding explains."""


def adam(
    weights: Tensors, gradients: Sequence[Tensors], factors: Mapping[str, Any]
) -> dict[str, Array]:
    """Weights (float64) after one step of Adam or AdamW for each gradient.

    Args:
        weights: Where it starts.
        gradients: One for each step, of the weights' names.
        factors: `optim.*` of a recipe; the learning rate is constant.
    """
    (first, second), rate = factors["optim.betas"], factors["optim.lr"]
    left = {name: value.astype(np.float64) for name, value in weights.items()}
    mean = {name: np.zeros_like(value) for name, value in left.items()}
    square = {name: np.zeros_like(value) for name, value in left.items()}
    decay = factors["optim.weight_decay"] if factors["optim.name"] == "adamw" else 0.0
    for step, fed in enumerate(gradients, 1):
        corrected = bool(factors["optim.bias_correction"])
        bias, spread = (1 - beta**step if corrected else 1.0 for beta in (first, second))
        for name, gradient in _clipped(fed, factors).items():
            mean[name] = first * mean[name] + (1 - first) * gradient
            square[name] = second * square[name] + (1 - second) * gradient**2
            moved = mean[name] / bias / (np.sqrt(square[name] / spread) + factors["optim.eps"])
            left[name] = (1 - rate * decay) * left[name] - rate * moved
    return left


def _clipped(gradient: Tensors, factors: Mapping[str, Any]) -> dict[str, Array]:
    values = {name: value.astype(np.float64) for name, value in gradient.items()}
    kind, limit = factors["optim.clip"], factors["optim.clip_value"]
    if kind == "value":
        return {name: value.clip(-limit, limit) for name, value in values.items()}
    if kind == "norm":
        norm = np.sqrt(sum(float((value**2).sum()) for value in values.values()))
        return {name: value * min(1.0, limit / (norm + 1e-6)) for name, value in values.items()}
    return values


def in_effect(
    weights: Tensors,
    gradients: Sequence[Tensors],
    sides: Mapping[str, tuple[Tensors, Mapping[str, Any]]],
    decay: float,
    rounding: float,
) -> dict[str, float]:
    """What Adam does on either side, for sides whose weights the formula gives.

    Args:
        weights: What both started from.
        gradients: What both were fed, one for each step.
        sides: Weights after the last step, and the factors of the recipe, of subject and reference.
        decay: The weight decay that the first updates suggest.
        rounding: What rounding explains of a weight after the last step, absolute.

    Returns:
        `left, <side>`, the share of the difference between the sides that is left once the side is
        computed, with `<side> corrects bias`, `<side> weight decay`, `<side> clip by norm` and
        `<side> clip by value` (0: none) as that formula has them, and `<side> clip at any limit`, 1 where
        other limits give the same weights; nothing for a side that no formula fits, or where it is not
        Adam at a constant rate.
    """
    for _, factors in sides.values():
        plain = factors["optim.name"] in ("adam", "adamw")
        if not plain or factors["optim.schedule"] != "constant" or factors["optim.warmup_steps"]:
            return {}
    gap = _size(sides["subject"][0], sides["reference"][0])
    facts: dict[str, float] = {}
    for side, (captured, factors) in sides.items() if gap else ():

        def left(formula: Mapping[str, Any], captured: Tensors = captured) -> float | None:
            """The share that is left with a formula; None where it does not fit."""
            apart = _size(adam(weights, gradients, formula), captured)
            fits = apart <= FITS * gap and apart <= HEADROOM * rounding
            return apart / gap if fits else None

        for changes in _formulas(factors, decay):  # the recipe itself first
            formula = {**factors, **changes}
            if (share := left(formula)) is not None:
                clip, limit = formula["optim.clip"], float(formula["optim.clip_value"])
                decoupled = formula["optim.name"] == "adamw"
                # Adam undoes any factor of its gradients, so that a clip's limit may be without effect.
                others = [
                    {**formula, "optim.clip_value": limit * times} for times in (0.5, 0.97, 2)
                ]
                open_ = clip != "none" and any(left(other) is not None for other in others)
                facts |= {
                    f"left, {side}": share,
                    f"{side} corrects bias": float(formula["optim.bias_correction"]),
                    f"{side} weight decay": formula["optim.weight_decay"] if decoupled else 0.0,
                    f"{side} clip by norm": limit if clip == "norm" else 0.0,
                    f"{side} clip by value": limit if clip == "value" else 0.0,
                    f"{side} clip at any limit": float(open_),
                }
                break
    return facts


def _formulas(factors: Mapping[str, Any], decay: float) -> Iterator[dict[str, Any]]:
    """Changes to a recipe: none, then each that a path may have made by itself."""
    yield {}
    yield {"optim.bias_correction": not factors["optim.bias_correction"]}
    yield {"optim.name": "adamw", "optim.weight_decay": decay}
    yield {"optim.clip": "none"}
    for limit in dict.fromkeys((float(factors["optim.clip_value"]), *CLIPS)):
        for kind in ("norm", "value"):
            yield {"optim.clip": kind, "optim.clip_value": limit}


def _size(a: Tensors, b: Tensors) -> float:
    """How far weights are apart: the 0.9 quantile, for the rounding of a few elements says nothing."""
    gaps = [np.abs(a[name].astype(np.float64) - b[name]).ravel() for name in b if name in a]
    return float(np.quantile(np.concatenate(gaps), 0.9)) if gaps else 0.0
