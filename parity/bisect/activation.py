"""Which activation stands between two projections, found by computing it again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import permutations

import numpy as np

from parity.trace import Array


def _gelu(x: Array) -> Array:
    from scipy.special import erf

    return np.asarray(0.5 * x * (1 + erf(x / np.sqrt(2))))


def _gelu_tanh(x: Array) -> Array:
    """Hendrycks and Gimpel (arXiv 1606.08415), the approximation with tanh."""
    return np.asarray(0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))))


def _sigmoid(x: Array) -> Array:
    from scipy.special import expit

    return np.asarray(expit(x))


ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "gelu": _gelu,
    "gelu (tanh)": _gelu_tanh,
    "silu": lambda x: x * _sigmoid(x),
    "gelu (sigmoid)": lambda x: x * _sigmoid(1.702 * x),
    "relu": lambda x: np.maximum(x, 0),
    "relu²": lambda x: np.maximum(x, 0) ** 2,
    "sigmoid": _sigmoid,
    "tanh": np.tanh,
    "no activation": lambda x: x,
}


def formula(result: Array, factors: Mapping[str, Array], tolerance: float) -> tuple[str, float]:
    """The activation and product of two projections that gives a result, and its greatest |Δ|.

    Args:
        result: What the projections have become, (..., channels).
        factors: Outputs of projections by short name.
        tolerance: Up to where a formula fits.

    Returns:
        `silu(gate_proj) · up_proj`, or an empty string where none fits.
    """
    best, least = "", np.inf
    fitting = {n: v.astype(np.float64) for n, v in factors.items() if v.shape == result.shape}
    for first, second in permutations(fitting, 2):
        for name, activation in ACTIVATIONS.items():
            made = activation(fitting[first]) * fitting[second]
            gap = float(np.abs(made - result).max())
            if gap < least:
                inner = first if name == "no activation" else f"{name} of {first}"
                best, least = f"{inner} times {second}", gap
    return (best, least) if least <= tolerance else ("", least)
