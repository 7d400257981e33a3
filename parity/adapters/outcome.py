"""What comes of a check, and how findings are worded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from parity.adapters.artefact import Adapter, Finding
from parity.adapters.base import Base
from parity.judge.updates import named

NO_BASE = "needs --base"


@dataclass(frozen=True)
class Outcome:
    """What came of one check.

    Attributes:
        check: Its name.
        question: What it asks.
        findings: What is wrong.
        unchecked: What could not be told, and why; empty where all was.
        note: What was seen, in words.
    """

    check: str
    question: str
    findings: list[Finding] = field(default_factory=list)
    unchecked: str = ""
    note: str = ""


Found = tuple[list[Finding], str]
"""Findings, and what could not be told."""
Check = Callable[[Adapter, Base | None], Found]


def of(adapter: Adapter, check: str) -> list[Finding]:
    """What is wrong with the settings by themselves, of one check."""
    return [finding for finding in adapter.settings() if finding.check == check]


def share(some: Iterable[str], total: Mapping[str, object]) -> str:
    """In words, how many of all modules, and which."""
    names = sorted(some)
    whole = "all " if len(names) == len(total) else ""
    count = f"{len(names)}" if whole else f"{len(names)} of {len(total)}"
    return f"{whole}{count} modules ({named(names)})"


def grouped(
    check: str, kinds: Mapping[tuple[str, str], list[str]], total: Mapping[str, object]
) -> list[Finding]:
    """One finding for each text, with the modules that it is said of."""
    return [
        Finding(check, where or sorted(names)[0], f"{share(names, total)}: {text}")
        for (where, text), names in kinds.items()
    ]
