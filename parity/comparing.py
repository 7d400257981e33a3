"""Two traces captured anywhere, compared array by array."""

from __future__ import annotations

import numpy as np

from parity.errors import UsageError
from parity.numerics import Noise, compare_exact, compare_group
from parity.record import Metric
from parity.trace import Array, Trace


def compare_traces(
    subject: Trace, reference: Trace, referee: Trace | None = None, exact: bool = False
) -> list[Metric]:
    """One metric a group of arrays and one a scalar.

    Args:
        subject: The trace under question.
        reference: The trace it is held against.
        referee: The same thing in float64; without it the floor is one ulp.
        exact: Bits must be equal.

    Raises:
        UsageError: Neither trace holds anything.
    """
    if not (subject.arrays or subject.scalars or reference.arrays or reference.scalars):
        raise UsageError("both traces are empty: nothing can be compared")
    noise = Noise(exact=exact, referee=referee.arrays if referee else {})
    metrics = []
    for group in sorted({_group(name) for name in subject.arrays.keys() | reference.arrays.keys()}):
        ours, theirs = (
            {name: value for name, value in trace.arrays.items() if _group(name) == group}
            for trace in (subject, reference)
        )
        if ours.keys() == theirs.keys() and not all(
            _floating(v) for v in [*ours.values(), *theirs.values()]
        ):
            metrics += [compare_exact(name, ours[name], theirs[name]) for name in sorted(theirs)]
        else:
            metrics.append(compare_group(group, ours, theirs, noise))
    for name in sorted(subject.scalars.keys() | reference.scalars.keys()):
        a, b = (np.array([str(t.scalars.get(name, "absent"))]) for t in (subject, reference))
        metrics.append(compare_exact(name, a, b))
    return metrics


def _group(name: str) -> str:
    return name.partition("/")[0]


def _floating(value: Array) -> bool:
    return bool(np.issubdtype(value.dtype, np.floating))
