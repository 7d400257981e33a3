"""What methods are handed while factors are moved: the same for every path."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from parity.trace import Array, Trace

BATCHES = 6  # micro-batches: enough for the steps of the small recipe with accumulation
SHAPES = {
    "layers.0.self_attn.q_proj.lora_a": (6, 4),
    "layers.0.self_attn.q_proj.lora_b": (4, 6),
}
STEPS = 3


def optimizer_inputs() -> Trace:
    """Weights and gradients of a few steps."""
    rng = np.random.default_rng(0)

    def drawn() -> dict[str, Array]:
        return {n: np.asarray(rng.normal(size=shape), np.float32) for n, shape in SHAPES.items()}

    trace = Trace().with_group("weight", drawn())
    for step in range(STEPS):
        trace = trace.with_group(f"gradient.{step}", drawn())
    return trace


def adapter(start: Mapping[str, Array]) -> dict[str, Array]:
    """An adapter of these shapes whose B is not zero, so that scale and dropout matter."""
    rng = np.random.default_rng(1)
    return {
        name: np.asarray(rng.normal(0, 0.05, value.shape), np.float32)
        for name, value in sorted(start.items())
    }


def batches() -> list[tuple[Array, Array]]:
    """Micro-batches of two rows: unlike tokens, lengths and widths."""
    rng = np.random.default_rng(2)
    found = []
    for index in range(BATCHES):
        lengths = np.array([[0, 9 + index], [0, 5]], np.int32)
        ids = np.zeros((2, 12 + index), np.int32)
        for row, (_, length) in zip(ids, lengths, strict=True):
            row[:length] = rng.integers(10, 250, length)
        found.append((ids, lengths))
    return found


def given(method: str, start: Mapping[str, Array]) -> Trace:
    """Inputs of a method.

    Args:
        method: One of the contract.
        start: An adapter, whose names and shapes count.
    """
    handed = Trace()
    rows = batches()
    if method == "tokenization":
        texts = {"texts": ["My name is Unsloth!"], "conversations": []}
        return Trace(scalars=texts)
    if method == "logits":
        return Trace({"ids.0": rows[0][0][:1, :8]})
    if method == "optimizer_step":
        return optimizer_inputs()
    if method in ("train", "supervised_positions"):
        for index, (ids, lengths) in enumerate(rows if method == "train" else rows[:1]):
            handed.arrays[f"batches/ids.{index}"] = ids
            handed.arrays[f"batches/lengths.{index}"] = lengths
    if method == "gradient":
        handed = Trace({"ids": rows[0][0], "lengths": rows[0][1]})
    if method == "decode":
        handed = Trace(scalars={"prompts": ["My name"], "expected": " is"})
    if method in ("train", "gradient", "decode"):
        return handed.with_group("adapter", adapter(start))
    return handed
