"""Which weights MLX holds with something added to them, so that torch's are seen and written likewise.

mlx-lm keeps 1 + weight where transformers keeps the weight and adds the 1 itself, in some models and not in
others. It is asked what it does (`parity.paths.mlx.conventions`), in a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from parity.derived import kept
from parity.errors import Unsupported
from parity.paths.hf import tensors

Shapes = Mapping[str, list[int]]
MODULE = "parity.paths.mlx.conventions"


def apply(model: Any, source: str, shapes: Shapes | None) -> None:
    """Lets the weights of a live model be seen as mlx-lm holds them.

    Args:
        model: Whose tensors are to have MLX's values.
        source: Its folder.
        shapes: Of the tensors as mlx-lm would read them; None takes those that the live model has.

    Raises:
        Unsupported: mlx-lm changes a vector otherwise than by adding to it; or it cannot be asked, and
            torch's model has norms of which it is not clear.
    """
    if hasattr(model, tensors.OFFSETS):
        return
    try:
        found = _asked(source, shapes or live_shapes(model))
    except _NotAskedError as error:
        if unclear := _adding(model):
            raise Unsupported(
                f"{unclear} is 1 + weight in transformers; whether mlx-lm stores it so is not known "
                f"here ({error})"
            ) from None
        found = {"offsets": {}, "otherwise": {}}
    if other := {n: v for n, v in found["otherwise"].items() if n in tensors.tensors(model)}:
        name, (low, high) = next(iter(other.items()))
        raise Unsupported(
            f"mlx-lm changes {len(other)} vectors while it loads them: of 0 in {name} it makes {low:.4g}, "
            f"of 2.5 {high:.4g}, which is no offset"
        )
    setattr(model, tensors.OFFSETS, found["offsets"])


def live_shapes(model: Any) -> dict[str, list[int]]:
    """Shapes of a live model's tensors by its own names."""
    return {name: list(value.shape) for name, value in model.state_dict().items()}


def stored_shapes(folder: Path) -> dict[str, list[int]]:
    """Shapes of a checkpoint's tensors by their stored names; empty without safetensors."""
    from safetensors import safe_open

    found = dict[str, list[int]]()
    for file in sorted(folder.glob("model*.safetensors")):
        with safe_open(file, "np") as stored:
            found |= {name: stored.get_slice(name).get_shape() for name in stored.keys()}  # noqa: SIM118
    return found


class _NotAskedError(Exception):
    """mlx-lm could not be asked."""


def _asked(source: str, shapes: Shapes) -> dict[str, Any]:
    try:
        release = version("mlx-lm")
    except PackageNotFoundError:
        raise _NotAskedError("mlx-lm is not installed") from None
    config = Path(source, "config.json")
    text = config.read_text("utf-8") if config.is_file() else ""

    def ask() -> str:
        done = subprocess.run(
            [sys.executable, "-m", MODULE, source],
            input=json.dumps(dict(shapes)), capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise _NotAskedError(f"mlx-lm: {done.stderr.strip().rpartition(chr(10))[2]}")
        return done.stdout

    found = kept("conventions", (release, text, sorted(shapes.items())), ask)
    return dict(json.loads(found))


def _adding(model: Any) -> str:
    """The first trained module whose output is not zero where all its parameters are; empty if none is.

    Such a module adds something to its weight.
    """
    import torch

    for name, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        if not own or any(parameter.ndim != 1 for parameter in own):
            continue
        before = [parameter.detach().clone() for parameter in own]
        ones = torch.ones(1, own[0].numel(), dtype=own[0].dtype, device=own[0].device)
        try:
            with torch.no_grad():
                for parameter in own:
                    parameter.zero_()
                if bool(module(ones).any()):
                    return str(name)
        except (TypeError, RuntimeError):
            continue  # it takes other arguments: no norm
        finally:
            with torch.no_grad():
                for parameter, value in zip(own, before, strict=True):
                    parameter.copy_(value)
    return ""
