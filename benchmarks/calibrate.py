"""How far clean cells are from their floors, and how small a fault is found.

Clean: every probe on the three tiny models, over seeds, dtypes and recipes, `mlx` against `mlx-lm`
and `hf` under one recipe. No cell should be anything but green. Of each cell that is not identical
the greatest (difference / floor) counts; a Gumbel distribution, that of maxima, is fitted to these
by probe and dtype, and the multiple that one cell in a thousand passes is read from it
(`parity.judge.noise.HEADROOM`). Faults: one element of the subject's trace is moved by a multiple of
its floor; the table says how many are found.

    python benchmarks/calibrate.py --seeds 15 --dtypes float32,bfloat16
    python benchmarks/calibrate.py --drawn 80 --half-drawn 30        # recipes drawn at random; resumes
    python benchmarks/calibrate.py --fit reports/calibration.csv     # the tables of what was measured

Writes calibration.md and calibration.csv below --out.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from benchmarks import drawn
from benchmarks.detection import detection
from parity import recipe as recipes
from parity.capture.engine import Engine
from parity.cells.cell import Cell
from parity.cells.matrix import SEEDS
from parity.cells.run import run_cell
from parity.judge.noise import HEADROOM
from parity.record import Record
from parity.report.text import describe
from parity.stages import STAGES, find
from parity.trace import Array

RATE = 1e-3
"""Of clean cells of one probe that may be called divergent."""
FEWEST = 8
"""Cells from which a distribution is fitted."""
MODELS = ("tiny-gemma3", "tiny-llama", "tiny-qwen3")
RECIPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpointing": {"train.gradient_checkpointing": True},
    "dropout": {"lora.dropout": 0.1},
    "accumulation and clip": {"train.accumulation": 2, "optim.clip": "norm"},
}
PROBES = "02,03,05,06,07,08,10,11"
"""Of drawn recipes: those that compare numbers across frameworks."""

# Clean cells -------------------------------------------------------------------------------------


def cells(options: argparse.Namespace) -> list[tuple[str, Cell]]:
    """Name of the recipe and the cell, seed by seed, so that a run that is cut short is even."""
    base = recipes.load("default", [f"train.steps={options.steps}"])
    stages = [find(name) for name in options.probes.split(",")] if options.probes else STAGES
    planned = []
    for at in range(max(options.seeds, options.half_seeds)):
        for dtype in options.dtypes.split(","):
            if at >= (options.seeds if dtype == "float32" else options.half_seeds):
                continue
            for model in MODELS:
                for name in options.recipes.split(","):
                    shared = base.override({"model.source": model, "model.dtype": dtype,
                                            "seed.value": SEEDS[at], **RECIPES[name]})  # fmt: skip
                    planned += [
                        (name, Cell(stage, "mlx", reference, shared))
                        for stage in stages
                        for reference in options.references.split(",")
                    ]
    return planned


def row(recipe: str, record: Record) -> dict[str, Any]:
    """A cell with the metric that is most floors off."""
    ratios = {m.name: m.value / m.floor for m in record.metrics if m.gate and m.floor > 0}
    top = max(ratios, key=lambda name: ratios[name], default="")
    return {
        "model": record.model,
        "dtype": record.reference.recipe["model.dtype"],
        "recipe": recipe,
        "reference": record.reference.path,
        "seed": record.seed,
        "probe": f"{record.probe:02d} {record.stage}",
        "verdict": str(record.verdict),
        "ratio": ratios.get(top, 0.0),
        "metric": top,
        "reason": record.reason,
    }


def measure(options: argparse.Namespace, engine: Engine) -> pd.DataFrame:
    """Runs the clean cells; what there is is written after each."""
    rows: list[dict[str, Any]] = []
    planned = cells(options)

    def run(item: tuple[str, Cell]) -> tuple[str, Record]:
        return item[0], run_cell(engine, item[1])

    with ThreadPoolExecutor(options.jobs) as pool:
        for index, (name, record) in enumerate(pool.map(run, planned), 1):
            rows.append(row(name, record))
            pd.DataFrame(rows).to_csv(options.out / "calibration.csv", index=False)
            if not record.verdict.green:
                print(describe(record), flush=True)
            if index % 50 == 0:
                print(f"{index} of {len(planned)} cells", flush=True)
    return pd.DataFrame(rows)


def measure_drawn(options: argparse.Namespace, engine: Engine) -> pd.DataFrame:
    """Runs the cells of drawn recipes that the table does not have; adds each to it."""
    file = options.out / "calibration.csv"
    table = pd.read_csv(file, dtype={"digest": str}) if file.exists() else pd.DataFrame()
    rows = table.to_dict("records")
    done = {(row["recipe"].partition(":")[0], row["dtype"], row["probe"]) for row in rows}
    base = recipes.load("default")
    stages = [find(name) for name in (options.probes or PROBES).split(",")]
    for dtype, count in (("float32", options.drawn), ("bfloat16", options.half_drawn)):
        for number in range(count):
            words, shared = drawn.recipe(number, dtype, base)
            if options.models and (
                shared.model.source not in options.models.split(",")
                or shared.model.quantization != "stored"
            ):
                continue
            for stage in stages:
                if (f"drawn {number}", dtype, f"{stage.number:02d} {stage.name}") in done:
                    continue
                record, digest = drawn.measured(engine, Cell(stage, "mlx", "hf", shared))
                rows.append(row(f"drawn {number}: {words}", record) | {"digest": digest})
                pd.DataFrame(rows).to_csv(file, index=False)
                print(f"{number} {dtype} {record.stage} {record.verdict} "
                      f"{record.seconds:.0f} s {rows[-1]['ratio']:.2f}", flush=True)  # fmt: skip
                if not record.verdict.green:
                    print(describe(record), flush=True)
    return pd.DataFrame(rows)


# The multiple ------------------------------------------------------------------------------------


def quantile(ratios: Array, rate: float = RATE, draws: int = 200) -> tuple[float, float]:
    """The ratio that a share `rate` of cells passes, and its upper 95 % bound.

    A ratio is the greatest of many, so that a Gumbel distribution is fitted (maximum likelihood);
    the bound comes from a parametric bootstrap.
    """
    location, scale = stats.gumbel_r.fit(ratios)
    rng = np.random.default_rng(0)
    drawn = [
        stats.gumbel_r.isf(
            rate,
            *stats.gumbel_r.fit(
                stats.gumbel_r.rvs(location, scale, size=len(ratios), random_state=rng)
            ),
        )
        for _ in range(draws)
    ]
    return float(stats.gumbel_r.isf(rate, location, scale)), float(np.quantile(drawn, 0.95))


def moved(table: pd.DataFrame) -> pd.DataFrame:
    """Cells that compared something and were not identical, with what tells one measurement from another.

    That is the digest of the arrays that both sides gave, where it was kept; else model and ratio:
    recipes that differ in what a stage does not read give the same arrays.
    """
    found = table[(table.ratio > 0) & table.verdict.isin(["agree", "diverge"])].copy()
    digest = (
        found["digest"] if "digest" in found else pd.Series(None, index=found.index, dtype=object)
    )
    found["measurement"] = digest.where(digest.notna(), found.model + " " + found.ratio.astype(str))
    return found.drop_duplicates(["dtype", "probe", "measurement"])


def fitted(table: pd.DataFrame) -> pd.DataFrame:
    """By dtype and probe: how the ratios are distributed, and the multiple that the rate needs."""
    found = []
    for (dtype, probe), group in moved(table).groupby(["dtype", "probe"]):
        ratios = group.drop_duplicates(["model", "ratio"]).ratio.to_numpy()
        enough = len(ratios) >= FEWEST
        # Of cells that are all alike, as the same logits in every cell, no distribution can be fitted.
        enough = enough and np.ptp(ratios) > 0
        needed, upper = quantile(ratios) if enough else (float("nan"), float("nan"))
        found.append(
            {
                "dtype": dtype,
                "probe": probe,
                "distinct": len(group),
                "other ratios": len(ratios),
                "median": np.median(ratios),
                "greatest": ratios.max(),
                f"passed by {RATE:g}": needed,
                "upper 95 %": upper,
            }
        )
    return pd.DataFrame(found)


# The report --------------------------------------------------------------------------------------


def report(table: pd.DataFrame, faults: pd.DataFrame, options: argparse.Namespace) -> str:
    """Markdown of what was measured."""
    table = table[table.verdict != "skip"]
    bad = ~table.verdict.isin(["identical", "agree"])
    distinct = moved(table)
    single = ", ".join(
        f"{count} in {dtype}, {int((group.verdict != 'agree').sum())} not green"
        for dtype, group in distinct.groupby("dtype")
        for count in [len(group)]
    )
    ingredients = ", ".join(
        f"{word} {distinct.recipe.str.contains(word).sum()}"
        for word in (
            "checkpointing",
            "dropout",
            "accumulation",
            "clip",
            "dora",
            "full",
            "bits",
            "cosine",
        )
    )
    counts = table.groupby(["dtype", "reference", "verdict"]).size().unstack(fill_value=0)
    text = [
        "# Calibration",
        "",
        f"Made by `python {shlex.join(sys.argv)}`.",
        "",
        f"**{len(table)} clean cells, {int(bad.sum())} not green ({100 * bad.mean():.2f} %).** A tolerance "
        f"is {HEADROOM:g} floors. Skipped cells do not count.",
        "",
        f"**Distinct measurements that are not identical: {single}.** Two cells whose sides gave the same "
        "arrays, bit for bit, are one measurement (`digest`).",
        "",
        f"Cells with {ingredients}.",
        "",
        "## Verdicts of clean cells",
        "",
        counts.to_markdown(),
        "",
        "## Greatest difference of a cell, in floors",
        "",
        "Of distinct measurements that are not identical; *other ratios* are those whose greatest ratio no "
        "other cell of the model has. "
        f"*Passed by {RATE:g}*: the multiple of a floor that one in "
        f"{1 / RATE:,.0f} clean cells passes, from a Gumbel distribution fitted to {FEWEST} distinct "
        "cells or more, with the upper 95 % bound of a parametric bootstrap.",
        "",
        fitted(table).round(2).to_markdown(index=False),
        "",
    ]
    if len(faults):
        share = faults.groupby(["dtype", "stage", "times"]).found.mean().unstack() * 100
        text += [
            "## Planted faults that are found, in percent",
            "",
            f"One element of the subject's trace moved by so many floors; {options.fault_seeds} "
            f"seeds of {len(MODELS)} models.",
            "",
            share.round(0).to_markdown(),
            "",
        ]
    if bad.any():
        rest = table[bad].drop(columns="ratio")
        text += ["## Not green", "", rest.to_markdown(index=False), ""]
    return "\n".join(text)


def main() -> None:
    """Measures, fits, writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=15)
    parser.add_argument("--half-seeds", type=int, default=5, help="of bfloat16 and float16")
    parser.add_argument("--drawn", type=int, default=0, help="recipes drawn, in float32")
    parser.add_argument("--half-drawn", type=int, default=0, help="and in bfloat16")
    parser.add_argument(
        "--models", default="", help="of drawn recipes: these as they are; all by default"
    )
    parser.add_argument("--fault-seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--references", default="mlx-lm,hf")
    parser.add_argument("--recipes", default=",".join(RECIPES), help=", ".join(RECIPES))
    parser.add_argument("--probes", default="", help="numbers; all by default")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--fit", type=Path, help="a calibration.csv: nothing is measured")
    parser.add_argument("--out", type=Path, default=Path("reports"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.fit:
        table, faults = pd.read_csv(options.fit), pd.DataFrame()
    elif options.drawn or options.half_drawn:
        with Engine() as engine:
            table, faults = measure_drawn(options, engine), pd.DataFrame()
    else:
        with Engine() as engine:
            table, faults = measure(options, engine), detection(engine, options, MODELS)
    text = report(table, faults, options)
    (options.out / "calibration.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
