"""What the harness costs, as ratios against what a user would do instead, in the same run.

1. The matrix: all eight probes x seeds x two references with kept workers and shared captures,
   against a fresh process for every probe, seed and reference. The fresh way runs the same cells,
   noise floors included, with nothing kept but MLX's compiled kernels. It is measured on
   `--fresh-seeds` seeds and scaled, for it grows with the number of seeds and nothing else.
2. The loop: seconds a step of the instrumented paths against mlx-lm's `train()` bare.

    python benchmarks/matrix.py --seeds 15 --fresh-seeds 1
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from parity import recipe as recipes
from parity import resources
from parity.capture.worker import environment
from parity.cells.matrix import SEEDS

PROBES = range(1, 9)
REFERENCES = ("mlx-lm", "hf")


def cache_with_kernels(folder: Path) -> Path:
    """An empty cache that shares the compiled kernels."""
    kernels = resources.cache() / "kernels"
    kernels.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True)
    (folder / "kernels").symlink_to(kernels)
    return folder


def timed(arguments: list[str], cache: Path, out: Path) -> float:
    """Seconds of one `parity run` as a whole process."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "parity.cli", "run", *arguments, "--out", str(out)],
        env={**os.environ, "PARITY_CACHE": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode not in (0, 1):
        sys.exit(done.stdout + done.stderr)
    return time.perf_counter() - started


def matrix(seeds: int, fresh_seeds: int, scratch: Path) -> None:
    probes = ",".join(f"{probe:02d}" for probe in PROBES)
    together = timed(
        ["--probes", probes, "--seeds", str(seeds)],
        cache_with_kernels(scratch / "kept"),
        scratch / "a",
    )
    print(f"kept workers, shared captures: {seeds} seeds in {together:.0f} s", flush=True)
    alone = 0.0
    for seed in SEEDS[:fresh_seeds]:
        for probe in PROBES:
            for reference in REFERENCES:
                name = f"{probe}-{reference}-{seed}"
                cache = cache_with_kernels(scratch / name)
                words = [
                    "--probes",
                    f"{probe:02d}",
                    "--reference",
                    reference,
                    "--seeds",
                    f"{seed},",
                ]
                took = timed(words, cache, scratch / "b" / name)
                shutil.rmtree(cache)
                alone += took
                print(
                    f"  fresh: probe {probe:02d} against {reference}, seed {seed}: {took:.1f} s",
                    flush=True,
                )
    scaled = alone * seeds / fresh_seeds
    print(
        f"a fresh process each: {alone:.0f} s for {fresh_seeds} seeds, {scaled:.0f} s for {seeds}"
    )
    print(f"ratio: {scaled / together:.1f}")


LOOP = """
import sys, tempfile, time
from pathlib import Path
from parity import recipe
from parity.paths.mlx.path import MlxPath
from parity.paths.mlx_lm.path import MlxLmPath
from parity.trace import Trace
import mlx.core as mx
from mlx_lm.tuner.trainer import TrainingArgs, train

steps, rounds, cache = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
shared = recipe.load("default", [f"train.steps={steps}"])
paths = {"mlx": MlxPath(cache), "mlx-lm": MlxLmPath(cache)}

def bare():
    setup = paths["mlx"].setup(shared)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArgs(batch_size=shared.train.batch_size, iters=steps, steps_per_report=1,
                            adapter_file=folder + "/a.safetensors")
        started = time.perf_counter()
        train(setup.model, setup.optimizer, setup.dataset, args=args)
        return time.perf_counter() - started

def path(name):
    started = time.perf_counter()
    setup = paths[name].setup(shared)
    spent = time.perf_counter() - started
    started = time.perf_counter()
    if name == "mlx":
        paths[name].loop(shared, setup, setup.iterate())
        return time.perf_counter() - started
    # The CLI runs from main() on: what it takes to get to `train` is no part of the loop.
    paths[name].train(shared, Trace())
    return time.perf_counter() - started - spent

for index in range(rounds + 1):
    for name, run in (("bare", bare), ("mlx", lambda: path("mlx")), ("mlx-lm", lambda: path("mlx-lm"))):
        seconds = run()
        if index:  # the first round compiles
            print("LOOP", name, seconds / steps, file=sys.stderr)
"""


def loop(steps: int, rounds: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOOP, str(steps), str(rounds), str(resources.cache())],
        env=environment("mlx", resources.cache()),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    seconds: dict[str, list[float]] = {}
    for line in done.stderr.splitlines():
        if line.startswith("LOOP"):
            _, name, value = line.split()
            seconds.setdefault(name, []).append(float(value))
    base = statistics.median(seconds["bare"])
    for name, values in seconds.items():
        print(
            f"training, {name:<7} {1000 * statistics.median(values):6.1f} ms a step, "
            f"{statistics.median(values) / base:.3f} x bare train()"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=15)
    parser.add_argument("--fresh-seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=30, help="of the loop benchmark")
    parser.add_argument("--rounds", type=int, default=3, help="of the loop benchmark")
    parser.add_argument("--only", choices=("matrix", "loop"))
    options = parser.parse_args()
    recipes.load("default")
    if options.only != "matrix":
        loop(options.steps, options.rounds)
    if options.only != "loop":
        with tempfile.TemporaryDirectory() as scratch:
            matrix(options.seeds, options.fresh_seeds, Path(scratch))


if __name__ == "__main__":
    main()
