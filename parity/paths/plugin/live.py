"""What is done to the live objects of a trainer around its run."""

from __future__ import annotations

import contextlib
import importlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from parity.paths.mlx.live import Loss, renamed
from parity.paths.plugin.arrays import layout
from parity.trace import Array

Function = Callable[..., Any]


def in_place(
    other: Loss, batch: Function | None, model: Any, function: Function
) -> Callable[..., Any]:
    """The loss of another path, called and answering as the trainer's own."""

    def loss(*args: Any) -> Any:
        first = bool(args) and args[0] is model
        arguments = args[1:] if first else args
        result = other(model, *layout(function, batch, first).live(arguments))
        # Of the own loss, which is never evaluated, only the kind of its answer counts.
        return result if isinstance(function(*args), (tuple, list)) else result[0]

    return loss


def transplant(model: Any, adapter: Mapping[str, Array]) -> None:
    """Gives a live model the tensors of an adapter, under canonical names."""
    import mlx.core as mx

    model.load_weights(list(renamed(model, adapter).items()), strict=False)
    mx.eval(model.parameters())


@contextlib.contextmanager
def restored_calls(path: str) -> Iterator[None]:
    """Undoes what a run does to the classes of modules: checkpointing patches those of layers."""
    import mlx.nn as nn

    with contextlib.suppress(Exception):  # a class that is imported first by the run is not known
        kind = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))["model_type"]
        importlib.import_module(f"mlx_lm.models.{kind}")
    kinds, queue = dict[type, Any](), [nn.Module]
    while queue:
        kind = queue.pop()
        kinds[kind] = vars(kind).get("__call__")
        queue += [k for k in kind.__subclasses__() if k not in kinds]
    try:
        yield
    finally:
        for kind, was in kinds.items():
            if was is not None and vars(kind).get("__call__") is not was:
                setattr(kind, "__call__", was)  # noqa: B010 mypy knows no such assignment
