"""Other values of settings, for the search: what a side may be computing with, and what may make it read."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from parity.sweep.filling import DEFAULT_THETA, From, Scaling, fits
from parity.sweep.sources import Field
from parity.sweep.traps import ACTIVATIONS, leaves, proposed, value_at

MOST = 14
"""Candidates that are tried for one fix."""


def instead(
    key: str, before: Any, after: Any, config: Mapping[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Values that a side may compute with in the place of `after`: (what is to be added in words, edits).

    Args:
        key: Dotted key of the setting.
        before: Its usual value.
        after: The value that it is set to.
        config: The configuration that holds it.
    """
    yield "", {key: before}
    if isinstance(after, Mapping):
        for name, value in _flat(after).items():
            inner = f"{key}.{name}"
            usual = value_at(before, name) if isinstance(before, Mapping) else None
            if usual is not None and usual != value:
                yield "", {inner: usual}
        theta = _flat(after).keys() & {"rope_theta"}
        if theta:
            yield "", {f"{key}.rope_theta": DEFAULT_THETA}
            if isinstance(before, Mapping):
                yield "", {key: {**before, "rope_theta": DEFAULT_THETA}}
    elif key.endswith("rope_theta"):
        yield "", {key: DEFAULT_THETA}
        for path, value in leaves(config):
            other = ".".join(path)
            if path[-1] == "rope_theta" and other != key and value != after:
                yield f", the value of {other}", {key: value}


def by_default(
    keys: Iterable[str], config: Mapping[str, Any], fields: list[Field]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Settings at the value that a file takes where it finds none of that name, as `instead` gives them."""
    defaults = {f.name: f for f in fields if isinstance(f.default, (int, float, str))}
    for key in keys:
        last = key.rpartition(".")[2]
        if last in defaults and defaults[last].default != value_at(config, key):
            field = defaults[last]
            yield f", the default of {last} in models/{field.file}", {key: field.default}


def any_setting(config: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every setting of a configuration at another value, one at a time."""
    for trap in proposed(config):
        yield dict(trap.changes)
    for path, value in leaves(config):
        key = ".".join(path)
        if path[-1] == "rope_theta" and value != DEFAULT_THETA:
            yield {key: DEFAULT_THETA}
        if value in ACTIVATIONS:
            for other in ACTIVATIONS:
                if other != value:
                    yield {key: other}
        if isinstance(value, float) and value not in (0.0, 1.0) and "rope" not in path[-1]:
            yield {key: 1.0}


def readable(
    changes: Mapping[str, Any], config: Mapping[str, Any], fields: list[Field], words: set[str]
) -> list[dict[str, Any]]:
    """Edits under which a file that does not read these settings might.

    A setting is written under each name that the file declares and that is alike, at the level where it
    stands and at the top.

    Args:
        changes: Settings by dotted key, as the reference reads them.
        config: The configuration that holds them.
        fields: What the file declares.
        words: All names in it.
    """
    declared = {field.name for field in fields}
    found: list[dict[str, Any]] = []
    for key, value in changes.items():
        outer = _level(key)
        flat = _flat(value) if isinstance(value, Mapping) else {key.rpartition(".")[2]: value}
        same = {f"{outer}{name}": v for name, v in flat.items() if name in declared}
        if isinstance(value, Mapping) or "rope_parameters" in key:
            rope = value if isinstance(value, Mapping) else value_at(config, key.rpartition(".")[0])
            if isinstance(rope, Mapping):
                found += _ropes(outer, rope, declared | words)
        if same:
            found.append(same)
        for name, v in flat.items():
            names = [f for f in _alike(name, v, fields) if f != name and _fits(config.get(f), v)]
            found += [{f"{outer}{f}": v} for f in names]
    unique: list[dict[str, Any]] = []
    for edits in found:
        edits = {k: v for k, v in edits.items() if value_at(config, k) != v}
        if edits and edits not in unique:
            unique.append(edits)
    return unique[:MOST]


def _ropes(outer: str, rope: Mapping[str, Any], known: set[str]) -> list[dict[str, Any]]:
    """The rope settings in the spelling before transformers 5: a theta at the top, a scaling beside it."""
    flat = rope
    if any(isinstance(v, Mapping) for v in rope.values()):
        flat = next(v for v in rope.values() if isinstance(v, Mapping))
    theta = {f"{outer}rope_theta": flat["rope_theta"]} if "rope_theta" in flat else {}
    part = (
        {f"{outer}partial_rotary_factor": flat["partial_rotary_factor"]}
        if "partial_rotary_factor" in flat
        else {}
    )
    scaling = {k: v for k, v in flat.items() if k not in ("rope_theta", "partial_rotary_factor")}
    kind = scaling.get("rope_type", "default")
    found = [theta, {**theta, **part}]
    if kind != "default" and "rope_scaling" in known:
        found.append({**theta, **part, f"{outer}rope_scaling": {**scaling, "type": kind}})
    return [edits for edits in found if edits]


def relative(edits: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Edits that copy a value of the configuration, so that they hold when that value is moved."""
    held = {".".join(path): value for path, value in leaves(config)}
    found: dict[str, Any] = {}
    for key, value in edits.items():
        last = key.rpartition(".")[2]
        if last == "rope_scaling" and isinstance(value, Mapping):
            found[key] = Scaling(f"{_level(key)}rope_parameters")
            continue
        same = [k for k in held if k != key and k.rpartition(".")[2] == last and held[k] == value]
        found[key] = From(same[0]) if same else value
    return found


def _alike(name: str, value: Any, fields: list[Field]) -> list[str]:
    """Fields of similar names whose default is of the same kind, the most similar first."""
    if isinstance(value, (Mapping, list)):
        return []
    close = [
        field.name
        for field in fields
        if field.name != "model_type" and fits(field, name, value)
        if field.default is None
        or isinstance(field.default, type(value))
        or _both_numbers(field.default, value)
    ]
    tokens = set(re.split(r"[_.]", name))
    scored = sorted(
        close,
        key=lambda f: (
            -len(tokens & set(f.split("_"))),
            -difflib.SequenceMatcher(None, f, name).ratio(),
        ),
    )
    return [
        f
        for f in scored
        if tokens & set(f.split("_")) - {"num", "use", "hidden", "size"}
        or difflib.SequenceMatcher(None, f, name).ratio() > 0.6
    ][:4]


def _fits(held: Any, value: Any) -> bool:
    """Whether a value may stand where another one does."""
    return held is None or type(held) is type(value) or _both_numbers(held, value)


def _both_numbers(a: Any, b: Any) -> bool:
    numbers = (int, float)
    return (
        isinstance(a, numbers)
        and isinstance(b, numbers)
        and not isinstance(a, bool)
        and not isinstance(b, bool)
    )


def switches(config: Mapping[str, Any], fields: list[Field]) -> list[tuple[str, dict[str, Any]]]:
    """Settings that a file declares as a switch, each the other way."""
    found = []
    for field in fields:
        value = config.get(field.name, field.default)
        if isinstance(value, bool):
            found.append((f"{field.name}={_shown(not value)}", {field.name: not value}))
    return found


def _level(key: str) -> str:
    """`text_config.` of `text_config.rope_parameters.rope_theta`; empty at the top."""
    parts = key.split(".")
    kept = [p for p in parts[:-1] if p.endswith("_config")]
    return ".".join(kept) + "." if kept else ""


def _flat(value: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in value.items() if not isinstance(v, Mapping)}


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
