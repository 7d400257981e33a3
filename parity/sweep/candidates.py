"""Other values of settings, for the search: what a side may be computing with, and what may make it read."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from parity.sweep.sources import Field
from parity.sweep.traps import ACTIVATIONS, leaves, proposed, value_at

DEFAULT_THETA = 10_000.0
"""What loaders take that find no rope theta."""
MOST = 14
"""Candidates that are tried for one fix."""


def instead(
    key: str, before: Any, after: Any, config: Mapping[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Values that a side may compute with in the place of `after`: (in words, edits).

    Args:
        key: Dotted key of the setting.
        before: Its usual value.
        after: The value that it is set to.
        config: The configuration that holds it.
    """
    yield f"{key}={_shown(before)}", {key: before}
    if isinstance(after, Mapping):
        for name, value in _flat(after).items():
            inner = f"{key}.{name}"
            usual = value_at(before, name) if isinstance(before, Mapping) else None
            if usual is not None and usual != value:
                yield f"{inner}={_shown(usual)}", {inner: usual}
        theta = _flat(after).keys() & {"rope_theta"}
        if theta:
            yield f"{key}.rope_theta={DEFAULT_THETA:g}", {f"{key}.rope_theta": DEFAULT_THETA}
            if isinstance(before, Mapping):
                yield (
                    f"{key} as usual with rope_theta={DEFAULT_THETA:g}",
                    {key: {**before, "rope_theta": DEFAULT_THETA}},
                )
    elif key.endswith("rope_theta"):
        yield f"{key}={DEFAULT_THETA:g}", {key: DEFAULT_THETA}
        for path, value in leaves(config):
            other = ".".join(path)
            if path[-1] == "rope_theta" and other != key and value != after:
                yield f"{key}={value:g}, the value of {other}", {key: value}


def by_default(
    keys: Iterable[str], config: Mapping[str, Any], fields: list[Field]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Settings at the value that a file takes where it finds none of that name."""
    defaults = {f.name: f.default for f in fields if isinstance(f.default, (int, float, str))}
    for key in keys:
        last = key.rpartition(".")[2]
        if last in defaults and defaults[last] != value_at(config, key):
            value = defaults[last]
            yield f"{key}={_shown(value)}, the default of {last} in its own file", {key: value}


def any_setting(config: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every setting of a configuration at another value, one at a time."""
    for trap in proposed(config):
        yield trap.name, dict(trap.changes)
    for path, value in leaves(config):
        key = ".".join(path)
        if path[-1] == "rope_theta" and value != DEFAULT_THETA:
            yield f"{key}={DEFAULT_THETA:g}", {key: DEFAULT_THETA}
        if value in ACTIVATIONS:
            for other in ACTIVATIONS:
                if other != value:
                    yield f"{key}={other}", {key: other}
        if isinstance(value, float) and value not in (0.0, 1.0) and "rope" not in path[-1]:
            yield f"{key}=1.0", {key: 1.0}


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


@dataclass(frozen=True)
class From:
    """The value of another key of the same configuration, or the quotient of two (`a/b`)."""

    key: str

    def value(self, config: Mapping[str, Any]) -> Any:
        """What it is in a configuration."""
        above, slash, below = self.key.partition("/")
        found = value_at(config, above)
        if not slash:
            return found
        other = value_at(config, below)
        return found // other if isinstance(found, int) and isinstance(other, int) else None


@dataclass(frozen=True)
class Scaling(From):
    """The rope settings at a key in the spelling before transformers 5."""

    def value(self, config: Mapping[str, Any]) -> Any:
        """A mapping with the kind under `type` as well."""
        rope = value_at(config, self.key)
        if not isinstance(rope, Mapping):
            return None
        kept = {k: v for k, v in rope.items() if k not in ("rope_theta", "partial_rotary_factor")}
        return {**kept, "type": kept.get("rope_type", "default")}


HEAD_WIDTH = From("hidden_size/num_attention_heads")
"""What libraries take for the width of a head that is not given."""


def resolved(edits: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Edits with the values that they have in a configuration."""
    return {k: v.value(config) if isinstance(v, From) else v for k, v in edits.items()}


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


def completing(
    config: Mapping[str, Any], fields: list[Field], full: Mapping[str, Any]
) -> dict[str, Any]:
    """Values for settings that a file demands and a configuration does not have, from those most alike.

    Args:
        config: The configuration as it was saved.
        fields: What the file declares.
        full: Attributes of the configuration as transformers has it, by the names of those fields.
    """
    held = {".".join(path): value for path, value in leaves(config) if value is not None}
    found: dict[str, Any] = {}
    for field in fields:
        name = field.name
        if not field.required or name in config or name == "model_type":
            continue
        fitting = {key: value for key, value in held.items() if _of_kind(field.kind, value)}
        exact = [key for key in fitting if key.rpartition(".")[2] == name]
        near = [
            key
            for key in _near(name, [*fitting])
            if full.get(name) is None or full[name] == fitting[key]
        ]
        if exact or (near and name != "head_dim"):
            found[name] = From([*exact, *near][0])
        elif full.get(name) is not None:
            found[name] = full[name]
        elif name == "head_dim":
            found[name] = HEAD_WIDTH
    return found


def lifted(config: Mapping[str, Any], fields: list[Field]) -> dict[str, Any]:
    """Settings that a file declares at the top and a configuration holds in its text model alone."""
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        return {}
    return {
        field.name: From(f"text_config.{field.name}")
        for field in fields
        if field.name not in config and not isinstance(text.get(field.name), (Mapping, type(None)))
    }


def _of_kind(kind: str, value: Any) -> bool:
    """Whether a value fits an annotation, as far as that is a plain type."""
    if "Dict" in kind or "dict" in kind:
        return False  # leaves are no mappings
    plain: dict[str, Any] = {"int": int, "float": (int, float), "bool": bool, "str": str}
    if kind not in plain:
        return True
    return isinstance(value, plain[kind]) and (kind == "bool") == isinstance(value, bool)


def open_switches(
    config: Mapping[str, Any], fields: list[Field], known: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Every way to set what a file demands and nothing gives a value for: switches, and numbers by 1."""
    lacking = [
        field
        for field in fields
        if field.required and field.name not in config and field.name not in known
    ]
    ways: list[dict[str, Any]] = [{}]
    for field in lacking:
        ways = [{**way, field.name: value} for way in ways for value in _values(field, config)]
    return ways[:32]


def _values(field: Field, config: Mapping[str, Any]) -> list[Any]:
    """What may be meant by a setting of which only the kind is known."""
    held = {".".join(path): value for path, value in leaves(config)}
    numbers = {
        k: v for k, v in held.items() if isinstance(v, (int, float)) and not isinstance(v, bool)
    }
    if field.kind == "bool":
        return [False, True]
    if field.kind == "float":
        return [From(key) for key in numbers if "rope_" in key][:4] or [1.0]
    if field.kind == "int":
        rope = [From(key) for key, value in numbers.items() if "rope_" in key and value > 1][:2]
        return [*rope, *[From(key) for key in numbers if "position" in key][:1], 1]
    return [None]


def _near(name: str, keys: list[str]) -> list[str]:
    lasts = {key.rpartition(".")[2]: key for key in keys}
    close = difflib.get_close_matches(name, list(lasts), n=3, cutoff=0.6)
    tokens = set(name.split("_"))
    shared = sorted(lasts, key=lambda last: -len(tokens & set(last.split("_"))))
    more = [last for last in shared if len(tokens & set(last.split("_"))) >= 2]
    return [lasts[last] for last in dict.fromkeys([*close, *more])]


def _alike(name: str, value: Any, fields: list[Field]) -> list[str]:
    """Fields of similar names whose default is of the same kind, the most similar first."""
    if isinstance(value, (Mapping, list)):
        return []
    close = [
        field.name
        for field in fields
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
