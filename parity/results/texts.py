"""Sentences that differ in their numbers alone."""

from __future__ import annotations

import re
from collections.abc import Iterable


def without_numbers(text: str) -> str:
    """A sentence with its numbers left out: what it says of every seed."""
    return re.sub(r"\d[\d.,]*(e[+-]?\d+)?", "#", text)


def distinct(texts: Iterable[str]) -> tuple[str, ...]:
    """The first of those sentences that differ in numbers alone."""
    found: dict[str, str] = {}
    for text in texts:
        found.setdefault(without_numbers(text), text)
    return tuple(found.values())
