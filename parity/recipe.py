"""Recipes and factors: everything that is to be run, frozen, read from TOML.

Every leaf of a recipe is a *factor* with a dotted name (`lora.num_layers`), declared in
`parity.factors`; factors are what `--set` overrides and what a search flips.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, cast

from pydantic import (
    ValidationError,
    create_model,
)
from pydantic.fields import FieldInfo

from parity import resources
from parity.errors import UsageError
from parity.factors import (
    AnyKnobs,
    Data,
    Decoding,
    FactorGroup,
    Idle,
    Knobs,
    Lora,
    Mask,
    Model,
    Neutral,
    Optim,
    Seed,
    Train,
)


class Recipe(FactorGroup):
    """Everything that is to be run. Leaves are factors; `kind_of` adds sections of knobs."""

    model: Model = Model()
    data: Data = Data()
    seed: Seed = Seed()
    lora: Lora = Lora()
    mask: Mask = Mask()
    optim: Optim = Optim()
    train: Train = Train()
    decode: Decoding = Decoding()

    def factors(self) -> dict[str, Any]:
        """Dotted name to value, in the order of the recipe."""
        return {
            f"{section}.{key}": value
            for section, values in self.model_dump(mode="json").items()
            for key, value in values.items()
        }

    def override(self, changes: Mapping[str, Any]) -> Recipe:
        """A copy with factors changed.

        Raises:
            UsageError: An unknown factor or a value that does not fit.
        """
        if not changes:
            return self
        kind = type(self)
        return build(_merge(self.model_dump(mode="json"), changes, kind), "override", kind)

    def with_knobs(self, types: Iterable[type[Knobs]]) -> Recipe:
        """The recipe with these sections of knobs and no others; those it lacked at their defaults."""
        kind = kind_of(types)
        if kind is type(self):
            return self
        data = self.model_dump(mode="json")
        return build(
            {name: data[name] for name in kind.model_fields if name in data}, "knobs", kind
        )

    @classmethod
    def knob_types(cls) -> tuple[type[Knobs], ...]:
        """Its sections of knobs."""
        kinds = (field.annotation for field in cls.model_fields.values())
        return tuple(k for k in kinds if isinstance(k, type) and issubclass(k, Knobs))

    def knobs(self, kind: type[AnyKnobs]) -> AnyKnobs:
        """One section of knobs; its defaults where the recipe does not have it."""
        return cast(AnyKnobs, getattr(self, kind.section, None) or kind())

    def active(self) -> dict[str, Any]:
        """The factors that have an effect beside the others: `optim.clip_value` has none without a clip."""
        factors = self.factors()
        return {
            name: value
            for name, value in factors.items()
            if not any(factors[mark.factor] == mark.value for mark in self._marks(name, Idle))
        }

    def neutral(self, name: str) -> bool:
        """Whether a factor is at a value at which a path needs no support for it."""
        value = self.factors()[name]
        # `True` is equal to 1
        return any(
            value == known and type(value) is type(known)
            for mark in self._marks(name, Neutral)
            for known in mark.values
        )

    def _marks(self, name: str, kind: type[Any]) -> Iterator[Any]:
        section, _, key = name.partition(".")
        group: FactorGroup = getattr(self, section)
        field: FieldInfo = type(group).model_fields[key]
        return (mark for mark in field.metadata if isinstance(mark, kind))

    def difference(self, other: Recipe) -> dict[str, tuple[Any, Any]]:
        """Factors in which two recipes differ: name to (self's value, other's value)."""
        theirs = other.with_knobs(self.knob_types()).factors()
        return {k: (v, theirs[k]) for k, v in self.factors().items() if v != theirs[k]}

    def digest(self) -> str:
        """Content hash (hex, 12 digits) of all factors."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


# Two spellings of one factor: setting one drops the other.
_SPELLINGS = {"lora.alpha": "lora.scale", "lora.scale": "lora.alpha"}


def _merge(
    base: Mapping[str, Any], changes: Mapping[str, Any], kind: type[Recipe]
) -> dict[str, Any]:
    merged = {section: dict(values) for section, values in base.items()}
    for name, value in changes.items():
        section, dot, key = name.partition(".")
        if not dot or section not in kind.model_fields:
            raise UsageError(_unknown(name, kind))
        group = merged.setdefault(section, {})
        group[key] = value
        if other := _SPELLINGS.get(name):
            group.pop(other.partition(".")[2], None)
    return merged


@cache
def _kind(types: frozenset[type[Knobs]]) -> type[Recipe]:
    named = {kind.section: kind for kind in sorted(types, key=lambda kind: kind.section)}
    if len(named) < len(types):
        raise UsageError(f"two paths have knobs of one name: {', '.join(sorted(named))}")
    fields: dict[str, Any] = {name: (kind, kind()) for name, kind in named.items()}
    return create_model("Recipe", __base__=Recipe, **fields)


def kind_of(types: Iterable[type[Knobs]]) -> type[Recipe]:
    """The type of recipes that have these sections of knobs.

    Raises:
        UsageError: Two sections of one name.
    """
    wanted = frozenset(types)
    return _kind(wanted) if wanted else Recipe


PINNED = (
    "model.source", "model.weights", "data.source", "seed.value", "optim.lr", "train.steps", "train.batch_size", "decode.",
)  # fmt: skip
"""What a user always says; every other factor is left to the path when it runs as shipped."""


def factor_names(types: Iterable[type[Knobs]] = ()) -> list[str]:
    """All dotted factor names, with those of some knobs."""
    return list(kind_of(types)().factors())


def _unknown(name: str, kind: type[Recipe]) -> str:
    names = list(kind().factors())
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if close:
        return f"unknown factor {name!r}: did you mean {' or '.join(close)}?"
    section, sections = name.partition(".")[0], ", ".join(kind.model_fields)
    if section not in kind.model_fields:
        return f"unknown factor {name!r}: none of the paths has knobs {section!r}; sections are {sections}"
    return f"unknown factor {name!r}: factors are {', '.join(names)}"


def build(data: Mapping[str, Any], where: str, kind: type[Recipe] = Recipe) -> Recipe:
    """Validates nested sections into a recipe.

    Args:
        data: FactorGroup name to mapping of factors.
        where: What is validated, for the error.
        kind: The type of the recipe, from `kind_of`.

    Raises:
        UsageError: One line per offending value.
    """
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise UsageError(f"{where}: {_explain(error, kind)}") from None


def _explain(error: ValidationError, kind: type[Recipe]) -> str:
    lines = []
    for item in error.errors(include_url=False):
        name = ".".join(str(part) for part in item["loc"]) or "recipe"
        if item["type"] == "extra_forbidden":
            lines.append(_unknown(name, kind))
        else:
            message = item["msg"].removeprefix("Value error, ")
            # What is wrong in a whole section is named in the message.
            whole = item["type"] == "value_error" and isinstance(item["input"], Mapping)
            got = "" if whole else f", got {item['input']!r}"
            lines.append(f"{name}: {message[:1].lower()}{message[1:]}{got}")
    return "\n".join(lines)


def parse_setting(text: str) -> tuple[str, Any]:
    """Reads `name=value`, the value in TOML syntax or else a bare string.

    Raises:
        UsageError: There is no `=`, or nothing on one side of it.
    """
    name, equals, raw = text.partition("=")
    name, raw = name.strip(), raw.strip()
    if not equals or not name or not raw:
        raise UsageError(
            f"cannot read setting {text!r}: write FACTOR=VALUE, e.g. lora.num_layers=16"
        )
    try:
        return name, tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        return name, raw


DEFAULT = "default"
"""The recipe of the fixtures that is run by default."""


def load(
    source: str | Path, settings: Iterable[str] = (), knobs: Iterable[type[Knobs]] = ()
) -> Recipe:
    """Reads a recipe from TOML and applies `name=value` settings.

    Args:
        source: A path ending in .toml, or the name of a recipe in the fixtures.
        settings: Overrides, later ones winning.
        knobs: Sections of the paths that take part, from `paths.registry.knobs`.

    Raises:
        UsageError: No such recipe, broken TOML, unknown or ill-typed factors.
    """
    kind = kind_of(knobs)
    file = resources.recipe_file(str(source))
    try:
        data = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{file}: not valid TOML: {error}") from None
    for key, value in data.items():
        if key in kind.model_fields and not isinstance(value, dict):
            raise UsageError(f"{file}: {key} must be a table such as [{key}], got {value!r}")
    recipe = build(data, str(file), kind)
    if changes := dict(parse_setting(text) for text in settings):
        # Overrides merge into what the file says, so that `lora.alpha` keeps its meaning there.
        recipe = build(_merge(data, changes, kind), "--set", kind)
    return recipe
