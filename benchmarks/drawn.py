"""Clean cells that are really distinct: recipes drawn at random, and digests of what was compared.

Cells of one recipe with another seed or dropout often compare the same arrays, since no stage reads all
factors. A drawn recipe differs from the next in model, rows, adapter, optimizer, clip, schedule, batches
and seed at once, so that each stage is handed something else; whether it was is told by the digest of
the arrays that both sides gave.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from parity.capture.engine import Engine, Source
from parity.cells.cell import Cell
from parity.cells.run import run_cell, sources_of
from parity.recipe import Recipe
from parity.record import Record
from parity.trace import Trace

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
DELTA = ["in_proj_qkv", "in_proj_z", "out_proj"]
MODELS: tuple[tuple[str, dict[str, Any], tuple[list[str], ...]], ...] = (
    ("tiny-gemma3", {}, (ALL, ATTENTION, ["q_proj", "v_proj"])),
    ("tiny-llama", {}, (ALL, ATTENTION, ["down_proj", "v_proj"])),
    ("tiny-qwen3", {}, (ALL, ATTENTION, ["gate_proj", "up_proj"])),
    ("tiny-llama-4bit", {}, (ALL, ATTENTION)),
    ("tiny-qwen2-moe", {}, ([*ATTENTION, "down_proj"], ["gate_proj", "up_proj"], ATTENTION)),
    ("tiny-qwen3-5", {}, ([*ATTENTION, *DELTA], DELTA)),
    ("tiny-qwen3", {"model.quantization": "affine"}, (ALL, ATTENTION)),
    ("tiny-llama", {"model.quantization": "affine"}, (ALL, ["q_proj", "v_proj"])),
)
"""Model, how it is loaded, and the modules that may be trained."""
TOGETHER = 4
METHODS_ASIDE = ("config", "defaults", "tokenization")
"""Captures that inputs are made of, and that no array of a verdict comes from."""


def recipe(number: int, dtype: str, base: Recipe) -> tuple[str, Recipe]:
    """The drawn recipe of a number, and its ingredients in words."""
    # Some in a row have one model, which is then loaded once.
    group, rng = number // TOGETHER, np.random.default_rng([20261128, number])
    loaded = np.random.default_rng([20261128, 1, group])

    def one(*values: Any) -> Any:
        value = values[int(rng.integers(len(values)))]
        return value.item() if isinstance(value, np.generic) else value

    def between(low: float, high: float) -> float:
        return float(f"{np.exp(rng.uniform(np.log(low), np.log(high))):.3g}")

    model, loading, targets = MODELS[group % len(MODELS)]
    half = 4 if model == "tiny-qwen3-5" else 9
    drawn: dict[str, Any] = {
        "model.source": model, "model.dtype": dtype, **loading,
        "seed.value": int(rng.integers(1, 2**31)),
        "data.source": one("hello", "mixed"), "data.pad_multiple": one(1, 8, 32),
        "lora.kind": one(*["lora"] * 5, "dora", "full"), "lora.rank": one(2, 4, 8, 16),
        "lora.scale": between(0.5, 8), "lora.dropout": one(0.0, 0.0, 0.1),
        "lora.num_layers": one(-1, -1, 3, half), "lora.target_modules": one(*targets),
        "mask.end_shift": one(0, 1),
        "optim.name": one("adamw", "adamw", "adamw", "adam", "adam", "sgd"), "optim.lr": between(2e-4, 3e-3),
        "optim.betas": [one(0.8, 0.9, 0.95), one(0.95, 0.99, 0.999)],
        "optim.eps": one(1e-8, 1e-6),
        "optim.schedule": one("constant", "linear", "cosine"), "optim.warmup_steps": one(0, 2),
        "optim.clip": one("none", "norm", "value"), "optim.clip_value": between(0.05, 1.0),
        "train.steps": one(4, 6, 8), "train.batch_size": one(2, 4, 6),
        "train.accumulation": one(1, 1, 2, 3),
        "train.accumulation_weighting": one("mean", "token"),
        "train.gradient_checkpointing": one(False, False, True),
    }  # fmt: skip
    if "model.quantization" in drawn:
        drawn["model.bits"] = (3, 4, 6, 8)[int(loaded.integers(4))]
        drawn["model.group_size"] = (32, 64)[int(loaded.integers(2))]
        if drawn["lora.kind"] == "full":
            drawn["lora.kind"] = "lora"  # what is quantized is not trained
    if model == "tiny-llama-4bit" and drawn["lora.kind"] == "full":
        drawn["lora.kind"] = "dora"
    if drawn["optim.name"] == "adamw":
        drawn["optim.weight_decay"] = one(0.0, 0.01, 0.1)
    if drawn["lora.kind"] == "full":
        drawn["optim.lr"] /= 10
    if drawn["optim.schedule"] != "constant":
        # After a warm-up mlx-lm's decay begins one step later than that of transformers: no clean cell.
        drawn["optim.warmup_steps"] = 0
    words = [
        drawn["lora.kind"], drawn["optim.name"], drawn["optim.schedule"],
        f"clip {drawn['optim.clip']}" * (drawn["optim.clip"] != "none"),
        f"accumulation {drawn['train.accumulation']}" * (drawn["train.accumulation"] > 1),
        "dropout" * (drawn["lora.dropout"] > 0), "checkpointing" * drawn["train.gradient_checkpointing"],
        f"{drawn.get('model.bits')} bits" * ("model.bits" in drawn),
    ]  # fmt: skip
    return ", ".join(filter(None, words)), base.override(drawn)


def measured(engine: Engine, cell: Cell) -> tuple[Record, str]:
    """The record of a cell and the digest (hex, 16 digits) of the arrays that subject and reference gave.

    Two cells of one digest are one measurement, whatever their recipes.
    """
    seen: dict[str, set[str]] = {"subject": set(), "reference": set()}

    def noted(side: str, source: Source) -> Source:
        def run(method: str, recipe: Recipe, inputs: Trace, attempt: str = "") -> Trace:
            trace = source(method, recipe, inputs, attempt)
            if method not in METHODS_ASIDE:
                seen[side].add(Trace(trace.arrays).digest())
            return trace

        return run

    sources: Mapping[str, Source] = sources_of(engine, cell)
    record = run_cell(
        engine,
        cell,
        sources={side: noted(side, s) if side in seen else s for side, s in sources.items()},
    )
    text = "|".join(f"{side}:{','.join(sorted(found))}" for side, found in seen.items())
    return record, hashlib.sha256(text.encode()).hexdigest()[:16]
