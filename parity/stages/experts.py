"""Mixtures of experts: which experts a gradient reaches, so that equal zeros are no agreement."""

from __future__ import annotations

import numpy as np

from parity.judge.compare import compare_exact, nothing
from parity.names import is_factor
from parity.record import Metric
from parity.trace import Array

Tensors = dict[str, Array]
NAMED = 3


def reached(gradient: Tensors) -> dict[str, Array]:
    """Module with experts → whether each of them has a gradient in any tensor, (experts,) bool."""
    found: dict[str, Array] = {}
    for name, value in gradient.items():
        if value.ndim != 3 or not (is_factor(name) or ".switch_mlp." in name):
            continue
        module = name.rpartition(".")[0]
        own = np.asarray(value.any(axis=(1, 2)))
        found[module] = own | found[module] if module in found else own
    return found


def metrics(subject: Tensors, reference: Tensors, what: str) -> list[Metric]:
    """Whether the same experts have a gradient; inconclusive where no expert of a module has any."""
    a, b = reached(subject), reached(reference)
    if not b or a.keys() != b.keys() or any(a[name].shape != b[name].shape for name in b):
        return []  # names and shapes are compared with the tensors
    name = f"experts with a gradient, {what}"
    if idle := [module for module in b if not (a[module].any() or b[module].any())]:
        note = (
            f"no expert of {_few(idle)} has a gradient on either side: nothing of it was compared"
        )
        return [nothing(name).model_copy(update={"note": note, "where": idle[0]})]
    ours, theirs = (np.concatenate([side[module] for module in b]) for side in (a, b))
    metric = compare_exact(name, ours, theirs, note=f"{int(theirs.sum())} of {theirs.size} experts")
    if metric.mismatched:
        module, expert = _first(a, b)
        side = "subject" if a[module][expert] else "reference"
        note = f"expert {expert} of {module} has a gradient in the {side} alone"
        metric = metric.model_copy(update={"where": module, "note": note})
    return [metric]


def findings(subject: Tensors, reference: Tensors, what: str) -> list[str]:
    """Experts of which nothing was compared, since their gradient is zero on both sides."""
    a, b = reached(subject), reached(reference)
    idle = [
        f"{int(expert)} of {module}"
        for module in b
        if module in a and a[module].shape == b[module].shape
        for expert in np.flatnonzero(~(a[module] | b[module]))
    ]
    if not idle:
        return []
    total = sum(len(experts) for experts in b.values())
    return [
        f"{what}: {len(idle)} of {total} experts have a gradient of zero on both sides, as where no token "
        f"goes to them, so that nothing of them was compared: expert {_few(idle)}"
    ]


def _first(a: dict[str, Array], b: dict[str, Array]) -> tuple[str, int]:
    module = next(name for name in b if (a[name] != b[name]).any())
    return module, int(np.flatnonzero(a[module] != b[module])[0])


def _few(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if names[NAMED:] else "")
