"""Settings, modules and errors in the words of a cause."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from parity.sweep.shrink import SERVED
from parity.sweep.traps import value_at


def named_in(error: str) -> str:
    """The settings or kinds of tensors that an error of loading is about; empty of one that is cut."""
    if error.endswith("…"):
        return ""
    if "required positional argument" in error:
        return ", ".join(re.findall(r"'(\w+)'", error.partition("argument")[2].partition(";")[0]))
    found = re.search(r"(?:Received|Missing) \d+ parameters[^:]*: ([^;]+)", error)
    if found:
        names = [re.sub(r" \(\d+\)$", "", name.strip(" .")) for name in found[1].split(",")]
        return ", ".join(dict.fromkeys(_end(name) for name in names if name))
    found = re.search(r"for parameter (\S+?)\.?(?:;|$)", error)
    return found[1] if found else ""


def _end(name: str) -> str:
    """The last two parts of a tensor's name; of `layers.N.A_log` that has no module all three."""
    parts = name.split(".")
    return ".".join(parts[-3:] if parts[-2:-1] == ["N"] else parts[-2:])


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


def as_saved(
    keys: Iterable[str], before: Mapping[str, Any], after: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The values of settings in two configurations as they were saved.

    A text model that is saved by itself has its settings at the top. Where none of the settings is found
    moved under its name, all that moved is given; both are empty where the files are the same.
    """
    names = [
        key if value_at(before, key) is not None or value_at(after, key) is not None
        else key.removeprefix("text_config.")
        for key in keys
    ]  # fmt: skip
    usual = {key: value_at(before, key) for key in names}
    there = {key: value_at(after, key) for key in names}
    if differing(usual, there):
        return usual, there
    every = dict.fromkeys(k for k in (*before, *after) if k not in SERVED)
    found = differing({k: before.get(k) for k in every}, {k: after.get(k) for k in every})
    return {k: v[0] for k, v in found.items()}, {k: v[1] for k, v in found.items()}


def module_named(sentence: str) -> str:
    """The module that a sentence of the module search names; empty where it names none.

    Of one whose input differs already it is what comes before it.
    """
    starts = {"first bad module ": "", "and the output of ": "", "and the input of ": "before "}
    found = [(sentence.index(start), start) for start in starts if start in sentence]
    if not found:
        return ""
    _, start = min(found)
    return starts[start] + sentence.partition(start)[2].split(":")[0].split(" ")[0].rstrip(",;")


def loading_error(text: str) -> str:
    """An error of loading without what stands before it, said of mlx-lm."""
    _, found, rest = text.partition("mlx-lm does not load the model: ")
    return (f"mlx-lm does not load it: {rest}" if found else text).rstrip(".")


def without_keys(error: str, keys: Iterable[str]) -> str:
    """An error without what the configuration has, where a key of that was put there by an edit."""
    start, tail, named = error.partition("; named there, the configuration has ")
    return start if tail and any(f"{key}=" in named for key in keys) else error


def in_words(values: Mapping[str, Any]) -> str:
    """Settings as `key=value, …`."""
    return ", ".join(f"{key}={shown(value)}" for key, value in values.items())


def shown(value: Any) -> str:
    """A value as JSON, cut short."""
    if value is None:
        return "(not there)"
    text = json.dumps(value)
    return text if len(text) < 200 else text[:197] + "…"
