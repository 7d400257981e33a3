"""Which of the micro-batches of a step a loop trains on."""

from __future__ import annotations

from itertools import combinations

import numpy as np

from parity.bisect.step_rounding import norm_of, summed_error
from parity.bisect.training_steps import TrainingSteps
from parity.judge.noise import HEADROOM

MOST = 4
"""Micro-batches up to which all choices of some of them are tried."""


def of_some(run: TrainingSteps, at: int, reported: float, allowed: float) -> str:
    """In words, the only micro-batches of a step whose mean loss is the one that the subject reports.

    Args:
        run: Both sides' training.
        at: The step.
        reported: The loss that the subject reports of it.
        allowed: How far it may be from a mean that it is.

    Returns:
        Empty where there is none, or more than one such choice.
    """
    rows = run.rows("subject", at)
    if not 1 < len(rows) <= MOST:
        return ""
    parts = run.gradients("subject", rows, run.adapter("subject", at - 1))
    found = []
    for size in range(1, len(parts)):
        for chosen in combinations(range(len(parts)), size):
            some = [parts[index] for index in chosen]
            losses = [float(part.arrays["loss"]) for part in some]
            tokens = [part.scalars["tokens"] for part in some]
            means = [float(np.average(losses, weights=w)) for w in (None, tokens)]
            if min(abs(mean - reported) for mean in means) <= allowed:
                found.append((chosen, some))
    if len(found) != 1:
        return ""
    chosen, some = found[0]
    numbers = ", ".join(str(index + 1) for index in chosen)
    words = f"; it is that of micro-batch{'es' * (len(chosen) > 1)} {numbers} of {len(parts)} alone"
    gradient = run.whole("subject", some)
    norm = float(run.pair.subject.arrays["gradient_norm"][at - 1])
    expected = norm_of(gradient)
    if abs(norm - expected) <= HEADROOM * summed_error(gradient) * expected:
        words += ", and so is the gradient norm: the loop trains on no other of this step"
    return words
