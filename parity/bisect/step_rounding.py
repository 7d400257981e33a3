"""What rounding explains of a training step: of a norm, and of weights behind a vanishing gradient."""

from __future__ import annotations

import numpy as np

from parity.bisect.training_steps import TrainingSteps
from parity.judge.noise import EPS
from parity.trace import Array


def norm_of(tensors: dict[str, Array]) -> float:
    """The norm of all tensors together, in float64."""
    return float(np.sqrt(sum(float((v.astype(np.float64) ** 2).sum()) for v in tensors.values())))


def summed_error(tensors: dict[str, Array]) -> float:
    """How far a norm is off, relatively, whose squares are added up one by one in float32.

    Every order of summing and every dtype of the loops compared is nearer to float64.
    """
    parts = [
        np.cumsum(v.astype(np.float32).ravel() ** 2, dtype=np.float32)[-1] for v in tensors.values()
    ]
    summed = float(np.sqrt(np.cumsum(np.array(parts, np.float32), dtype=np.float32)[-1]))
    exact = norm_of(tensors)
    return max(abs(summed / exact - 1) if exact else 0.0, EPS["float32"])


def unsettled(run: TrainingSteps, at: int) -> dict[str, Array]:
    """How much of a step rounding of the gradient leaves open, element by element.

    Adam divides by the size of past gradients, so that where these are no larger than their rounding a
    whole step is open; elsewhere the share that rounding has of the gradient.
    """
    before, after = run.adapter("reference", at - 1), run.adapter("reference", at)
    fed = run.fed(at)
    steps = [fed.group(f"gradient.{index}") for index in range(at)]
    pairs = [
        run.context.pair("gradient", row.with_group("adapter", before))
        for row in run.rows("reference", at)
    ]
    found = {}
    for name, last in steps[-1].items():
        size = np.sqrt(np.mean([g[name].astype(np.float64) ** 2 for g in steps], axis=0))
        floor = EPS["float32"] * float(np.abs(last).max(initial=0.0))
        for pair in pairs if not pairs[0].exact else ():
            floor = max(floor, pair.noise_of("gradient").floor(name, last))
        move = float(np.abs(after[name].astype(np.float64) - before[name]).max(initial=0.0))
        found[name] = move * np.minimum(1.0, floor / np.maximum(size, np.finfo(float).tiny))
    return found
