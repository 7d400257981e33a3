"""What each factor is moved to, beside which other factors it matters, and where that must show."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin

from parity.factors import Knobs
from parity.paths.protocol import TrainingPath
from parity.recipe import Recipe, kind_of

BASE: Mapping[str, Any] = {
    "data.source": "mixed", "data.pad_multiple": 1, "data.pad_extra": 0, "mask.end_shift": 0,
    "optim.lr": 1e-2, "train.steps": 3, "train.batch_size": 2, "train.compile": False,
    "decode.max_tokens": 3,
}  # fmt: skip
"""The small recipe that factors are moved in; what a path has fixed comes on top."""


@dataclass(frozen=True)
class Move:
    """One factor moved alone.

    Attributes:
        factor: Its name.
        value: What it is moved to.
        methods: Methods of the contract that must show it.
        needs: Factors beside which it matters.
        drawn: Whether its effect is rounding or random, and so another one on each path.
    """

    factor: str
    value: Any
    methods: tuple[str, ...]
    needs: Mapping[str, Any] = field(default_factory=dict)
    drawn: bool = False


_STEP, _MASK = ("optimizer_step", "train"), ("supervised_positions", "gradient", "train")
_ROWS, _INIT = ("tokenization", "batches"), ("lora_init",)
_SGD = {"optim.name": "sgd"}  # Adam undoes the length of a gradient

MOVES = (
    Move("model.source", "tiny-llama", ("logits",)),
    Move("model.dtype", "bfloat16", ("logits",), drawn=True),
    Move("model.weights", "float16", ("logits",)),
    Move("data.source", "hello", _ROWS),
    Move("data.max_length", 4, ("tokenization",)),
    Move("data.pad_multiple", 7, ("batches",)),
    Move("data.pad_extra", 1, ("batches",)),
    Move("data.append_eos", False, ("tokenization",)),
    Move("seed.value", 5, (*_INIT, "batches")),
    Move("seed.placement", "before_load", ("config",)),
    Move("seed.data", 7, ("batches",)),
    Move("lora.rank", 4, _INIT),
    Move("lora.scale", 0.5, ("gradient", "train")),
    Move("lora.dropout", 0.5, ("train",), drawn=True),
    Move("lora.target_modules", ["q_proj"], _INIT),
    Move("lora.num_layers", 3, _INIT),
    Move("mask.prompt", True, ("tokenization",), {"data.source": "chat"}),
    Move("mask.start_shift", 1, _MASK),
    Move("mask.end_shift", 1, _MASK),
    Move("optim.name", "sgd", _STEP),
    Move("optim.lr", 0.1, _STEP),
    Move("optim.betas", [0.5, 0.9], _STEP),
    Move("optim.eps", 0.1, _STEP),
    Move("optim.weight_decay", 0.5, _STEP),
    Move("optim.bias_correction", False, _STEP),
    Move("optim.momentum", 0.9, _STEP, _SGD),
    Move("optim.schedule", "linear", _STEP),
    Move("optim.warmup_steps", 2, _STEP),
    Move("optim.clip", "norm", _STEP, {"optim.clip_value": 0.01, **_SGD}),
    Move("optim.clip", "value", _STEP, {"optim.clip_value": 0.001, **_SGD}),
    Move("optim.clip_value", 0.02, _STEP, {"optim.clip_value": 0.01, "optim.clip": "norm", **_SGD}),
    Move("train.steps", 2, ("train",)),
    Move("train.batch_size", 3, ("batches",)),
    Move("train.accumulation", 2, ("train",)),
    Move("train.accumulation_weighting", "token", ("train",), {"train.accumulation": 2}),
    Move("train.gradient_checkpointing", True, ("config",)),
    Move("train.autocast", "bfloat16", ("gradient", "train"), drawn=True),
    Move("train.compile", True, ("config",)),
    Move("decode.max_tokens", 2, ("decode",)),
)
"""Of factors that every recipe has. What only says how the same is computed shows in `config` alone."""

EVERYWHERE = ("logits", "lora_init", "batches", "gradient", "optimizer_step", "train")
"""Where a knob may show: nobody but its trainer knows what it does."""
BESIDE: tuple[Mapping[str, Any], ...] = ({}, {"model.dtype": "bfloat16"})
"""Factors beside which a knob is moved, until it shows."""


def moves(kind: type[TrainingPath]) -> Iterator[Move]:
    """The moves of the factors that a path says it honours."""
    for move in MOVES:
        honoured = kind.honours and move.factor.startswith(kind.honours)
        if honoured and move.factor not in kind.fixed and not _idle(kind, move):
            yield move
    recipe = kind_of(kind.knob_types())()
    for knobs in kind.knob_types():
        for name in knobs.model_fields:
            for value in other_values(knobs, name, getattr(recipe.knobs(knobs), name)):
                yield Move(f"{knobs.section}.{name}", value, EVERYWHERE)


def _idle(kind: type[TrainingPath], move: Move) -> bool:
    """Whether a factor matters beside values alone that a path never has: a limit without a clip."""
    return any(kind.fixed.get(name, value) != value for name, value in move.needs.items())


def named(factor: str, name: str) -> bool:
    """Whether a name is that of a factor, or of its section."""
    return factor == name or factor.partition(".")[0] == name.removesuffix(".")


def unmoved(kind: type[TrainingPath]) -> list[str]:
    """Factors that a path says it honours and that no move is known for."""
    names = kind_of(kind.knob_types())().factors()
    own = tuple(f"{knobs.section}." for knobs in kind.knob_types())
    moved = {move.factor for move in moves(kind)}
    moved |= {move.factor for move in MOVES if _idle(kind, move)}
    return [
        name
        for name in names
        if name.startswith((*kind.honours, *own)) and name not in moved | kind.fixed.keys()
    ]


def other_values(knobs: type[Knobs], name: str, value: Any) -> list[Any]:
    """Values that a knob can be moved to; none where its type does not say."""
    annotation = knobs.model_fields[name].annotation
    if get_origin(annotation) is Literal:
        return [other for other in get_args(annotation) if other != value]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [2 * value if value else 1]
    if isinstance(value, float):
        return [value / 2 if value else 0.5]
    return []


def base(kind: type[TrainingPath], changes: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe that factors of a path are moved in."""
    fixed = {name: value for name, value in kind.fixed.items() if not isinstance(value, tuple)}
    listed = {name: [*value] for name, value in kind.fixed.items() if isinstance(value, tuple)}
    recipe = Recipe().with_knobs(kind.knob_types())
    return recipe.override({**BASE, **fixed, **listed, **(changes or {})})
