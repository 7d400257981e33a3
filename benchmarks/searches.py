"""Searches over planted faults, against another commit, as ratios in the same run.

Each search runs as `parity bisect` in a process of its own, on an empty cache with the compiled
kernels; the two commits take turns. Their causes must be equal. Beside the whole search stands when its
first cause was told, which a commit that tells none before its end does there.

    python benchmarks/searches.py --before b9a0509
    python benchmarks/searches.py --before main~20 temperature_0 longer_rate_0 tests.planted_paths:LazyLoop
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.checkouts import before_and_now
from benchmarks.planted.registry import Planted, everything
from parity import resources

PARTS = ("temperature_0", "longer_rate_0", "rank_halved", "hidden_clip_0", "accumulation_ignored")
FACTORS = ("lora.num_layers=16", "optim.bias_correction=false", "mask.end_shift=0",
           "train.accumulation=2", "optim.eps=0.0001")  # fmt: skip


class Search(NamedTuple):
    """How one search went."""

    seconds: float
    told: float
    """Seconds after which the first cause was told."""
    cpu: float
    causes: Any


def command(what: str, faults: dict[str, Planted]) -> list[str]:
    """The words of `parity bisect` for a fault by name, a path, or a factor changed in the subject."""
    if "=" in what:
        return ["--subject", "mlx", "--set-subject", what]
    if ":" in what:
        return ["--subject", what]
    fault = faults[what]
    recipe = {"model.source": fault.model, **fault.recipe}
    words = [f"--set={name}={json.dumps(value)}" for name, value in recipe.items()]
    return ["--subject", fault.spec, *words]


def searched(checkout: Path, words: list[str], scratch: Path) -> Search:
    """Runs one search of a checkout on an empty cache."""
    cache, out = scratch / "cache", scratch / "out"
    # What is compiled belongs to a cache: a link to another folder would not.
    kernels = resources.cache() / "kernels"
    shutil.copytree(kernels, cache / "kernels", ignore=shutil.ignore_patterns("tmp*"))
    env = {**os.environ, "PYTHONPATH": str(checkout), "PARITY_CACHE": str(cache)}
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    told, lines = 0.0, []
    with subprocess.Popen(
        [sys.executable, "-m", "parity.cli", "bisect", "--reference", "mlx-lm", *words,
         "--set", "train.steps=6", "--out", str(out)],
        cwd=checkout, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        for line in process.stderr or ():
            lines.append(line)
            if line.startswith("found: ") and not told:
                told = time.perf_counter() - started
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode not in (0, 1):
        sys.exit("".join(lines))
    found = json.loads(next(out.glob("*.json")).read_text())
    causes = [(c["stage"], c["parts"], sorted(c["factors"])) for c in found["causes"]]
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Search(seconds, told or seconds, cpu, causes)


def compare(checkouts: dict[str, Path], wanted: list[str]) -> None:
    """Prints a line a search, and the median ratio."""
    faults = {fault.name: fault for fault in everything()}
    ratios, told = [], []
    for what in wanted:
        found = {}
        for name, checkout in checkouts.items():
            with tempfile.TemporaryDirectory() as scratch:
                found[name] = searched(checkout, command(what, faults), Path(scratch))
        before, now = found["before"], found["now"]
        ratios.append(before.seconds / now.seconds)
        told.append(before.told / now.told)
        same = "same causes" if before.causes == now.causes else f"{before.causes} != {now.causes}"
        print(f"{what:<28} {before.seconds:5.1f} s, now {now.seconds:5.1f} s: {ratios[-1]:.1f}; "
              f"told after {before.told:.1f} s, now {now.told:.1f} s: {told[-1]:.1f}; "
              f"CPU {before.cpu:.1f} s, now {now.cpu:.1f} s: {before.cpu / now.cpu:.1f}; {same}",
              flush=True)  # fmt: skip
    print(f"median ratio {statistics.median(ratios):.1f}, until told {statistics.median(told):.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", required=True, metavar="REV", help="the commit to compare with")
    parser.add_argument(
        "searches", nargs="*", help="planted faults by name, MODULE:PATH or FACTOR=VALUE"
    )
    options = parser.parse_args()
    with before_and_now(options.before) as checkouts:
        compare(checkouts, options.searches or [*PARTS, *FACTORS])


if __name__ == "__main__":
    main()
