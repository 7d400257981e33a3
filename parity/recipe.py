"""Recipes and factors: everything that is to be run, frozen, read from TOML.

Every leaf of a recipe is a *factor* with a dotted name (`lora.num_layers`); factors are what
`--set` overrides and what a search flips.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from parity import resources
from parity.errors import UsageError

Name = Annotated[str, Field(min_length=1)]
Positive = Annotated[int, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class FactorGroup(BaseModel):
    """A frozen, strictly validated group of factors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Model(FactorGroup):
    """Which weights, and the precision they are computed in."""

    source: Name = "tiny-gemma3"
    """A fixture's name, a local directory or a hub id."""
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    weights: Literal["stored", "bfloat16", "float16"] = "stored"
    """What the weights are rounded to before they are computed with in `dtype`."""


class Data(FactorGroup):
    """Rows and how they become batches."""

    source: Name = "hello"
    """A fixture's name or a directory with train.jsonl (and valid.jsonl)."""
    max_length: Positive = 2048
    """Tokens a row may have; the rest is cut."""
    pad_multiple: Positive = 32
    pad_extra: Literal[0, 1] = 1
    """Width of a batch = pad_extra + the longest row rounded up to pad_multiple."""
    append_eos: bool = True


class Seed(FactorGroup):
    """The seed and where it is set."""

    value: Annotated[int, Field(ge=0, lt=2**32)] = 3407
    placement: Literal["before_load", "before_lora"] = "before_lora"
    data: Annotated[int, Field(ge=0, lt=2**32)] | None = None
    """Seed of the data order; none means `value`."""


class Lora(FactorGroup):
    """The adapter. `alpha` may be written instead of `scale` (scale = alpha / rank)."""

    rank: Positive = 8
    scale: PositiveFloat = 2.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: Annotated[tuple[Name, ...], Field(min_length=1, strict=False)] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )
    num_layers: Annotated[int, Field(ge=-1)] = -1
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

    prompt: bool = False
    start_shift: int = 0
    end_shift: int = 1
    """1 is mlx-lm's `steps <= lengths`: the first padding position counts as well."""


class Optim(FactorGroup):
    """The optimizer, its schedule and what happens to a gradient before it."""

    name: Literal["adamw", "adam", "sgd"] = "adamw"
    lr: NonNegativeFloat = 1e-3
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    bias_correction: bool = True
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    clip: Literal["none", "value", "norm"] = "none"
    clip_value: PositiveFloat = 1.0


class Train(FactorGroup):
    """The loop."""

    steps: Positive = 30
    """Optimizer steps."""
    batch_size: Positive = 6
    accumulation: Positive = 1
    accumulation_weighting: Literal["mean", "token"] = "mean"
    compile: bool = True
    gradient_checkpointing: bool = False
    autocast: Literal["none", "bfloat16"] = "none"
    """Mixed precision: the dtype torch's autocast computes the forward pass in; weights stay."""


class Decoding(FactorGroup):
    """Greedy decoding and what it should say."""

    max_tokens: Positive = 24
    prompts: Annotated[tuple[Name, ...], Field(min_length=1, strict=False)] = ("<<HELLO!!>>",)
    """The first is the trained prompt; those after it perturb it."""
    expected: Name = " My name is Unsloth!"
    max_completion_loss: PositiveFloat = 0.5
    """Teacher-forced completion loss under which a path passes."""


class Unsloth(FactorGroup):
    """Knobs that only unsloth-zoo has; other paths ignore them."""

    use_cce: bool = False
    """Its chunked cross-entropy from hidden states instead of logits; it ships with it on."""
    patch_mode: Literal["patched", "unpatched"] = "patched"
    """Its replacements of model code for mx.compile."""
    load_in_4bit: bool = False
    """Quantizes the base weights as they are loaded; it ships with it on."""
    cast_norm_output: bool = True
    """In half precision, norms are in float32 and their outputs are cast back."""
    explicit_clip: bool = True
    """False leaves every clip knob that optim.clip does not use unsaid, which is not the same as
    off: what its default then does changed between releases."""


class Recipe(FactorGroup):
    """Everything that is to be run. Leaves are factors."""

    model: Model = Model()
    data: Data = Data()
    seed: Seed = Seed()
    lora: Lora = Lora()
    mask: Mask = Mask()
    optim: Optim = Optim()
    train: Train = Train()
    decode: Decoding = Decoding()
    unsloth: Unsloth = Unsloth()

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
        return build(_merge(self.model_dump(mode="json"), changes), where="override")

    def difference(self, other: Recipe) -> dict[str, tuple[Any, Any]]:
        """Factors in which two recipes differ: name to (self's value, other's value)."""
        theirs = other.factors()
        return {k: (v, theirs[k]) for k, v in self.factors().items() if v != theirs[k]}

    def digest(self) -> str:
        """Content hash (hex, 12 digits) of all factors."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


# Two spellings of one factor: setting one drops the other.
_SPELLINGS = {"lora.alpha": "lora.scale", "lora.scale": "lora.alpha"}


def _merge(base: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = {section: dict(values) for section, values in base.items()}
    for name, value in changes.items():
        section, dot, key = name.partition(".")
        if not dot or section not in Recipe.model_fields:
            raise UsageError(_unknown(name))
        group = merged.setdefault(section, {})
        group[key] = value
        if other := _SPELLINGS.get(name):
            group.pop(other.partition(".")[2], None)
    return merged


def factor_names() -> list[str]:
    """All dotted factor names."""
    return list(Recipe().factors())


def _unknown(name: str) -> str:
    names = factor_names()
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else f"factors are {', '.join(names)}"
    return f"unknown factor {name!r}: {hint}"


def build(data: Mapping[str, Any], where: str) -> Recipe:
    """Validates nested sections into a recipe.

    Args:
        data: FactorGroup name to mapping of factors.
        where: What is validated, for the error.

    Raises:
        UsageError: One line per offending value.
    """
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise UsageError(f"{where}: {_explain(error)}") from None


def _explain(error: ValidationError) -> str:
    lines = []
    for item in error.errors(include_url=False):
        name = ".".join(str(part) for part in item["loc"]) or "recipe"
        if item["type"] == "extra_forbidden":
            lines.append(_unknown(name))
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
"""The recipe of the fixtures that is run when nothing else is said."""


def load(source: str | Path, settings: Iterable[str] = ()) -> Recipe:
    """Reads a recipe from TOML and applies `name=value` settings.

    Args:
        source: A path ending in .toml, or the name of a recipe in the fixtures.
        settings: Overrides, later ones winning.

    Raises:
        UsageError: No such recipe, broken TOML, unknown or ill-typed factors.
    """
    file = resources.recipe_file(str(source))
    try:
        data = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{file}: not valid TOML: {error}") from None
    for key, value in data.items():
        if key in Recipe.model_fields and not isinstance(value, dict):
            raise UsageError(f"{file}: {key} must be a table such as [{key}], got {value!r}")
    recipe = build(data, where=str(file))
    if changes := dict(parse_setting(text) for text in settings):
        # Overrides merge into what the file says, so that `lora.alpha` keeps its meaning there.
        recipe = build(_merge(data, changes), where="--set")
    return recipe
