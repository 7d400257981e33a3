"""Settings, modules and errors in the words of a cause."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any


def named_in(error: str) -> str:
    """The settings or kinds of tensors that an error of loading is about."""
    if "required positional argument" in error:
        return ", ".join(re.findall(r"'(\w+)'", error.partition("argument")[2].partition(";")[0]))
    found = re.search(r"(?:Received|Missing) \d+ parameters[^:]*: ([^;]+)", error)
    if found:
        lasts = [re.sub(r"\.\d+(?=\.)", ".N", name.strip(" .…")) for name in found[1].split(",")]
        return ", ".join(dict.fromkeys(".".join(last.split(".")[-2:]) for last in lasts if last))
    found = re.search(r"for parameter (\S+?)\.?(?:;|$)", error)
    return found[1] if found else ""


def leaf_keys(key: str, value: Any) -> list[str]:
    """Dotted keys of all that stands below a key."""
    if not isinstance(value, Mapping):
        return [key]
    return [leaf for name, inner in value.items() for leaf in leaf_keys(f"{key}.{name}", inner)]


def compressed(keys: Iterable[str]) -> str:
    """`rope_parameters.{rope_type, factor}` of two keys that stand in one place."""
    places: dict[str, list[str]] = {}
    for key in keys:
        above, _, last = key.rpartition(".")
        places.setdefault(above, []).append(last)
    shown = []
    for above, lasts in places.items():
        inner = lasts[0] if len(lasts) == 1 else f"{{{', '.join(lasts)}}}"
        shown += [f"{above}.{inner}"] if above else lasts
    return ", ".join(shown)


def differing(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The leaves in which settings differ: dotted key → both values, None for what is not there."""
    found: dict[str, tuple[Any, Any]] = {}
    for key, new in after.items():
        old = before.get(key)
        if isinstance(new, Mapping) and isinstance(old, Mapping):
            inner = differing(
                {f"{key}.{k}": v for k, v in old.items()},
                {f"{key}.{k}": v for k, v in {**dict.fromkeys(old), **new}.items()},
            )
            found |= inner
        elif old != new:
            found[key] = old, new
    return found


def module_named(sentence: str) -> str:
    """The module that a sentence of the module search names; empty where it names none."""
    for start in ("first bad module ", "and the output of ", "and the input of "):
        if start in sentence:
            return sentence.partition(start)[2].split(":")[0].split(" ")[0].rstrip(",;")
    return ""


def loading_error(text: str) -> str:
    """An error of loading without what stands before it, said of mlx-lm."""
    _, found, rest = text.partition("mlx-lm does not load the model: ")
    return f"mlx-lm does not load it: {rest}" if found else text


def in_words(values: Mapping[str, Any]) -> str:
    """Settings as `key=value, …`."""
    return ", ".join(f"{key}={shown(value)}" for key, value in values.items())


def shown(value: Any) -> str:
    """A value as JSON, cut short."""
    if value is None:
        return "(not there)"
    text = json.dumps(value)
    return text if len(text) < 200 else text[:197] + "…"
