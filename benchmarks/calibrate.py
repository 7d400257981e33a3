"""How far clean cells are from their floors, and how small a fault is found.

Clean: every probe on the three tiny models, over seeds and dtypes, `mlx` against `mlx-lm` and `hf`
under one recipe. No cell should be anything but green, and the greatest distance in floors says how
much headroom a tolerance needs. Faults: one element of the subject's trace is moved by a multiple of
its floor; the table says how many are found.

    python benchmarks/calibrate.py --seeds 15 --dtypes float32,bfloat16

Writes reports/calibration.md and reports/calibration.csv.
"""

from __future__ import annotations

import argparse
import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from parity import recipe as recipes
from parity.capture.engine import Engine
from parity.cells.cell import Cell
from parity.cells.matrix import SEEDS
from parity.cells.run import context_of
from parity.judge.numerics import HEADROOM, Noise
from parity.record import Record, Verdict
from parity.report.text import describe
from parity.stages import STAGES, find
from parity.stages.context import Context
from parity.trace import Array, Trace

MODELS = ("tiny-gemma3", "tiny-llama", "tiny-qwen3")
REFERENCES = ("mlx-lm", "hf")
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


def cells(options: argparse.Namespace) -> list[Cell]:
    base = recipes.load("default", [f"train.steps={options.steps}"])
    return [
        Cell(stage, "mlx", reference, base.override(
            {"model.source": model, "model.dtype": dtype, "seed.value": seed}))
        for dtype in options.dtypes.split(",")
        for model in MODELS
        for seed in SEEDS[: options.seeds if dtype == "float32" else options.half_seeds]
        for stage in STAGES
        for reference in REFERENCES
    ]  # fmt: skip


def row(record: Record) -> list[dict[str, Any]]:
    """One line a metric that has a floor."""
    cell = {
        "model": record.model,
        "dtype": record.reference.recipe["model.dtype"],
        "reference": record.reference.path,
        "seed": record.seed,
        "probe": f"{record.probe:02d} {record.stage}",
        "verdict": str(record.verdict),
    }
    ratios = [m.value / m.floor for m in record.metrics if m.gate and m.floor > 0]
    return [{**cell, "ratio": max(ratios, default=0.0), "reason": record.reason}]


def plant(context: Context, stage: str, times: float, rng: np.random.Generator) -> Context:
    """A context in which one element of the subject's trace is off by `times` floors.

    As a real fault would, it is in every run of the subject, the perturbed one included.
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
    floors = [np.abs(other[name] - value) for other in (noise.referee, noise.perturbed)]
    floors.append(noise.own.get(name, np.zeros_like(value)))
    so_far = np.maximum.accumulate(np.max(floors, axis=0))
    return float(max(so_far[at], 2.0**-23 * abs(value[at]), noise.reduction))


def detection(engine: Engine, options: argparse.Namespace) -> pd.DataFrame:
    found = []
    base = recipes.load("default", [f"train.steps={options.steps}"])
    for dtype in options.dtypes.split(","):
        for model in MODELS:
            for seed in SEEDS[: options.fault_seeds]:
                shared = base.override(
                    {"model.source": model, "model.dtype": dtype, "seed.value": seed}
                )
                for stage in PLANTS:
                    cell = Cell(find(stage), "mlx", "hf", shared)
                    context = context_of(engine, cell)
                    for times in TIMES:
                        rng = np.random.default_rng([seed, times])
                        metrics = find(stage).run(plant(context, stage, times, rng)).metrics
                        seen = any(m.gate and m.verdict is Verdict.DIVERGE for m in metrics)
                        found.append(
                            {"dtype": dtype, "stage": stage, "times": times, "found": seen}
                        )
    return pd.DataFrame(found)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=15)
    parser.add_argument("--half-seeds", type=int, default=5, help="of bfloat16 and float16")
    parser.add_argument("--fault-seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--out", type=Path, default=Path("reports"))
    options = parser.parse_args()
    planned = cells(options)
    with Engine() as engine, ThreadPoolExecutor(2) as pool:
        rows = []
        for index, record in enumerate(pool.map(engine.run, planned)):
            rows += row(record)
            if not record.verdict.green:
                print(describe(record), flush=True)
            if index % 90 == 89:
                print(f"{index + 1} of {len(planned)} cells", flush=True)
        faults = detection(engine, options)
    table = pd.DataFrame(rows)
    table.to_csv(options.out / "calibration.csv", index=False)
    green = table.verdict.isin(["identical", "agree"])
    across = table[(table.reference == "hf") & (table.ratio > 0)]
    spread = across.groupby(["dtype", "probe"]).ratio.describe(percentiles=[0.5, 0.9, 0.99])
    share = faults.groupby(["dtype", "stage", "times"]).found.mean().unstack() * 100
    text = [
        "# Calibration",
        "",
        f"Made by `python benchmarks/calibrate.py --seeds {options.seeds} "
        f"--half-seeds {options.half_seeds} --dtypes {options.dtypes} --steps {options.steps} --fault-seeds {options.fault_seeds}`.",
        "",
        f"**{len(table)} clean cells, {int((~green).sum())} not green "
        f"({100 * (~green).mean():.2f} %).** A tolerance is {HEADROOM:g} floors.",
        "",
        "## Verdicts of clean cells",
        "",
        table.groupby(["dtype", "reference", "verdict"]).size().unstack(fill_value=0).to_markdown(),
        "",
        "## Greatest distance in floors, mlx against hf",
        "",
        spread[["count", "50%", "90%", "99%", "max"]].round(2).to_markdown(),
        "",
        "## Planted faults that are found, in percent",
        "",
        f"One element of the subject's trace moved by so many floors; {options.fault_seeds} seeds of "
        f"{len(MODELS)} models.",
        "",
        share.round(0).to_markdown(),
        "",
    ]
    if (~green).any():
        text += [
            "## Not green",
            "",
            table[~green].drop(columns="ratio").to_markdown(index=False),
            "",
        ]
    (options.out / "calibration.md").write_text("\n".join(text), encoding="utf-8")
    print("\n".join(text))


if __name__ == "__main__":
    main()
