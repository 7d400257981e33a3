"""Recipes and factors: everything that is to be run, frozen, read from TOML.

Every leaf of a recipe is a *factor* with a dotted name (`lora.num_layers`); factors are what
`--set` overrides and what a search flips. `Neutral` marks values at which a path needs no support for
the factor, `Idle` factors that have no effect beside others. Factors of one trainer alone are its
*knobs*: a section that a recipe has where that trainer takes part.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, cast

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    create_model,
    model_validator,
)
from pydantic.fields import FieldInfo

from parity import resources
from parity.errors import UsageError

Name = Annotated[str, Field(min_length=1)]
Positive = Annotated[int, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class Neutral:
    """Marks the values of a factor at which a path needs no support for it."""

    def __init__(self, *values: Any) -> None:
        self.values = values


@dataclass(frozen=True)
class Idle:
    """Marks a factor that has no effect while another one has a certain value."""

    factor: str
    value: Any


class FactorGroup(BaseModel):
    """A frozen, strictly validated group of factors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Knobs(FactorGroup):
    """Factors that only one trainer has. They are declared with its path (`TrainingPath.knobs`)."""

    section: ClassVar[str]
    """The name of the section, usually that of the path."""


AnyKnobs = TypeVar("AnyKnobs", bound=Knobs)


class Model(FactorGroup):
    """Which weights, and the precision they are computed in."""

    source: Name = "tiny-gemma3"
    """A fixture's name, a local directory or a hub id."""
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    weights: Annotated[Literal["stored", "bfloat16", "float16"], Neutral("stored")] = "stored"
    """What the weights are rounded to before they are computed with in `dtype`."""


class Data(FactorGroup):
    """Rows and how they become batches."""

    source: Name = "hello"
    """A fixture's name or a directory with train.jsonl (and valid.jsonl)."""
    max_length: Positive = 2048
    """Tokens a row may have; the rest is cut."""
    pad_multiple: Annotated[Positive, Neutral(1)] = 32
    pad_extra: Annotated[Literal[0, 1], Neutral(0)] = 1
    """Width of a batch = pad_extra + the longest row rounded up to pad_multiple."""
    append_eos: bool = True


class Seed(FactorGroup):
    """The seed and where it is set."""

    value: Annotated[int, Field(ge=0, lt=2**32)] = 3407
    placement: Literal["before_load", "before_lora"] = "before_lora"
    data: Annotated[Annotated[int, Field(ge=0, lt=2**32)] | None, Neutral(None)] = None
    """Seed of the data order; none means `value`."""


class Lora(FactorGroup):
    """The adapter. `alpha` may be written instead of `scale` (scale = alpha / rank)."""

    rank: Positive = 8
    scale: PositiveFloat = 2.0
    dropout: Annotated[float, Field(ge=0, lt=1), Neutral(0.0)] = 0.0
    target_modules: Annotated[tuple[Name, ...], Field(min_length=1, strict=False)] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )
    num_layers: Annotated[int, Field(ge=-1), Neutral(-1)] = -1
    """How many of the last layers are adapted; -1 means all."""

    @model_validator(mode="before")
    @classmethod
    def _alpha(cls, data: Any) -> Any:
        """Canonicalises alpha to scale, so that one meaning has one hash."""
        if not isinstance(data, Mapping) or "alpha" not in data:
            return data
        if "scale" in data:
            raise ValueError("give either alpha or scale, not both")
        rest = {key: value for key, value in data.items() if key != "alpha"}
        alpha, rank = data["alpha"], data.get("rank", cls.model_fields["rank"].default)
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
            raise ValueError(f"alpha must be a number, not {alpha!r}")
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise ValueError(f"rank must be a positive integer, not {rank!r}")
        return {**rest, "scale": alpha / rank}

    @model_validator(mode="after")
    def _some_layer(self) -> Lora:
        if self.num_layers == 0:
            raise ValueError("num_layers must be -1 (all) or positive, not 0")
        return self


class Mask(FactorGroup):
    """Which positions are supervised.

    Target s (1-based, the target of input s) of a row of n tokens counts when
    start + start_shift <= s <= (n - 1) + end_shift, start being 1 or, with `prompt`, the first
    target of the completion.
    """

    prompt: Annotated[bool, Neutral(False)] = False
    start_shift: Annotated[int, Neutral(0)] = 0
    end_shift: Annotated[int, Neutral(0)] = 1
    """1 is mlx-lm's `steps <= lengths`: the first padding position counts as well."""


_ADAM_ONLY = Idle("optim.name", "sgd")


class Optim(FactorGroup):
    """The optimizer, its schedule and what happens to a gradient before it."""

    name: Literal["adamw", "adam", "sgd"] = "adamw"
    lr: NonNegativeFloat = 1e-3
    betas: Annotated[tuple[Beta, Beta], Field(strict=False), _ADAM_ONLY] = (0.9, 0.999)
    eps: Annotated[PositiveFloat, _ADAM_ONLY] = 1e-8
    weight_decay: Annotated[NonNegativeFloat, Neutral(0.0)] = 0.0
    bias_correction: Annotated[bool, Neutral(True), _ADAM_ONLY] = True
    schedule: Annotated[Literal["constant", "linear", "cosine"], Neutral("constant")] = "constant"
    warmup_steps: Annotated[int, Field(ge=0), Neutral(0)] = 0
    clip: Annotated[Literal["none", "value", "norm"], Neutral("none")] = "none"
    clip_value: Annotated[PositiveFloat, Idle("optim.clip", "none")] = 1.0


class Train(FactorGroup):
    """The loop."""

    steps: Positive = 30
    """Optimizer steps."""
    batch_size: Positive = 6
    accumulation: Annotated[Positive, Neutral(1)] = 1
    accumulation_weighting: Annotated[Literal["mean", "token"], Idle("train.accumulation", 1)] = (
        "mean"
    )
    compile: Annotated[bool, Neutral(True, False)] = True
    """MLX's compiler. It must not change results, so a path without one has nothing to honour."""
    gradient_checkpointing: Annotated[bool, Neutral(False)] = False
    autocast: Annotated[Literal["none", "bfloat16"], Neutral("none")] = "none"
    """Mixed precision: the dtype torch's autocast computes the forward pass in; weights stay."""


class Decoding(FactorGroup):
    """Greedy decoding and the expected completion."""

    max_tokens: Positive = 24
    prompts: Annotated[tuple[Name, ...], Field(min_length=1, strict=False)] = ("<<HELLO!!>>",)
    """The first is the trained prompt; those after it perturb it."""
    expected: Name = " My name is Unsloth!"
    max_completion_loss: PositiveFloat = 0.5
    """Teacher-forced completion loss under which a path passes."""


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
            lines.append(f"{name}: {message[:1].lower()}{message[1:]}, got {item['input']!r}")
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
