"""Stage 00: what each path will really do, read back from its live objects after set-up.

The vocabulary (scalars that `config` emits): `dtype.parameters` and `dtype.adapter` {dtype: elements},
`dtype.activations` {dtype: modules}, `rope.theta` [per layer], `lora.trainable`, `lora.parameters`, `lora.names`, `lora.rank`,
`lora.scale`, `lora.dropout`, `lora.layers`, `lora.modules`, `optim.class`, `optim.betas`,
`optim.eps`, `optim.weight_decay`, `optim.bias_correction`, `optim.lr` [per step], `clip.mode`,
`clip.value`, `batch.shapes`, `batch.pad_id`, `batch.rows`, `mask.supervised` [per row],
`loss.denominator`, `accumulation.steps`, `accumulation.weighting`, `train.autocast`,
`train.gradient_checkpointing`, `seed.value`, `seed.placement`, `seed.rng`, `train.compile`;
array `supervised` (K, 3) of (row, position, target id) in the first batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from parity.errors import CaptureError, Unsupported
from parity.judge.numerics import nothing
from parity.record import Metric, Verdict
from parity.stages.context import Comparison, Context
from parity.trace import Trace

RELATIVE = 1e-6
"""Settings are stored as float32 on one side and as float64 on the other."""

Say = Callable[[Any, Any], str]


def _plain(what: str) -> Say:
    return lambda a, b: f"{what}: {_short(a)} in the subject, {_short(b)} in the reference"


def _layers(a: list[int], b: list[int]) -> str:
    def say(layers: list[int]) -> str:
        if not layers:
            return "no layer"
        if layers == list(range(layers[0], layers[-1] + 1)):
            return f"{len(layers)} layers ({layers[0]} to {layers[-1]})"
        return f"{len(layers)} layers {layers}"

    return f"LoRA is on {say(a)} in the subject and on {say(b)} in the reference"


def _theta(a: list[float], b: list[float]) -> str:
    ours, theirs = (", ".join(f"{v:g}" for v in dict.fromkeys(side)) for side in (a, b))
    return (
        f"rope theta as the model uses it: {ours} in the subject, {theirs} in the reference "
        "(a config saved by transformers 5 keeps it in rope_parameters, where not every loader looks)"
    )


def _correction(a: Any, b: Any) -> str:
    def say(value: Any) -> str:
        return {True: "corrects Adam's bias", False: "does not correct Adam's bias"}.get(
            value, f"says {value!r} of bias correction"
        )

    return f"the subject {say(a)}, the reference {say(b)}"


def _supervised(a: list[int], b: list[int]) -> str:
    if len(a) == len(b) and len({x - y for x, y in zip(a, b, strict=True)}) == 1:
        n = a[0] - b[0]
        return (
            f"the subject supervises {abs(n)} position{'s' if abs(n) != 1 else ''} "
            f"{'more' if n > 0 else 'fewer'} per row than the reference "
            f"({a[0]} against {b[0]} in row 0)"
        )
    return f"supervised positions per row: {_short(a)} in the subject, {_short(b)} in the reference"


def _rates(a: list[float], b: list[float]) -> str:
    step = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if not _same(x, y)), 0)
    return f"learning rate at step {step + 1}: {a[step]:.6g} in the subject, {b[step]:.6g} in the reference"


def _shapes(a: list[list[int]], b: list[list[int]]) -> str:
    at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
    if at is None:
        return f"{len(a)} micro-batches in the subject, {len(b)} in the reference"
    (rows, width), (their_rows, their_width) = a[at], b[at]
    return (
        f"batch {at + 1} is {rows} rows of {width} in the subject, "
        f"{their_rows} of {their_width} in the reference"
    )


# Ranked by what most likely matters. Names of tensors and digests of rows are compared elsewhere or
# only counted.
VOCABULARY: dict[str, Say] = {
    "rope.theta": _theta,
    "dtype.parameters": _plain("dtype of the base weights"),
    "dtype.adapter": _plain("dtype of the adapter"),
    "train.autocast": _plain("autocast of the forward pass"),
    "dtype.activations": _plain("dtype of what the modules give"),
    "lora.layers": _layers,
    "lora.scale": _plain("LoRA scale (alpha / rank)"),
    "lora.rank": _plain("LoRA rank"),
    "lora.modules": _plain("adapted modules"),
    "lora.dropout": _plain("LoRA dropout"),
    "lora.trainable": _plain("trainable tensors"),
    "mask.supervised": _supervised,
    "loss.denominator": _plain("the loss is divided by"),
    "optim.class": _plain("optimizer"),
    "optim.bias_correction": _correction,
    "optim.lr": _rates,
    "optim.weight_decay": _plain("weight decay"),
    "optim.betas": _plain("betas"),
    "optim.eps": _plain("eps"),
    "clip.mode": _plain("gradient clip"),
    "clip.value": _plain("clip at"),
    "accumulation.steps": _plain("micro-batches a step"),
    "accumulation.weighting": _plain("micro-batches are weighted by"),
    "train.gradient_checkpointing": _plain("gradient checkpointing"),
    "train.compile": _plain("compiled step"),
    "seed.value": _plain("seed"),
    "seed.placement": _plain("the seed is set"),
    "seed.rng": _plain("state of the random generator after LoRA init"),
    "batch.pad_id": _plain("padding id"),
    "batch.shapes": _shapes,
    "batch.rows": lambda a, b: "the rows come in another order or are other rows",
}
_BATCHING = ("batch.shapes", "batch.rows", "batch.pad_id")
_SUPERVISION = ("mask.supervised", *_BATCHING)


class Config:
    """The effective configuration: under the recipe (decides) and as shipped (is reported)."""

    number: ClassVar[int] = 0
    name: ClassVar[str] = "config"
    question: ClassVar[str] = "Will both do what was asked, and what do they do unasked?"

    def run(self, context: Context) -> Comparison:
        """Compares settings, not arrays: a difference is a sentence."""
        a, b = context.both("config", context.recipes, Trace())
        result = Comparison()
        # Without bit-identity batches are handed over, so their order and width decide nothing.
        skipped = () if context.exact else _SUPERVISION
        for key, say in VOCABULARY.items():
            if key not in a.scalars and key not in b.scalars:
                continue
            if key not in a.scalars or key not in b.scalars:
                side = "subject" if key in a.scalars else "reference"
                result.metrics.append(
                    nothing(key).model_copy(update={"gate": False, "note": f"only the {side} says"})
                )
                continue
            ours, theirs = a.scalars[key], b.scalars[key]
            same = _same(ours, theirs)
            gate = key not in skipped
            result.metrics.append(_metric(key, same, gate, "" if same else say(ours, theirs)))
        result.findings += self._dropped(context, a, b)
        result.findings += self._shipped(context)
        return result

    def _dropped(self, context: Context, *traces: Trace) -> list[str]:
        """What was requested and is not in effect: a knob silently dropped."""
        found = []
        for side, trace in zip(("subject", "reference"), traces, strict=True):
            factors = context.recipes[side].factors()
            for factor, key in _REQUESTED.items():
                asked, real = factors[factor], trace.scalars.get(key)
                if real is not None and not _same(asked, real):
                    found.append(
                        f"{side}: {factor}={_short(asked)} was asked for, {_short(real)} is in effect"
                    )
        return found

    def _shipped(self, context: Context) -> list[str]:
        try:
            a, b = context.both("config", context.shipped, Trace())
        except (Unsupported, CaptureError) as error:
            return [f"as shipped, the settings were not compared: {error}"]
        return [
            f"as shipped: {say(a.scalars[key], b.scalars[key])}"
            for key, say in VOCABULARY.items()
            if key in a.scalars and key in b.scalars and not _same(a.scalars[key], b.scalars[key])
        ]


_REQUESTED = {
    "lora.rank": "lora.rank",
    "lora.scale": "lora.scale",
    "lora.dropout": "lora.dropout",
    "optim.eps": "optim.eps",
    "optim.weight_decay": "optim.weight_decay",
    "optim.bias_correction": "optim.bias_correction",
    "optim.clip": "clip.mode",
    "seed.value": "seed.value",
    "seed.placement": "seed.placement",
    "train.compile": "train.compile",
}


def _metric(key: str, same: bool, gate: bool, note: str) -> Metric:
    return Metric(
        name=key,
        verdict=Verdict.IDENTICAL if same else Verdict.DIVERGE,
        value=0.0 if same else 1.0,
        tolerance=0.0,
        minimum_required_tolerance=0.0 if same else float("inf"),
        mismatched=0 if same else 1,
        total=1,
        where="" if same else key,
        gate=gate,
        note=note,
    )


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return bool(np.isclose(a, b, rtol=RELATIVE, atol=0, equal_nan=True))
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys()  # a census of dtypes: which ones, not how much of each
    return bool(a == b)


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(
            f"{k} ({v:,})" if isinstance(v, int) else f"{k} {v}" for k, v in value.items()
        )
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        shown = ", ".join(_short(v) for v in value[:4])
        return f"[{shown}{', …' if len(value) > 4 else ''}]"
    return str(value)
