"""Functions that somebody gives for parts of a path: what each may take, and which factors it decides."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from parity import resources
from parity.errors import UsageError
from parity.paths import parts
from parity.paths.plugin.calling import taken, title
from parity.recipe import Recipe, factor_names

Function = Callable[..., Any]

PART = {
    "load": "loader",
    "wire": "wiring",
    "dataset": "batching",
    "batches": "batching",
    "loss": "loss",
    "clip": "clip",
    "optimizer": "optimizer",
    "save": "saver",
    "read": "reader",
    "fuse": "fuse",
    "loop": parts.LOOP,
}
"""What a user gives → the part that it stands for."""
FUNCTION = {part: key for key, part in PART.items()}
"""A part → what a single function for it is."""
_DECIDES = {
    "load": ("model.dtype", "model.weights"),
    "wire": ("lora.",),
    "dataset": ("data.append_eos", "mask.prompt"),
    "batches": ("data.max_length", "data.pad_", "seed.data", "train.batch_size"),
    "loss": ("mask.start_shift", "mask.end_shift"),
    "clip": ("optim.clip",),
    "optimizer": tuple(n for n in factor_names() if n.startswith("optim.") and "clip" not in n),
    "save": (),
    "read": (),
    "fuse": (),
    "loop": (
        "train.accumulation", "train.compile", "train.gradient_checkpointing",
    ),
}  # fmt: skip
"""The factors that are the business of each, unless it takes them."""


@dataclass(frozen=True)
class Given:
    """Functions for parts, and what that makes of the factors of a path."""

    functions: Mapping[str, Function]
    honours: tuple[str, ...]
    own_factors: tuple[str, ...]

    @property
    def own_parts(self) -> tuple[str, ...]:
        """The parts that they stand for."""
        owned = {PART[key] for key in self.functions}
        return tuple(part for part in parts.ALL if part in owned)

    @property
    def name(self) -> str:
        """That of the first function."""
        first = next(iter(self.functions.values()))
        return getattr(first, "__name__", type(first).__name__)

    def described(self, base: str) -> str:
        """A line for the class."""
        return f"`{base}` with {', '.join(f'{k} {title(f)}' for k, f in self.functions.items())}."


def read(
    functions: Mapping[str, Function],
    objects: Mapping[str, Sequence[str]],
    honours: tuple[str, ...],
) -> Given:
    """What is given.

    Args:
        functions: By what they are given as; None for what is not.
        objects: What each may take beside factors.
        honours: Factors of the path that they stand in.

    Raises:
        UsageError: None is given, one is no function, or takes what nobody can give.
    """
    given = {key: function for key, function in functions.items() if function is not None}
    if not given:
        raise UsageError(f"a path needs a part of its own: give one of {', '.join(PART)}")
    factors = factor_names()
    honoured = [f for f in factors if f.startswith(honours)]
    own: list[str] = []
    for key, function in given.items():
        if not callable(function):
            raise UsageError(f"{key}={function!r} is no function")
        takes: tuple[str, ...] = ()
        if key != "loss":
            takes = taken(function, objects[key], f"{key} {title(function)}", key == "clip")
        lost = [f for f in factors if f.startswith(_DECIDES[key]) and f not in takes]
        honoured = [f for f in honoured if f not in lost]
        own += lost
    return Given(given, tuple(honoured), tuple(own))


def lines(recipe: Recipe) -> tuple[list[Any], str]:
    """The lines of train.jsonl, and its folder."""
    folder = resources.data_dir(recipe.data.source)
    text = Path(folder, "train.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines() if line.strip()], str(folder)


class Rows(Sequence[tuple[list[int], int]]):
    """Training rows as (ids, offset), made of what a user's data set gives: ids, or such pairs."""

    def __init__(self, given: Any, longest: int) -> None:
        self.given = list(given)
        self._longest = longest

    def __len__(self) -> int:
        return len(self.given)

    def __getitem__(self, index: Any) -> Any:
        """A row, cut as the reference cuts it."""
        row = self.given[index]
        if isinstance(row, Mapping):
            row = row["input_ids"]
        pair = isinstance(row, tuple) and len(row) == 2 and isinstance(row[1], (int, np.integer))
        ids, offset = row if pair else (row, 0)
        return [int(token) for token in ids][: self._longest], int(offset)

    def itemlen(self, index: int) -> int:
        """Tokens of a row, as mlx-lm's batching asks for them."""
        return len(self[index][0])


def plain(dataset: Any) -> Iterator[Any]:
    """The token ids of each row."""
    return (dataset[index][0] for index in range(len(dataset)))
