"""The factors of a recipe, section by section: what may be varied, its default and its neutral values.

Adding a factor is a line here and code in the paths that honour it. `Neutral` marks values at which a
path needs no support for the factor, `Idle` factors that have no effect beside others. Factors of one
trainer alone are its *knobs*: a section that a recipe has where that trainer takes part.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

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


_FULL = Idle("lora.kind", "full")
_STORED = Idle("model.quantization", "stored")
_PACKED = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}


class Model(FactorGroup):
    """Which weights, and the precision they are computed in."""

    source: Name = "tiny-gemma3"
    """A fixture's name, a local directory or a hub id."""
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    weights: Annotated[Literal["stored", "bfloat16", "float16"], Neutral("stored")] = "stored"
    """What the weights are rounded to before they are computed with in `dtype`."""
    quantization: Annotated[
        Literal["stored", "affine", "mxfp4", "mxfp8", "nvfp4"], Neutral("stored")
    ] = "stored"
    """How MLX quantizes the weights when they are loaded; `stored` leaves them as they are."""
    bits: Annotated[Literal[2, 3, 4, 5, 6, 8], _STORED] = 4
    group_size: Annotated[Literal[16, 32, 64, 128], _STORED] = 64
    """Elements of a row that share a scale."""

    @model_validator(mode="after")
    def _packed(self) -> Model:
        """The modes beside affine are defined for one width and one size of groups each."""
        if (only := _PACKED.get(self.quantization)) and (self.bits, self.group_size) != only:
            raise ValueError(
                f"quantization {self.quantization!r} has model.bits={only[0]} and "
                f"model.group_size={only[1]}, not {self.bits} and {self.group_size}"
            )
        return self


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
    placement: Annotated[Literal["before_load", "before_lora"], _FULL] = "before_lora"
    data: Annotated[Annotated[int, Field(ge=0, lt=2**32)] | None, Neutral(None)] = None
    """Seed of the data order; none means `value`."""


class Lora(FactorGroup):
    """What is trained. `alpha` may be written instead of `scale` (scale = alpha / rank)."""

    kind: Annotated[Literal["lora", "dora", "full"], Neutral("lora")] = "lora"
    """Low-rank adapters, those with a magnitude of each row, or all weights of the layers."""
    rank: Annotated[Positive, _FULL] = 8
    scale: Annotated[PositiveFloat, _FULL] = 2.0
    dropout: Annotated[float, Field(ge=0, lt=1), Neutral(0.0), _FULL] = 0.0
    target_modules: Annotated[tuple[Name, ...], Field(min_length=1, strict=False), _FULL] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )
    num_layers: Annotated[int, Field(ge=-1), Neutral(-1)] = -1
    """How many of the last layers are trained; -1 means all."""

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
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            return rest  # the rank itself is refused
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
            raise ValueError(f"alpha must be a number, not {alpha!r}")
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
_NOT_ADAM, _NOT_ADAMW = Idle("optim.name", "adam"), Idle("optim.name", "adamw")


class Optim(FactorGroup):
    """The optimizer, its schedule and what happens to a gradient before it."""

    name: Literal["adamw", "adam", "sgd"] = "adamw"
    lr: NonNegativeFloat = 1e-3
    betas: Annotated[tuple[Beta, Beta], Field(strict=False), _ADAM_ONLY] = (0.9, 0.999)
    eps: Annotated[PositiveFloat, _ADAM_ONLY] = 1e-8
    weight_decay: Annotated[NonNegativeFloat, Neutral(0.0)] = 0.0
    bias_correction: Annotated[bool, Neutral(True), _ADAM_ONLY] = True
    momentum: Annotated[float, Field(ge=0, lt=1), Neutral(0.0), _NOT_ADAM, _NOT_ADAMW] = 0.0
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
