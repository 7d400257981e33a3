"""Stage 05: one gradient at the same adapter and batch."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from parity.numerics import compare, compare_exact, compare_group
from parity.stages.base import Comparison, Context
from parity.stages.noise import common_rows
from parity.trace import Array

LENGTHS = [9, 21, 30, 14]
WIDTH = 33


class Gradient:
    """Loss, norm and every tensor, with B = 0 and with B ≠ 0."""

    number: ClassVar[int] = 5
    name: ClassVar[str] = "gradient"
    question: ClassVar[str] = "Does the same batch give the same gradient?"

    def run(self, context: Context) -> Comparison:
        """Compares before any clip: the clip belongs to the optimizer step."""
        init = context.given("lora_init").group("adapter")
        rng = context.rng(self.number)
        rows = common_rows(rng, context.vocabulary, LENGTHS, WIDTH)
        result = Comparison()
        for what, adapter in (("B = 0", init), ("B ≠ 0", filled(init, rng))):
            pair = context.pair("gradient", rows.with_group("adapter", adapter))
            a, b = pair.subject, pair.reference
            for key, name in (("loss", "loss"), ("norm", "global norm")):
                metric = compare(key, a.arrays[key], b.arrays[key], pair.noise)
                result.metrics.append(metric.model_copy(update={"name": f"{name}, {what}"}))
            counts = np.array([a.scalars["tokens"]]), np.array([b.scalars["tokens"]])
            result.metrics.append(compare_exact(f"supervised tokens, {what}", *counts))
            tensors = a.group("gradient"), b.group("gradient")
            noise = pair.noise_of("gradient")
            result.metrics.append(compare_group(f"gradient, {what}", *tensors, noise))
            result.findings += proportional(*tensors, what)
        return result


def filled(init: dict[str, Array], rng: np.random.Generator) -> dict[str, Array]:
    """An adapter whose B is no longer zero, as after some training."""
    return {
        name: np.asarray(rng.normal(0, 0.02, value.shape), value.dtype)
        if name.endswith("_b")
        else value
        for name, value in init.items()
    }


def proportional(subject: dict[str, Array], reference: dict[str, Array], what: str) -> list[str]:
    """Says so when one gradient is a multiple of the other: same direction, other scale."""
    if subject.keys() != reference.keys() or not subject:
        return []
    a = np.concatenate([subject[k].ravel() for k in reference]).astype(np.float64)
    b = np.concatenate([v.ravel() for v in reference.values()]).astype(np.float64)
    if a.shape != b.shape or not a.any() or not b.any():
        return []
    cosine = float(a @ b / np.sqrt((a @ a) * (b @ b)))
    ratio = float(np.sqrt((a @ a) / (b @ b)))
    if cosine > 1 - 1e-6 and abs(ratio - 1) > 1e-3:
        return [f"{what}: the subject's gradient is the reference's times {ratio:.4g}"]
    return []
