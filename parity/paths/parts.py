"""The parts of a path and the names of hybrids: `unsloth+loss=mlx-lm`.

That is the path `unsloth` with mlx-lm's loss in its loop. The loop, and the order of set-up, are those
of the path named first.
"""

from __future__ import annotations

from collections.abc import Mapping

from parity.errors import UsageError

LOOP = "loop"
PARTS: Mapping[str, tuple[str, ...]] = {
    "loader": ("model.",),
    "wiring": ("lora.",),
    "batching": ("data.", "mask.prompt", "seed.data", "train.batch_size"),
    "loss": ("mask.",),
    "clip": ("optim.clip",),
    "optimizer": ("optim.",),
}
"""What one path can take from another, and the factors that a part honours."""
ALL = (*PARTS, LOOP)


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


def _swap(text: str, whole: str) -> tuple[str, str]:
    part, _, path = text.partition("=")
    if part not in PARTS or not path:
        raise UsageError(
            f"{whole!r}: {text!r} is no swap: write PART=PATH, PART being {', '.join(PARTS)}"
        )
    return part, path
