"""What is observed of the modules of a live model, in any framework."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class ModuleCalls:
    """What was observed of one forward pass.

    `events` are ("in" or "out", name) in their order: a module's first argument, its output. `present`
    are the names of all modules that the model has, `called` of those that were called.
    """

    present: list[str] = field(default_factory=list)
    called: list[str] = field(default_factory=list)
    events: list[tuple[str, str]] = field(default_factory=list)
    inputs: dict[str, Any] = field(default_factory=dict)
    outputs: dict[str, Any] = field(default_factory=dict)
