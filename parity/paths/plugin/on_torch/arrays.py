"""What a loss on torch takes, by the names of its parameters, and the batches that somebody draws."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from parity.errors import Unsupported, UsageError
from parity.paths.hf.live import IGNORED, ids_tensor, to_numpy
from parity.paths.plugin.arrays import LENGTHS, TARGETS, row_lengths
from parity.paths.plugin.calling import title
from parity.trace import Array

IDS = ("ids", "input_ids", "tokens")
LABELS = ("labels",)
SHIFTED = tuple(name for name in TARGETS if name not in LABELS)
COUNT = "num_items_in_batch"
MODEL, LOGITS, OUTPUTS = "model", "logits", "outputs"
_DICT = ("batch", "inputs")

OwnBatch = tuple[Array, Array, Array]
"""Ids (B, W), lengths (B, 2) and targets (B, W - 1), `IGNORED` where nothing is supervised."""


@dataclass(frozen=True)
class TorchLayout:
    """What a loss takes.

    Attributes:
        first: The model, the `logits` that it gives, or its `outputs`.
        names: What the parameters after it mean: `ids`, `inputs`, `labels`, `targets`, `lengths`,
            `attention_mask`, `batch` or `num_items_in_batch`.
        keywords: The parameters that are given by their names, which have defaults.
        write: Makes the arguments from (ids, lengths, labels), where the user gives it.
    """

    first: str = MODEL
    names: tuple[str, ...] = ("batch",)
    keywords: Mapping[str, str] = field(default_factory=dict)
    write: Callable[..., Any] | None = None

    @property
    def counts(self) -> bool:
        """Whether it divides by a count of tokens that it is given."""
        return COUNT in (*self.names, *self.keywords.values())

    @property
    def whole_rows(self) -> bool:
        """Whether what it is given of the model covers whole rows, or rows without their last token."""
        return not {"targets", "inputs"} & {*self.names}

    def arguments(
        self, ids: Array, lengths: Array, targets: Array, count: int | None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments after the first one, by place and by name.

        Args:
            ids: (B, W).
            lengths: (B, 2), the first supervised token and the number of tokens of each row.
            targets: (B, W - 1), `IGNORED` where nothing is supervised.
            count: Supervised tokens of the whole step, or None.
        """
        labels = np.pad(targets, ((0, 0), (1, 0)), constant_values=IGNORED)
        real = np.arange(ids.shape[1]) < lengths[:, 1:]
        row = {
            "input_ids": ids_tensor(ids), "attention_mask": ids_tensor(real),
            "labels": ids_tensor(labels),
        }  # fmt: skip
        if self.write is not None:
            made = self.write(row["input_ids"], ids_tensor(lengths), row["labels"])
            return (tuple(made) if isinstance(made, (tuple, list)) else (made,)), {}
        values = {
            "ids": row["input_ids"], "inputs": row["input_ids"][:, :-1], "labels": row["labels"],
            "targets": ids_tensor(targets), "lengths": ids_tensor(lengths), "batch": row,
            "attention_mask": row["attention_mask"], COUNT: None if count is None else ids_tensor(np.array(count)),
        }  # fmt: skip
        by_place = tuple(values[name] for name in self.names)
        return by_place, {key: values[name] for key, name in self.keywords.items()}


def torch_layout(loss: Callable[..., Any], write: Callable[..., Any] | None = None) -> TorchLayout:
    """The layout that the parameters of a loss name.

    Raises:
        UsageError: It takes what cannot be told from the names.
    """
    try:
        found = list(inspect.signature(loss).parameters.values())
    except (TypeError, ValueError):
        found = []
    usable = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    named = [p for p in found if p.kind in (*usable, inspect.Parameter.KEYWORD_ONLY)]
    first = named[0].name if named and named[0].name in (LOGITS, OUTPUTS) else MODEL
    if write is not None:
        return TorchLayout(first, (), {}, write)
    rest = named[1:]
    needed = [p.name for p in rest if p.default is p.empty and p.kind in usable]
    shifted = any(name in SHIFTED for name in needed)
    names = []
    for name in needed:
        if not (meaning := _meaning(name, shifted)):
            raise UsageError(
                f"loss {title(loss)} takes {', '.join(needed)}: what {name!r} is cannot be told; give "
                "`batch=`, a function that makes these arguments from (ids, lengths, labels)"
            )
        names.append(meaning)
    optional = {p.name: _meaning(p.name, shifted) for p in rest if p.name not in needed}
    keywords = {name: meaning for name, meaning in optional.items() if meaning}
    return TorchLayout(first, tuple(names), keywords)


def _meaning(name: str, shifted: bool) -> str:
    """What a parameter is, by its name; empty where that does not tell."""
    if name in SHIFTED:
        return "targets"
    if shifted and name in ("inputs", *IDS):
        return "inputs"
    known = {IDS: "ids", LABELS: "labels", LENGTHS: "lengths", _DICT: "batch"}
    for names, meaning in known.items():
        if name in names:
            return meaning
    return name if name in ("attention_mask", COUNT) else ""


def own_batch(raw: Any, rows: Sequence[Sequence[int]], targets: Callable[..., Array]) -> OwnBatch:
    """A batch that somebody draws: a dict with input_ids, or ids with labels, or ids with lengths.

    Args:
        raw: The batch.
        rows: Training rows, by which the length of a row is told where nothing else says it.
        targets: Makes targets from (ids, lengths), where it brings no labels.

    Raises:
        Unsupported: It is something else.
    """
    import torch

    labels = mask = lengths = None
    if isinstance(raw, Mapping):
        given = {key: value for key, value in raw.items() if isinstance(value, torch.Tensor)}
        ids, labels, mask = (given.get(k) for k in ("input_ids", "labels", "attention_mask"))
        shapes = {key: tuple(value.shape) for key, value in given.items()}
    else:
        parts = list(raw) if isinstance(raw, (tuple, list)) else [raw]
        ids, second = [*parts, None, None][:2]
        shapes = {str(n): tuple(getattr(value, "shape", ())) for n, value in enumerate(parts)}
        if second is not None and second.shape == ids.shape:
            labels = second
        elif second is not None:
            lengths = second
        if len(parts) > 2:
            ids = None
    if ids is None or getattr(ids, "ndim", 0) != 2:
        raise Unsupported(
            f"batches are dicts with input_ids (B, W), or ids with labels, or ids with lengths; not {shapes}"
        )
    tokens = np.asarray(to_numpy(ids), np.int32)
    if lengths is not None:
        found = np.asarray(to_numpy(lengths), np.int32)
        if found.ndim == 1:
            found = np.stack([np.zeros_like(found), found], axis=1)
        return tokens, found, targets(tokens, found)
    last = to_numpy(mask).sum(axis=1) if mask is not None else row_lengths(tokens, rows)[:, 1]
    if labels is None:
        found = np.stack([np.zeros_like(last), last], axis=1).astype(np.int32)
        return tokens, found, targets(tokens, found)
    supervised = to_numpy(labels) != IGNORED
    first = np.where(supervised.any(axis=1), supervised.argmax(axis=1), 0)
    return tokens, np.stack([first, last], axis=1).astype(np.int32), to_numpy(labels)[:, 1:]
