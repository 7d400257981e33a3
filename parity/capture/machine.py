"""The environment that captures report: whether two of them come from the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_PASSING = ("pid", "seconds")
"""What each capture has of its own."""


def differences(
    first: Mapping[str, Any], second: Mapping[str, Any], common: bool = False
) -> list[str]:
    """What differs between two environments, as `name: value, then value`.

    Args:
        first: An environment as a trace carries it.
        second: Another.
        common: Look at settings that both report, and not at which class reported them: two paths on
            one machine name different packages.
    """
    a, b = _flat(first), _flat(second)
    names = sorted(a.keys() & b.keys() - {"code"} if common else a.keys() | b.keys())
    return [
        f"{name}: {a.get(name, 'none')}, then {b.get(name, 'none')}"
        for name in names
        if a.get(name) != b.get(name)
    ]


def _flat(environment: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in environment.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{key}": item for key, item in value.items()}
        elif name not in _PASSING:
            flat[name] = value
    return flat
