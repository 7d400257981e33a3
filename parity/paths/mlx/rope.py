"""The rotary embedding of each layer, measured by calling the live module."""

from __future__ import annotations

from typing import Any

import numpy as np

from parity.paths.mlx.live import to_numpy

DIGITS = 9
NAMES = ("rope", "rotary_emb")


def rope_facts(model: Any) -> dict[str, Any]:
    """The rotary embedding of each layer, and what the configuration says of it.

    By layer: inverse frequencies (radians a position), dimensions that are turned, factor on queries
    and keys, and whether the frequencies are fixed. A layer without one has no frequencies, width 0.
    """
    layers = [_of(_rope(layer)) for layer in model.layers]
    keys = ("rope.frequencies", "rope.width", "rope.attention_scaling", "rope.kind")
    return {
        **{key: [layer[at] for layer in layers] for at, key in enumerate(keys)},
        "rope.configuration": _configuration(model),
    }


def _rope(layer: Any) -> Any:
    for name, module in layer.named_modules():
        last = name.rpartition(".")[2]
        if last in NAMES or "rope" in type(module).__name__.lower():
            return module
    return None


def _of(rope: Any) -> tuple[list[float] | str, int | str, float | str, str]:
    import mlx.core as mx

    if rope is None:
        return [], 0, 1.0, "none"
    width = next((int(w) for n in ("dims", "dim") if (w := getattr(rope, n, None))), 64)
    try:
        # Each basis vector as a head of its own, at two positions: where counting starts is no setting.
        basis = mx.eye(width).reshape(1, width, 1, width)
        start, turned = (
            to_numpy(rope(basis, offset=at))[0, :, 0, :].astype(np.float64) for at in (0, 1)
        )
    except TypeError as error:
        reason = f"unknown ({type(rope).__name__}: {error})"
        return reason, reason, reason, reason
    matrix = start.T @ turned
    frequencies, scales = [], []
    for at in range(width):
        others = np.where(np.arange(width) == at, 0.0, matrix[at])
        partner = int(np.abs(others).argmax())
        if partner > at and others[partner]:  # the first of its pair
            frequencies.append(float(np.arctan2(others[partner], matrix[at, at])))
            scales.append(float(np.linalg.norm(turned[at])))
    if not frequencies:
        return [], 0, 1.0, "none"
    kind = "by length" if "dynamic" in type(rope).__name__.lower() else "fixed"
    scale = float(f"{np.median(scales):.7g}")
    return [float(f"{f:.{DIGITS}g}") for f in frequencies], 2 * len(frequencies), scale, kind


def _configuration(model: Any) -> dict[str, Any]:
    """What the arguments of the live model say of it, as they say it."""
    found: dict[str, Any] = {}
    for holder in (getattr(model, "args", None), getattr(model, "model", None)):
        arguments = vars(getattr(holder, "args", holder)) if holder is not None else {}
        for name, value in arguments.items():
            if name.startswith("rope") and isinstance(value, (int, float, str, dict)):
                found.setdefault(name, value)
    return found
