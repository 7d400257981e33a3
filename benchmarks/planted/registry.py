"""What a planted fault is, and the list of all of them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from parity.paths.mlx.path import MlxPath

MODELS = ("tiny-gemma3", "tiny-llama", "tiny-qwen3")
REFERENCES = ("mlx-lm", "hf")
LAYERS = 18


@dataclass(frozen=True)
class Planted:
    """One path with one thing changed, and what may truly be said of it.

    Attributes:
        name: `scaled_loss_1`; the class of the path stands under this name in its module.
        kind: Where it was planted: loss, batching, loader, wiring, forward, backward, optimizer,
            clip, loop, cache, or harmless.
        size: Its strength relative to the smallest that a person would notice, in words.
        stage: The earliest stage at which it shows; empty for a harmless variant.
        parts: Parts of the path that may be blamed.
        modules: Regular expression of the modules (or tensors) that may be named as the place.
        steps: Training steps that may be named as the first that diverges.
        differs: Regular expression of what may be said to differ first in that step.
        hints: Names of the hints that are right.
        settings: Settings of probe 00 that may be said to differ.
        spec: `module:Class`, as `--subject` takes it.
        model: Fixture it is tried on.
        references: What it is held against.
        recipe: Factors changed on both sides, without which it cannot show.
    """

    name: str
    kind: str
    what: str
    size: str
    stage: str
    parts: frozenset[str]
    modules: str
    steps: frozenset[int]
    differs: str
    hints: frozenset[str]
    settings: frozenset[str]
    spec: str
    model: str
    references: tuple[str, ...]
    recipe: Mapping[str, Any] = field(default_factory=dict)


ALL: list[Planted] = []


def planted(
    kind: str,
    stage: str = "",
    sizes: Mapping[str, Any] | None = None,
    parts: str = "",
    modules: str = "(?!)",
    steps: tuple[int, ...] = (),
    differs: str = "(?!)",
    hints: str = "",
    settings: str = "",
    references: tuple[str, ...] = REFERENCES,
    model: str = "",
    recipe: Mapping[str, Any] | None = None,
) -> Callable[[Callable[..., type[MlxPath]]], Callable[..., type[MlxPath]]]:
    """Registers what a function makes: one path for each size.

    The function takes a size (or nothing) and returns a subclass of `MlxPath`; its docstring says
    what is wrong. Models and the order of references take turns, so that each kind meets them all.
    """

    def register(make: Callable[..., type[MlxPath]]) -> Callable[..., type[MlxPath]]:
        home = sys.modules[make.__module__]
        for index, (size, value) in enumerate((sizes or {"": None}).items()):
            name = f"{make.__name__}_{index}" if sizes else make.__name__
            path = make(value) if sizes else make()
            path.name = name.replace("_", "-")
            path.__name__ = path.__qualname__ = name
            path.__module__ = make.__module__
            target = name if sizes else f"{name}_path"
            setattr(home, target, path)
            ALL.append(
                Planted(
                    name=name,
                    kind=kind,
                    what=" ".join((make.__doc__ or "").split()),
                    size=size,
                    stage=stage,
                    parts=frozenset(parts.split()),
                    modules=modules,
                    steps=frozenset(steps),
                    differs=differs,
                    hints=frozenset(hints.split()),
                    settings=frozenset(settings.split()),
                    spec=f"{make.__module__}:{target}",
                    model=model or MODELS[len(ALL) % len(MODELS)],
                    references=references,
                    recipe=dict(recipe or {}),
                )
            )
        return make

    return register


HOMES = (
    "backward", "batching", "cache", "forward", "harmless", "loop", "loss", "optimizer", "wiring",
    "updates", "training", "ports", "starts", "plugins",
)  # fmt: skip
"""Modules of this package in the order in which their faults take turns at models and references."""


def everything() -> list[Planted]:
    """All faults and harmless variants."""
    for home in HOMES:  # importing registers
        importlib.import_module(f"benchmarks.planted.{home}")
    return list(ALL)
