"""Values for settings that a file of mlx-lm demands and a configuration lacks: guesses, each tried by a run.

A guess has the type that the file declares, and comes from a setting of the same meaning: a theta is never
proposed for a width, nor a width for a number of layers. What has no such value is not filled in.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from parity.sweep.sources import Field
from parity.sweep.traps import leaves, value_at

DEFAULT_THETA = 10_000.0
"""What loaders take that find no rope theta."""
EACH, MOST = 5, 32
"""Values that are tried for one setting, and ways to set all of them."""
MEANINGS = (
    ("theta", r".*theta|.*(rope|rotary).*base.*"),
    ("epsilon", r".*eps(ilon)?(_.*)?"),
    ("fraction", r".*(factor|pct|ratio|scale|scaling|multiplier|coef|alpha)"),
    ("token", r".*token(_id)?|.*index"),
    ("window", r".*window.*"),
    ("positions", r".*(position|ctx|length|seq_len).*"),
    ("layers", r"first_.*|.*(period|interval|every|freq|frequency|step|replace|offset|pattern)|.*layers?"),
    ("width", r".*(dim|size|width|rank|inner|channels)(_.*)?"),
    ("number", r"(num|n)_.*|.*(heads|experts|groups?|topk|top_k|_per_tok|_per_token)"),
)  # fmt: skip
"""What a number is a measure of, by what its key is called; the first that fits."""


@dataclass(frozen=True)
class From:
    """The value of another key of the same configuration, or the quotient of two (`a/b`)."""

    key: str

    @property
    def words(self) -> str:
        """Where the value is from."""
        return self.key

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


@dataclass(frozen=True)
class Whole(From):
    """The whole configuration, for a file that expects that of its text model below a key."""

    key: str = "the whole configuration"

    def value(self, config: Mapping[str, Any]) -> Any:
        """A copy of it."""
        return dict(config)


@dataclass(frozen=True)
class Rotated(From):
    """The dims of a head that are rotated: its width times the part that the rope settings name."""

    key: str = "head_dim * partial_rotary_factor"

    def value(self, config: Mapping[str, Any]) -> Any:
        """A number of dims."""
        width = config.get("head_dim") or HEAD_WIDTH.value(config)
        factors = [v for path, v in leaves(config) if path[-1] == "partial_rotary_factor"]
        return int(width * (factors[0] if factors else 1.0)) if width else None


@dataclass(frozen=True)
class Times(From):
    """The value of a key, so many times."""

    times: int = 4

    @property
    def words(self) -> str:
        """The product."""
        return f"{self.times} * {self.key}"

    def value(self, config: Mapping[str, Any]) -> Any:
        """A number."""
        found = value_at(config, self.key)
        return found * self.times if isinstance(found, int) else None


@dataclass(frozen=True)
class Layers(From):
    """For each layer whether a list of kinds of layers names one kind there."""

    kind: str = ""
    numbers: bool = False
    """As 0 and 1."""

    @property
    def words(self) -> str:
        """The list, and the kind that is looked for."""
        return f"{self.key}, where it is {self.kind}"

    def value(self, config: Mapping[str, Any]) -> Any:
        """A list with an entry for each layer."""
        kinds = value_at(config, self.key)
        if not isinstance(kinds, list):
            return None
        return [int(k == self.kind) if self.numbers else k == self.kind for k in kinds]


HEAD_WIDTH = From("hidden_size/num_attention_heads")
"""What libraries take for the width of a head that is not given."""


def resolved(edits: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Edits with the values that they have in a configuration."""
    return {k: v.value(config) if isinstance(v, From) else v for k, v in edits.items()}


def lacking(config: Mapping[str, Any], fields: list[Field]) -> list[Field]:
    """Settings that a file declares without a default and that a configuration does not have.

    One that is null counts where the file declares a plain number.
    """
    return [
        field
        for field in fields
        if field.required
        and field.name != "model_type"
        and (
            field.name not in config
            or (config[field.name] is None and field.kind in ("int", "float"))
        )
    ]


def ways(
    config: Mapping[str, Any],
    fields: list[Field],
    full: Mapping[str, Any],
    constants: Mapping[str, list[str]],
) -> list[dict[str, Any]]:
    """Every way to fill in what is lacking, the likeliest first; none where one setting has no value.

    Args:
        config: The configuration as it was saved.
        fields: What is lacking.
        full: Attributes of the configuration as transformers has it, by the names of those fields.
        constants: Texts that the file compares a setting with.
    """
    each = [options(field, config, full, constants.get(field.name, [])) for field in fields]
    orders = itertools.product(*(range(len(values)) for values in each))
    chosen = sorted(itertools.islice(orders, 20_000), key=sum)[:MOST]
    names = [field.name for field in fields]
    return [
        dict(zip(names, [values[i] for values, i in zip(each, order, strict=True)], strict=True))
        for order in chosen
    ]


def options(
    field: Field, config: Mapping[str, Any], full: Mapping[str, Any], constants: list[str]
) -> list[Any]:
    """Values that may be meant by a setting, the likeliest first; empty where there is none."""
    found, shown = list[Any](), list[Any]()
    for value in _proposed(field, config, full, constants):
        real = value.value(config) if isinstance(value, From) else value
        if real is not None and not any(real is s or real == s for s in shown):
            found.append(value)
            shown.append(real)
    return found[:EACH]


def _proposed(
    field: Field, config: Mapping[str, Any], full: Mapping[str, Any], constants: list[str]
) -> Iterator[Any]:
    name, meaning, kind = field.name, meaning_of(field.name), _plain(field.kind)
    held = {".".join(path): value for path, value in leaves(config) if value is not None}
    fitting = [key for key, value in held.items() if of_kind(kind, value)]
    # A file may annotate a setting as `int` that is a fraction: the same name is enough for numbers.
    same_kind = "float" if kind == "int" else kind
    exact = [k for k, v in held.items() if _last(k) == name and (not kind or of_kind(same_kind, v))]
    near = [key for key in _near(name, fitting) if meaning_of(_last(key)) == meaning]
    theirs = full.get(name)
    if exact or theirs is not None:
        # Both have a setting of this name: it is looked for nowhere else.
        yield from map(From, exact)
        same = [k for k in near if held[k] == theirs]
        same += [k for k, v in config.items() if v == theirs and isinstance(v, Mapping)]
        if same:
            yield From(same[0])
        elif isinstance(theirs, (bool, int, float, str)) and (not kind or of_kind(kind, theirs)):
            yield theirs
        if name != "rope_scaling":
            return
    if kind == "dict":
        if name == "rope_scaling" and isinstance(config.get("rope_parameters"), Mapping):
            yield Scaling("rope_parameters")
    elif kind == "list":
        yield from _by_layer(config, numbers="bool" not in field.kind)
    elif kind == "str":
        yield from constants
    elif kind == "bool":
        yield from (False, True)
    elif kind in ("int", "float"):
        yield from _numbers(name, meaning, kind, [From(key) for key in near])


def _numbers(name: str, meaning: str, kind: str, near: list[From]) -> Iterator[Any]:
    if meaning == "width":
        if name == "head_dim":
            yield HEAD_WIDTH
        if re.search(r"rotary|rope", name):
            yield Rotated()
        yield from near
        yield from (From("hidden_size"), From("n_embd"), Times("hidden_size"), Times("n_embd"))
    elif meaning == "theta":
        yield from near
        yield DEFAULT_THETA
    elif meaning == "fraction" and kind == "float":
        yield 1.0
        yield from near
    elif meaning in ("layers", "number") and kind == "int":
        yield from near if meaning == "number" else ()
        yield from (0, 1)
    else:
        yield from near


def _by_layer(config: Mapping[str, Any], numbers: bool) -> Iterator[Layers]:
    for path, value in leaves(config):
        if isinstance(value, list) and value and all(isinstance(v, str) for v in value):
            for kind in dict.fromkeys(value):
                yield Layers(".".join(path), kind, numbers)


def meaning_of(name: str) -> str:
    """What a setting of this name is a measure of; empty where its name does not tell."""
    return next((word for word, pattern in MEANINGS if re.fullmatch(pattern, name)), "")


def fits(field: Field, name: str, value: Any) -> bool:
    """Whether the value of a setting may be meant by a field: of its type, and a measure of the same."""
    kind, meanings = _plain(field.kind), {meaning_of(field.name), meaning_of(name)}
    return (not kind or of_kind(kind, value)) and len(meanings - {""}) < 2


def _plain(kind: str) -> str:
    """`int`, `float`, `bool`, `str`, `list` or `dict` of an annotation; empty of any other."""
    inner = re.fullmatch(r"(?:typing\.)?Optional\[(.+)\]", kind)
    bare = (inner[1] if inner else kind).removesuffix(" | None").strip()
    base = bare.partition("[")[0].lower().rpartition(".")[2]
    return base if base in ("int", "float", "bool", "str", "list", "dict") else ""


def of_kind(kind: str, value: Any) -> bool:
    """Whether a value has a plain type; a switch is no number."""
    plain: dict[str, Any] = {"int": int, "float": (int, float), "bool": bool, "str": str}
    if kind not in plain:
        return False
    return isinstance(value, plain[kind]) and (kind == "bool") == isinstance(value, bool)


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


def moved(edits: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The same edits with other values, to see whether a value matters; None where that cannot be had."""
    found: dict[str, Any] = {}
    for key, value in resolved(edits, config).items():
        if isinstance(value, bool):
            found[key] = not value
        elif isinstance(value, (int, float)):
            found[key] = value * 2 + 1
        else:
            return None
    return found


def _near(name: str, keys: list[str]) -> list[str]:
    lasts = {_last(key): key for key in keys}
    close = difflib.get_close_matches(name, list(lasts), n=3, cutoff=0.6)
    tokens = set(name.split("_"))
    shared = sorted(lasts, key=lambda last: -len(tokens & set(last.split("_"))))
    more = [last for last in shared if len(tokens & set(last.split("_"))) >= 2]
    return [lasts[last] for last in dict.fromkeys([*close, *more])]


def _last(key: str) -> str:
    return key.rpartition(".")[2]
