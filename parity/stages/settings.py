"""The vocabulary of the effective configuration: when two settings are equal, and differences in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from parity.judge.noise import EPS, HEADROOM

RELATIVE = HEADROOM * EPS["float32"]
"""Settings are stored as float32 on one side and as float64 on the other, after an operation or two."""
ANGLE = 1e-5
"""Inverse frequencies are measured from float32 sines and cosines: MLX's are up to 1.4e-6 off for a base
of 1e7 over 128 dimensions, since it takes an exponential of a float32."""

Settings = Mapping[str, Any]

# Ranked by what most likely matters. Names of tensors and digests of rows are compared elsewhere or
# only counted.
TITLES: dict[str, str] = {
    "rope.frequencies": "inverse frequencies of the rotary embedding",
    "rope.width": "dimensions that the rotary embedding turns",
    "rope.attention_scaling": "factor of the rotary embedding on queries and keys",
    "rope.kind": "frequencies of the rotary embedding",
    "model.quantization": "quantization of the base weights",
    "model.dropout": "dropout of the model itself in training",
    "dtype.parameters": "dtype of the base weights",
    "dtype.adapter": "dtype of the adapter",
    "train.autocast": "autocast of the forward pass",
    "dtype.activations": "modules that are called, by the dtype of what they give",
    "lora.kind": "what is trained",
    "lora.layers": "layers with LoRA",
    "lora.scale": "LoRA scale (alpha / rank)",
    "lora.rank": "LoRA rank",
    "lora.modules": "adapted modules",
    "lora.dropout": "LoRA dropout",
    "lora.trainable": "trainable tensors",
    "mask.supervised": "supervised positions per row",
    "loss.denominator": "the loss is divided by",
    "optim.class": "optimizer",
    "optim.bias_correction": "Adam's bias correction",
    "optim.lr": "learning rate",
    "optim.weight_decay": "weight decay",
    "optim.betas": "betas",
    "optim.eps": "eps",
    "clip.mode": "gradient clip",
    "clip.value": "clip at",
    "accumulation.steps": "micro-batches a step",
    "accumulation.weighting": "weighting of micro-batches",
    "train.gradient_checkpointing": "gradient checkpointing",
    "train.compile": "compiled step",
    "seed.value": "seed",
    "seed.placement": "the seed is set",
    "seed.rng": "state of the random generator after LoRA init",
    "batch.pad_id": "ids behind the end of a row",
    "batch.shapes": "shapes of the micro-batches",
    "batch.rows": "rows of the micro-batches",
}
BATCHES = ("mask.supervised", "batch.shapes", "batch.rows", "batch.pad_id")
"""Depend on the order and width of the batches."""
INTERNAL = ("train.compile", "seed.rng", "dtype.activations")
"""Mean something within one framework only."""


def sentence(key: str, a: Settings, b: Settings) -> str:
    """How subject and reference differ in a setting that both have."""
    if key in _SENTENCES:
        return _SENTENCES[key](a, b)
    return f"{TITLES[key]}: {short(a[key])} in the subject, {short(b[key])} in the reference"


def short(value: Any) -> str:
    """A value in a few words."""
    if isinstance(value, dict):
        return ", ".join(f"{k} {_counted(v)}" for k, v in value.items())
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        shown = ", ".join(short(v) for v in value[:4])
        return f"[{shown}{', …' if len(value) > 4 else ''}]"
    return str(value)


def _counted(value: Any) -> str:
    """What stands behind a key: a number, how many modules, or the value."""
    if isinstance(value, int):
        return f"({value:,})"
    if isinstance(value, list) and value and isinstance(value[0], str):
        return f"({len(value)} modules)"
    return short(value)


def same(key: str, a: Any, b: Any) -> bool:
    """Whether two values of a setting are equal, floats up to their storage."""
    if key == "optim.lr" and isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        # Where a schedule ends near zero a rate is what two numbers of the size of the first leave.
        size = max((abs(float(rate)) for rate in (*a, *b)), default=0.0)
        return len(a) == len(b) and bool(np.allclose(a, b, rtol=0, atol=RELATIVE * size))
    return _same(a, b, ANGLE if key.startswith("rope.") else RELATIVE)


def _same(a: Any, b: Any, relative: float) -> bool:
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return bool(np.isclose(a, b, rtol=relative, atol=0, equal_nan=True))
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(_same(x, y, relative) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def _layers(a: Settings, b: Settings) -> str:
    def describe(layers: list[int]) -> str:
        if not layers:
            return "no layer"
        if layers == list(range(layers[0], layers[-1] + 1)):
            return f"{len(layers)} layers ({layers[0]} to {layers[-1]})"
        return f"{len(layers)} layers {layers}"

    key = "lora.layers"
    return (
        f"LoRA is on {describe(a[key])} in the subject and on {describe(b[key])} in the reference"
    )


def _frequencies(a: Settings, b: Settings) -> str:
    """Where and how far frequencies differ, and what each configuration says."""
    ours, theirs = a["rope.frequencies"], b["rope.frequencies"]
    configurations = "; ".join(
        f"the {side}'s configuration: {short(settings.get('rope.configuration') or 'nothing')}"
        for side, settings in (("subject", a), ("reference", b))
    )
    if len(ours) != len(theirs):
        return f"rotary embedding: {len(ours)} layers in the subject, {len(theirs)} in the reference; {configurations}"
    bad = [n for n, (x, y) in enumerate(zip(ours, theirs, strict=True)) if not _same(x, y, ANGLE)]
    x, y = ours[bad[0]], theirs[bad[0]]
    if len(x) != len(y):
        what = f"{len(x)} in the subject, {len(y)} in the reference"
    else:
        at = max(range(len(x)), key=lambda i: abs(np.log(x[i] / y[i])))
        what = (
            f"number {at + 1} of {len(x)} is {x[at]:.6g} radians a position in the subject, "
            f"{y[at]:.6g} in the reference ({x[at] / y[at]:.4g} times)"
        )
    return (
        f"inverse frequencies of the rotary embedding differ in {len(bad)} of {len(ours)} layers; "
        f"in layer {bad[0]} {what}; {configurations}"
    )


def packed(settings: Settings) -> dict[str, str]:
    """Module that holds packed weights → what it is quantized with."""
    value = settings.get("model.quantization")
    found = value.items() if isinstance(value, Mapping) else ()
    return {name: words for words, names in found for name in names}


def _quantization(ours: Settings, theirs: Settings) -> str:
    """How many modules are packed on each side, and which otherwise than on the other."""
    a, b = packed(ours), packed(theirs)
    totals = (
        f"{short(s['model.quantization'])} in the {side}"
        for side, s in (("subject", ours), ("reference", theirs))
    )
    words = [f"{TITLES['model.quantization']}: {', '.join(totals)}"]
    for side, more, other in (("subject", a, b), ("reference", b, a)):
        if alone := [name for name in more if name not in other]:
            words.append(f"packed in the {side} alone: {_few(alone)}")
    if both := [name for name in a if name in b and a[name] != b[name]]:
        words.append(
            f"packed otherwise: {_few(both)} ({a[both[0]]} in the subject, {b[both[0]]} in the reference)"
        )
    return "; ".join(words)


def _few(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _correction(a: Settings, b: Settings) -> str:
    def describe(value: Any) -> str:
        known = {True: "corrects Adam's bias", False: "does not correct Adam's bias"}
        return known.get(value, f"has {value!r} for bias correction")

    key = "optim.bias_correction"
    return f"the subject {describe(a[key])}, the reference {describe(b[key])}"


def _supervised(ours: Settings, theirs: Settings) -> str:
    a, b = ours["mask.supervised"], theirs["mask.supervised"]
    if len(a) == len(b) and len({x - y for x, y in zip(a, b, strict=True)}) == 1:
        n = a[0] - b[0]
        return (
            f"the subject supervises {abs(n)} position{'s' if abs(n) != 1 else ''} "
            f"{'more' if n > 0 else 'fewer'} per row than the reference "
            f"({a[0]} against {b[0]} in row 0)"
        )
    return f"supervised positions per row: {short(a)} in the subject, {short(b)} in the reference"


def _rates(ours: Settings, theirs: Settings) -> str:
    a, b = ours["optim.lr"], theirs["optim.lr"]
    if len(a) != len(b):
        return f"learning rates of {len(a)} steps in the subject, of {len(b)} in the reference"
    step = next(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if not _same(x, y, RELATIVE))
    return f"learning rate at step {step + 1}: {a[step]:.6g} in the subject, {b[step]:.6g} in the reference"


def _shapes(ours: Settings, theirs: Settings) -> str:
    a, b = ours["batch.shapes"], theirs["batch.shapes"]
    at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
    if at is None:
        return f"{len(a)} micro-batches in the subject, {len(b)} in the reference"
    (rows, width), (their_rows, their_width) = a[at], b[at]
    return (
        f"batch {at + 1} is {rows} rows of {width} in the subject, "
        f"{their_rows} of {their_width} in the reference"
    )


def _rows(_: Settings, __: Settings) -> str:
    return "the rows come in another order or are other rows"


_SENTENCES: dict[str, Callable[[Settings, Settings], str]] = {
    "rope.frequencies": _frequencies,
    "model.quantization": _quantization,
    "lora.layers": _layers,
    "mask.supervised": _supervised,
    "optim.bias_correction": _correction,
    "optim.lr": _rates,
    "batch.shapes": _shapes,
    "batch.rows": _rows,
}
