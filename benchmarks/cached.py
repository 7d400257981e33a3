"""A run whose captures are all cached, against another commit, as a ratio in the same run.

Each commit has a cache of its own, with the compiled kernels, and first makes its captures; then they take
turns. No worker may start, and what both report must have equal verdicts.

    python benchmarks/cached.py --before main~20
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.checkouts import before_and_now
from parity import resources


def timed(
    checkout: Path, arguments: list[str], out: Path, variables: Mapping[str, str] | None = None
) -> float:
    """Seconds of one `parity run` of a checkout as a whole process, with more variables."""
    env = {**os.environ, **(variables or {}), "PYTHONPATH": str(checkout)}
    env.pop("PYTHONDONTWRITEBYTECODE", None)  # as for a user, nothing is compiled twice
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "parity.cli", "run", *arguments, "--out", str(out)],
        cwd=checkout,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode not in (0, 1):
        sys.exit(done.stdout + done.stderr)
    return time.perf_counter() - started


def records(out: Path) -> dict[str, Any]:
    """The records of a run, by the names of their files."""
    files = sorted((out / "records").glob("*.json"))
    return {file.name: json.loads(file.read_text()) for file in files}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", required=True, metavar="REV", help="the commit to compare with")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("arguments", nargs="*", help="of `parity run`, after --")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, before_and_now(options.before) as checkouts:
        compare(checkouts, options.rounds, options.arguments, scratch)


def with_kernels(cache: Path) -> dict[str, str]:
    """Variables for a cache that holds the compiled kernels and nothing else."""
    ignored = shutil.ignore_patterns("tmp*")
    shutil.copytree(resources.cache() / "kernels", cache / "kernels", ignore=ignored)
    return {"PARITY_CACHE": str(cache)}


def same_verdicts(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """How many records both made, and which of them have another verdict."""
    shared = sorted(before.keys() & now.keys())
    changed = [file for file in shared if before[file]["verdict"] != now[file]["verdict"]]
    return f"{len(shared)} records of both, verdicts that differ: {', '.join(changed) or 'none'}"


def compare(checkouts: dict[str, Path], rounds: int, arguments: list[str], scratch: str) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in checkouts}
    caches = {name: with_kernels(Path(scratch) / "caches" / name) for name in checkouts}
    for index in range(rounds + 1):
        for name, checkout in checkouts.items():
            out = Path(scratch) / f"{name}-{index}"
            took = timed(checkout, arguments, out, caches[name])
            if not index:
                print(f"{name}: making what is not cached: {took:.1f} s", flush=True)
                continue
            seconds[name].append(took)
            if any((out / "logs").glob("*")):
                sys.exit(f"{name}: a worker was started: {[*(out / 'logs').glob('*')]}")
    found = {name: records(Path(scratch) / f"{name}-{rounds}") for name in checkouts}
    print(same_verdicts(found["before"], found["now"]))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, values in seconds.items():
        print(f"{name:<7} {medians[name]:5.1f} s  ({', '.join(f'{v:.1f}' for v in values)})")
    print(f"ratio: {medians['before'] / medians['now']:.1f}")


if __name__ == "__main__":
    main()
