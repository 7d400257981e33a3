"""The environment that captures report: whether two of them come from the same."""

from __future__ import annotations

import contextlib
import re
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PEAK_MEMORY = "peak_memory"
"""Entry of an environment: the greatest resident memory of its process until then, in bytes."""
PASSING = ("pid", "seconds", PEAK_MEMORY)
"""What each capture has of its own."""


def peak_memory() -> int:
    """The greatest resident memory of this process so far, in bytes.

    On Linux `ru_maxrss` of a process counts what started it as well: the kernel's own count is read.
    """
    with contextlib.suppress(OSError):
        text = Path("/proc/self/status").read_text(encoding="utf-8")
        if found := re.search(r"^VmHWM:\s+(\d+) kB$", text, re.MULTILINE):
            return int(found[1]) * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


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
        elif name not in PASSING:
            flat[name] = value
    return flat
