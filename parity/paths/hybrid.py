"""Hybrids: an MLX path with parts of other MLX paths in the place of its own.

`unsloth+loss=mlx-lm` is the path `unsloth` with mlx-lm's loss in its loop. The loop, and the order of
set-up, are those of the path named first.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Any, ClassVar

from parity.errors import UsageError
from parity.paths.base import Path, resolve
from parity.paths.mlx import MlxPath

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


def part_of(factor: str) -> str:
    """The part that honours a factor: the one that names most of it, else the loop."""
    said = {
        prefix: part
        for part, prefixes in PARTS.items()
        for prefix in prefixes
        if factor.startswith(prefix)
    }
    return said[max(said, key=len)] if said else LOOP


def sources(name: str) -> dict[str, str]:
    """Which path each part, and the loop, of a path or hybrid comes from."""
    base, *swaps = name.split("+")
    return dict.fromkeys(PARTS, base) | {LOOP: base} | dict(_swap(swap, name) for swap in swaps)


def spec(parts: Mapping[str, str]) -> str:
    """The name of a hybrid of parts from these paths."""
    base = parts[LOOP]
    return "+".join([base, *(f"{p}={parts[p]}" for p in PARTS if parts[p] != base)])


def swappable(name: str) -> bool:
    """Whether the parts of a path can stand in another."""
    # A release in an environment of its own cannot share a process with anything else.
    return "@" not in name and issubclass(resolve(name), MlxPath)


def compose(name: str) -> type[Path]:
    """The class of a hybrid named `PATH+PART=PATH+…`.

    Raises:
        UsageError: An unknown part or path, or one whose parts cannot be swapped.
    """
    parts = sources(name)
    if wrong := [path for path in dict.fromkeys(parts.values()) if not swappable(path)]:
        raise UsageError(
            f"{name!r}: the parts of {wrong[0]!r} cannot be swapped, only those on MLX in this environment can"
        )
    base = parts.pop(LOOP)
    kind: Any = resolve(base)
    donors: dict[str, Any] = {p: resolve(path) for p, path in parts.items() if path != base}
    members = (kind, *donors.values())

    class Hybrid(kind):  # type: ignore[misc]
        packages: ClassVar[tuple[str, ...]] = tuple(
            dict.fromkeys(package for member in members for package in member.packages)
        )
        fixed: ClassVar[Mapping[str, Any]] = _each(
            kind.fixed, {part: member.fixed for part, member in donors.items()}
        )

        def __init__(self, cache: FilePath) -> None:
            super().__init__(cache)
            made = {member: member(cache) for member in set(donors.values())}
            self.donors = {part: made[member] for part, member in donors.items()}

        @classmethod
        def made_of(cls) -> tuple[type[Path], ...]:
            return members

        def shipped(self) -> dict[str, Any]:
            """Each factor as the path that honours it sets it."""
            theirs = {part: member.shipped() for part, member in self.donors.items()}
            return _each(super().shipped(), theirs)

    Hybrid.name = name
    return Hybrid


def _swap(text: str, whole: str) -> tuple[str, str]:
    part, _, path = text.partition("=")
    if part not in PARTS or not path:
        raise UsageError(
            f"{whole!r}: {text!r} is no swap: write PART=PATH, PART being {', '.join(PARTS)}"
        )
    return part, path


def _each(own: Mapping[str, Any], donors: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Each factor as the path that honours it has it; `donors` holds a mapping a part."""
    kept = {factor: value for factor, value in own.items() if part_of(factor) not in donors}
    return kept | {
        factor: value
        for part, theirs in donors.items()
        for factor, value in theirs.items()
        if part_of(factor) == part
    }
