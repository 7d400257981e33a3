"""What a loss takes after the model, and batches written in that way.

Batches are ids (B, W) and lengths (B, 2), (offset, tokens) of each row, as mlx-lm has them. A loss that
takes something else says so by the names of its parameters.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from parity.errors import Unsupported, UsageError
from parity.paths.plugin.calling import title
from parity.trace import Array

TARGETS = ("targets", "target", "labels", "y")
LENGTHS = ("lengths", "lens", "length")
MASKS = ("mask", "masks", "attention_mask", "weights", "loss_mask")


@dataclass(frozen=True)
class Layout:
    """The arrays that a loss takes after the model: some of `ids`, `inputs`, `targets`, `lengths`.

    `ids` (B, W) are whole rows, `inputs` and `targets` (B, W - 1) are they without the last and without
    the first token, `lengths` is (B, 2).
    """

    names: tuple[str, ...]
    write: Callable[..., Any] | None = None
    """What makes the arguments from (ids, lengths), where the user gives it."""

    def arguments(self, ids: Any, lengths: Any) -> tuple[Any, ...]:
        """A batch as the loss takes it."""
        if self.write is not None:
            made = self.write(ids, lengths)
            return tuple(made) if isinstance(made, (tuple, list)) else (made,)
        arrays = {"ids": ids, "inputs": ids[:, :-1], "targets": ids[:, 1:], "lengths": lengths}
        return tuple(arrays[name] for name in self.names)

    def live(self, arguments: Sequence[Any]) -> tuple[Any, Any]:
        """Ids and lengths of live arrays.

        Raises:
            Unsupported: There are no lengths among them.
        """
        import mlx.core as mx

        given = dict(zip(self.names, arguments, strict=False))
        if "lengths" not in given:
            raise Unsupported("its loss is given no lengths, which the loss of another path takes")
        lengths = given["lengths"]
        if lengths.ndim == 1:
            lengths = mx.stack([mx.zeros_like(lengths), lengths], axis=1)
        if "ids" in given:
            return given["ids"], lengths
        return mx.concatenate([given["inputs"][:, :1], given["targets"]], axis=1), lengths

    def batch(
        self, arguments: Sequence[Array], rows: Sequence[Sequence[int]]
    ) -> tuple[Array, Array]:
        """Ids (B, W) and lengths (B, 2) of the arguments of a loss.

        Where no lengths are among them a row is as long as the training row that it begins with, and as
        wide as the batch where it is none.
        """
        names = self.names or ("ids", "lengths")
        given = dict(zip(names, arguments, strict=False))
        if wrong := _misread(given, names):
            shapes = ", ".join(str(argument.shape) for argument in arguments)
            raise Unsupported(
                f"the loss is given arrays {shapes}, read as {', '.join(names)}: {wrong}; name its "
                "parameters so, or give `batch=` where it takes something else"
            )
        ids = given.get("ids")
        if ids is None:
            ids = np.concatenate([given["inputs"][:, :1], given["targets"]], axis=1)
        ids, lengths = np.asarray(ids, np.int32), given.get("lengths")
        if lengths is None:
            return ids, row_lengths(ids, rows)
        lengths = np.asarray(lengths, np.int32)
        if lengths.ndim == 1:
            lengths = np.stack([np.zeros_like(lengths), lengths], axis=1)
        return ids, lengths


def _misread(given: Mapping[str, Array], names: Sequence[str]) -> str:
    """What contradicts the names of the arrays that a loss was given; empty where nothing does."""
    if missing := [name for name in names if name not in given]:
        return f"there is no {missing[0]}"
    rows = next(iter(given.values())).shape[:1]
    for name, array in given.items():
        shapes = [(*rows, 2), rows] if name == "lengths" else [(*rows, *array.shape[1:2])]
        if array.shape not in shapes or array.dtype.kind not in "iu":
            return f"{name} has shape {array.shape} and dtype {array.dtype}"
    if "targets" in given and not np.array_equal(given["inputs"][:, 1:], given["targets"][:, :-1]):
        return "the targets are not the inputs moved by one"
    return ""


def row_lengths(ids: Array, rows: Sequence[Sequence[int]]) -> Array:
    """First supervised token and tokens (B, 2) of ids (B, W), by the training row that each begins with."""
    longest_first = sorted(map(tuple, rows), key=len, reverse=True)
    found = []
    for line in map(tuple, ids.tolist()):
        row = next((row for row in longest_first if row and line[: len(row)] == row), line)
        found.append((0, len(row)))
    return np.array(found, np.int32)


def layout(
    loss: Callable[..., Any], write: Callable[..., Any] | None = None, model_first: bool = True
) -> Layout:
    """The layout that the parameters of a loss name, the first being the model.

    Args:
        loss: Whose parameters are read.
        write: Makes its arguments from (ids, lengths); nothing is read then.
        model_first: Whether it takes the model, or has it from elsewhere.

    Raises:
        UsageError: It takes a mask, or more than can be told from the names.
    """
    try:
        found = list(inspect.signature(loss).parameters.values())
    except (TypeError, ValueError):
        found = []
    needed = [
        p.name
        for p in found[int(model_first) :]
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    if write is not None:
        return Layout((), write)
    if not needed:
        return Layout(("ids", "lengths"))
    names, shifted = [], any(name in TARGETS for name in needed)
    for position, name in enumerate(needed):
        if position == 0:
            names.append("inputs" if shifted else "ids")
        elif name in TARGETS:
            names.append("targets")
        elif name in LENGTHS or (position == len(needed) - 1 and name not in MASKS):
            names.append("lengths")
        else:
            raise UsageError(
                f"loss {title(loss)} takes {', '.join(needed)}: what {name!r} is cannot be told; give "
                "`batch=`, a function that makes these arguments from (ids, lengths)"
            )
    return Layout(tuple(names))
