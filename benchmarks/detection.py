"""How small a fault is found: one element of the subject's trace is moved by a multiple of its floor."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from parity import recipe as recipes
from parity.capture.engine import Engine
from parity.cells.cell import Cell
from parity.cells.matrix import SEEDS
from parity.cells.run import context_of
from parity.judge.noise import Noise
from parity.record import Verdict
from parity.stages import find
from parity.stages.context import Context
from parity.trace import Array, Trace

TIMES = (1, 3, 10, 30, 100)
# Stage to the method that it captures and the group of arrays in which a fault is planted.
PLANTS = {
    "logits": ("logits", ""),
    "cross_entropy": ("cross_entropy", ""),
    "gradient": ("gradient", "gradient"),
    "optimizer_step": ("optimizer_step", "weight.2"),
    "loss_curve": ("train", ""),
    "greedy_decode": ("decode", ""),
}
ARRAYS = {
    "logits": "logits.1",
    "cross_entropy": "token_loss",
    "loss_curve": "loss",
    "greedy_decode": "completion_loss",
}


def plant(context: Context, stage: str, times: float, rng: np.random.Generator) -> Context:
    """A context in which one element of the subject's trace is off by `times` floors.

    As a real fault would, it is in every run of the subject.
    """
    method, group = PLANTS[stage]
    fault: dict[str, Any] = {}

    def moved(trace: Trace) -> Trace:
        if fault["name"] in trace.arrays:
            values = trace.arrays[fault["name"]].astype(np.float64)
            values[fault["at"]] += fault["by"]
            trace.arrays[fault["name"]] = values
        return trace

    def both(wanted: str, given: Any, inputs: Trace) -> tuple[Trace, Trace]:
        subject, reference = context.both(wanted, given, inputs)
        # The optimizer's second round has another weight decay, hence other floors.
        if wanted != method or given["reference"] != context.recipes["reference"]:
            return subject, reference
        noise = context.pair(method, inputs).noise_of(group)
        arrays = reference.group(group) if group else reference.arrays
        name = ARRAYS.get(stage) or sorted(arrays)[rng.integers(len(arrays))]
        at = tuple(int(rng.integers(n)) for n in arrays[name].shape)
        floor = floor_at(noise, name, arrays[name], at, series=stage == "loss_curve")
        full = f"{group}/{name}" if group else name
        fault.update(name=full, at=at, by=rng.choice([-1, 1]) * times * floor)
        return moved(subject), reference

    def capture(side: str, wanted: str, given: Any, inputs: Trace) -> Trace:
        trace = context.capture(side, wanted, given, inputs)
        planted = side == "subject" and wanted == method and fault
        return moved(trace) if planted else trace

    return dataclasses.replace(context, both=both, capture=capture)


def floor_at(noise: Noise, name: str, value: Array, at: tuple[int, ...], series: bool) -> float:
    """The floor of an element; of a step in a series it is the greatest up to it."""
    if not series:
        return noise.floor(name, value)
    known = [v for v in noise.sources(name, value).values() if not isinstance(v, str)]
    return float(np.maximum.accumulate(np.max(known, axis=0))[at])


def detection(engine: Engine, options: argparse.Namespace, models: Sequence[str]) -> pd.DataFrame:
    """Whether a fault of so many floors is found, by stage and dtype."""
    found = []
    base = recipes.load("default", [f"train.steps={options.steps}"])
    for dtype in options.dtypes.split(","):
        for model in models:
            for seed in SEEDS[: options.fault_seeds]:
                shared = base.override(
                    {"model.source": model, "model.dtype": dtype, "seed.value": seed}
                )
                for stage in PLANTS:
                    context = context_of(engine, Cell(find(stage), "mlx", "hf", shared))
                    for times in TIMES:
                        rng = np.random.default_rng([seed, times])
                        metrics = find(stage).run(plant(context, stage, times, rng)).metrics
                        seen = any(m.gate and m.verdict is Verdict.DIVERGE for m in metrics)
                        found.append(
                            {"dtype": dtype, "stage": stage, "times": times, "found": seen}
                        )
    return pd.DataFrame(found)
