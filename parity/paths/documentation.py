"""Defaults as the docstrings and help texts of a library give them, read when they are asked for."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping
from typing import Any

_HEAD = r"^[ \t>*-]*`{{0,2}}{name}`{{0,2}} ?(?:\(|:)"
"""How the entry of a parameter begins: `name (type, …):`, or, in a list, - `name`: …"""
_NEXT = r"\n[ \t>*-]*`{0,2}\w+`{0,2} ?(?:\([^)\n]*[`a-z\]]|: [A-Z])"
_VALUE = r"[Dd]efault(?:s to|:| is)[\s`]*(\"[^\"]*\"|'[^']*'|\([^)]*\)|[-\w.+]+)"
ABSENT = object()


def default_in(text: str | None, name: str) -> Any:
    """The default of a parameter that its documentation names, or `ABSENT`.

    Understands `defaults to X`, `Default: X` and `Default is X` in the entry of the parameter.
    """
    for begun in re.finditer(_HEAD.format(name=re.escape(name)), text or "", re.MULTILINE):
        entry = (text or "")[begun.start() :]
        if end := re.search(_NEXT, entry[1:]):
            entry = entry[: end.start() + 1]
        if found := re.search(_VALUE, entry):
            return _literal(found[1])
    return ABSENT


def _literal(text: str) -> Any:
    text = text.rstrip(".")
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text.strip("\"'")


def documented(texts: Iterable[str | None], names: Mapping[str, str]) -> dict[str, Any]:
    """Factor to the default of its parameter in the first text that names one.

    Args:
        texts: Docstrings, the one that counts most first.
        names: Parameter to factor.
    """
    read, found = list(texts), dict[str, Any]()
    for name, factor in names.items():
        values = (default_in(text, name) for text in read)
        value = next((value for value in values if value is not ABSENT), ABSENT)
        if value is not ABSENT:
            found[factor] = value
    return found
