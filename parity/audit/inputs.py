"""What methods are handed while factors are moved: the same for every path."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from parity.capture.engine import Engine
from parity.errors import NO_ANSWER
from parity.recipe import Recipe
from parity.trace import Array, Trace

BATCHES = 6  # micro-batches: enough for the steps of the small recipe with accumulation
SHAPES = {
    "layers.0.self_attn.q_proj.lora_a": (6, 4),
    "layers.0.self_attn.q_proj.lora_b": (4, 6),
}
STEPS = 3
_TRAINING = ("train", "train_and_load")
_ADAPTED = (
    *_TRAINING, "gradient", "decode", "kv_cache", "round_trip", "save_adapter", "fuse",
)  # fmt: skip


def optimizer_inputs() -> Trace:
    """Weights and gradients of a few steps."""
    rng = np.random.default_rng(0)

    def drawn() -> dict[str, Array]:
        return {n: np.asarray(rng.normal(size=shape), np.float32) for n, shape in SHAPES.items()}

    trace = Trace().with_group("weight", drawn())
    for step in range(STEPS):
        trace = trace.with_group(f"gradient.{step}", drawn())
    return trace


def shapes(engine: Engine, paths: Iterable[str], recipe: Recipe) -> Mapping[str, Array]:
    """An adapter of a recipe, whose names and shapes count: of the first path that makes one.

    Raises:
        Unsupported, CaptureError, UnmatchedNames: None does; that of the first.
    """
    failure: Exception | None = None
    for path in paths:
        try:
            return engine.capture(path, "lora_init", recipe, Trace()).group("adapter")
        except NO_ANSWER as error:
            failure = failure or error
    assert failure is not None
    raise failure


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
    if method == "cross_entropy":
        rng = np.random.default_rng(3)
        ids = np.asarray(rng.integers(1, 20, (2, 9)), np.int32)
        logits = np.asarray(rng.normal(0, 3, (2, 8, 20)), np.float32)
        lengths = np.array([[0, 9], [0, 6]], np.int32)
        return Trace({"logits": logits, "ids": ids, "lengths": lengths})
    if method == "kv_cache":
        turns = {f"turn.{n}": rows[n][0][0, : 4 + n] for n in range(4)}
        handed = Trace(dict(turns), {"trim": 1})
    if method in ("round_trip", "train_and_load", "save_adapter", "fuse"):
        handed = Trace({"ids": rows[0][0][:, :8]})
    if method == "tokenization":
        texts = {"texts": ["My name is Unsloth!"], "conversations": []}
        return Trace(scalars=texts)
    if method == "logits":
        return Trace({"ids.0": rows[0][0][:1, :8]})
    if method == "optimizer_step":
        return optimizer_inputs()
    if method in (*_TRAINING, "supervised_positions"):
        for index, (ids, lengths) in enumerate(rows if method in _TRAINING else rows[:1]):
            handed.arrays[f"batches/ids.{index}"] = ids
            handed.arrays[f"batches/lengths.{index}"] = lengths
    if method == "gradient":
        handed = Trace({"ids": rows[0][0], "lengths": rows[0][1]})
    if method == "decode":
        handed = Trace(scalars={"prompts": ["My name"], "expected": " is"})
    if method in _ADAPTED:
        return handed.with_group("adapter", adapter(start))
    return handed
