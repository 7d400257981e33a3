"""unsloth-zoo as it is installed: what its MLX modules offer, whichever release it is."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
import types
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from parity.errors import Unsupported

PACKAGE = "unsloth-zoo"
INSTALL = f"{PACKAGE} is not installed: pip install --no-deps {PACKAGE}"
SWITCH = "UNSLOTH_ZOO_DISABLE_GPU_INIT"
"""The variable that lets a release be imported without a GPU, where the release knows it."""


class Library(NamedTuple):
    """The modules of one release."""

    loader: Any
    trainer: Any
    utils: Any
    version: str

    def options(self) -> dict[str, Any]:
        """Field of `MLXTrainingConfig` → default."""
        return {field.name: field.default for field in fields(self.trainer.MLXTrainingConfig)}

    def end_shift(self) -> int:
        """`mask.end_shift` of the loss as it stands: 0 for `<`, 1 for `<=`, found by calling it."""
        import mlx.core as mx

        length = 3
        loss = self.trainer.make_baseline_loss_fn()
        tokens = loss(
            lambda _: mx.zeros((1, 5, 2)), mx.zeros((1, 6), mx.int32), mx.array([[0, length]])
        )[1]
        return int(tokens.item()) - (length - 1)


@functools.cache
def library() -> Library:
    """The installed release, imported.

    Raises:
        Unsupported: It is not installed, has no MLX part or cannot be imported.
    """
    spec = importlib.util.find_spec("unsloth_zoo")
    if spec is None or not spec.submodule_search_locations:
        raise Unsupported(INSTALL)
    folder = Path(next(iter(spec.submodule_search_locations)))
    if not (folder / "mlx" / "trainer.py").is_file():
        raise Unsupported(f"this {PACKAGE} has no MLX trainer: 2026.5.2 is the first that has")
    if sys.platform == "linux":
        os.environ.setdefault(SWITCH, "1")
        os.environ.setdefault("UNSLOTH_IS_PRESENT", "1")
    if SWITCH not in (folder / "__init__.py").read_text(encoding="utf-8"):
        # Before 2026.7.1 the package itself looks for a GPU; its MLX modules do not need it.
        parent = types.ModuleType("unsloth_zoo")
        parent.__path__ = [str(folder)]
        parent.__spec__ = spec
        sys.modules.setdefault("unsloth_zoo", parent)
    try:
        loader, trainer, utils = (
            importlib.import_module(f"unsloth_zoo.mlx.{name}")
            for name in ("loader", "trainer", "utils")
        )
    except ImportError as error:
        raise Unsupported(f"{PACKAGE} cannot be imported here: {error}") from None
    try:
        release = version(PACKAGE)
    except PackageNotFoundError:
        release = "unknown"
    return Library(loader, trainer, utils, release)


def ready_batches(found: Library, batches: list[tuple[Any, Any]]) -> Any:
    """Batches in the form the trainer takes them ready-made, each to be trained on as it is.

    A release that compiles only for a plan of its own gets one that yields these batches; a list
    would silently train uncompiled there.
    """
    plan: Any = getattr(found.utils, "FiniteTextBatchPlan", None)
    if plan is None or not hasattr(plan, "materialize"):
        return [(ids, lengths, None) for ids, lengths in batches]

    class FixedPlan(plan):  # type: ignore[misc]
        def materialize(self, index: int, *, phase: Any = None) -> Any:
            return (*batches[int(index)], None)

    row = found.utils._FiniteTextRow
    rows: list[Any] = []
    schedule, widths = [], []
    for ids, lengths in batches:
        values, spans = np.array(ids), np.array(lengths)
        schedule.append(range(len(rows), len(rows) + len(values)))
        widths.append(values.shape[1])
        for value, (offset, end) in zip(values.tolist(), spans.tolist(), strict=True):
            rows.append(row(tuple(value[:end]), int(offset)))
    return FixedPlan(rows, schedule, max_seq_length=max(widths), pad_id=0, widths=widths)
