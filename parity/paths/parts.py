"""The parts of a path and the names of hybrids: `unsloth+loss=mlx-lm`.

That is the path `unsloth` with mlx-lm's loss in its loop. The loop, and the order of set-up, are those
of the path named first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from parity.errors import UsageError

LOOP = "loop"
PARTS: Mapping[str, tuple[str, ...]] = {
    "loader": ("model.",),
    "wiring": ("lora.",),
    "batching": ("data.", "mask.prompt", "seed.data", "train.batch_size"),
    "loss": ("mask.",),
    "clip": ("optim.clip",),
    "optimizer": ("optim.",),
    "saver": (),
    "reader": (),
    "fuse": (),
}
"""What one path can take from another, and the factors that a part honours."""
ALL = (*PARTS, LOOP)
FILES = ("saver", "reader", "fuse")
"""The parts that a trained adapter goes through: saved, read into a model, fused into its weights."""
TRAINING = tuple(part for part in ALL if part not in FILES)
COMPARED: Mapping[str, tuple[str, ...]] = {
    "tokenization": ("loader", "batching"),
    "supervised_positions": ("batching", "loss"),
    "logits": ("loader",),
    "cross_entropy": ("loss",),
    "lora_init": ("loader", "wiring", LOOP),
    "gradient": ("loader", "wiring", "loss", LOOP),
    "optimizer_step": ("clip", "optimizer"),
    "round_trip": ("loader", "wiring", "saver", "reader"),
    "kv_cache": ("loader", "wiring"),
    "exchange": ("loader", "wiring", "saver", "reader"),
    "fuse": ("loader", "wiring", *FILES),
}
"""Stage → the parts that what it compares comes from; those of the training at the other stages."""
_THROUGH_FILES = ("kv_cache", "greedy_decode")
"""Stages at which some paths save the adapter and read it again, as `mlx_lm.generate` does."""
_WORDS = {"saver": "adapter saver", "reader": "adapter reader"}


def in_words(part: str) -> str:
    """What a sentence calls a part: a loader loads the base, a reader the adapter."""
    return _WORDS.get(part, part)


def idle(stage: str) -> set[str]:
    """Parts that no path uses at a stage."""
    used = ("saver", "reader") if stage in _THROUGH_FILES else COMPARED.get(stage, ())
    return set(FILES) - set(used)


def part_of(factor: str) -> str:
    """The part that honours a factor: the one that names most of it, else the loop."""
    matching = {
        prefix: part
        for part, prefixes in PARTS.items()
        for prefix in prefixes
        if factor.startswith(prefix)
    }
    return matching[max(matching, key=len)] if matching else LOOP


def sources(name: str) -> dict[str, str]:
    """Which path each part, and the loop, of a path or hybrid comes from."""
    base, *swaps = name.split("+")
    return dict.fromkeys(PARTS, base) | {LOOP: base} | dict(_swap(swap, name) for swap in swaps)


def spec(parts: Mapping[str, str]) -> str:
    """The name of a hybrid of parts from these paths."""
    base = parts[LOOP]
    return "+".join([base, *(f"{p}={parts[p]}" for p in PARTS if parts[p] != base)])


AFTERWARDS = {
    "greedy_decode": ("decoding", ""),
    "kv_cache": ("KV cache", ""),
    "round_trip": ("loading of a saved adapter", "reader"),
    "fuse": ("fuse", "fuse"),
}
"""Stage → what it uses beside the parts of the training, and the part that this is."""


def origin(side: str, stage: str, environment: Mapping[str, Any], other: str) -> list[str]:
    """Whose parts a side was made of, in words; nothing where they are all its own.

    Args:
        side: `subject` or `reference`.
        stage: What was compared.
        environment: As the side's traces have it.
        other: The path of the other side.
    """
    if not (made_of := environment.get("parts")):
        return []
    own, others = made_of["own"], made_of["others"]
    if set(own) >= set(TRAINING):
        used, part = AFTERWARDS.get(stage, ("", ""))
        lent = used and part not in own
        return [f"the {side}'s {used} is that of path {others}"] if lent else []
    words = f"of the {side} only {', '.join(own)} {'is' if len(own) == 1 else 'are'} its own"
    words += f", all else is taken from path {others}"
    if not set(own) & set(COMPARED.get(stage, TRAINING)):
        words += f"; none of its own takes part here: this compares {others} with {other}"
    return [words]


def _swap(text: str, whole: str) -> tuple[str, str]:
    part, _, path = text.partition("=")
    if part not in PARTS or not path:
        raise UsageError(
            f"{whole!r}: {text!r} is no swap: write PART=PATH, PART being {', '.join(PARTS)}"
        )
    return part, path
