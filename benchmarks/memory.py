"""Memory of eight paths at once, against another commit: the greatest sum over all processes.

Each commit asks eight paths for an adapter at the same time. Memory that processes share counts once
(PSS), which Linux alone tells.

    python benchmarks/memory.py --before b9a0509
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from benchmarks.checkouts import before_and_now

PATHS = ("mlx", "mlx-lm", "hf", "trl", "unsloth", "mlx+loss=mlx-lm", "mlx+optimizer=mlx-lm",
         "mlx-lm+loss=mlx")  # fmt: skip

ASK = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from parity.capture.engine import Engine
from parity.paths.registry import knobs
from parity.recipe import Recipe
from parity.trace import Trace

cache, *paths = sys.argv[1:]
recipe = Recipe().with_knobs(knobs(paths))
with Engine(Path(cache)) as engine, ThreadPoolExecutor(len(paths)) as threads:
    list(threads.map(lambda path: engine.capture(path, "lora_init", recipe, Trace()), paths))
"""


def held(root: psutil.Process) -> int:
    """Bytes that a process and all below it hold."""
    total = 0
    for process in [root, *root.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            total += process.memory_full_info().pss
    return total


def peak(checkout: Path) -> tuple[int, int, float]:
    """The greatest sum of bytes, the most processes below it, and the seconds it took."""
    most, workers, started = 0, 0, time.perf_counter()
    with tempfile.TemporaryDirectory() as cache:
        env = {**os.environ, "PYTHONPATH": str(checkout), "PARITY_CACHE": cache}
        with subprocess.Popen(
            [sys.executable, "-c", ASK, cache, *PATHS], cwd=checkout, env=env
        ) as asking:
            root = psutil.Process(asking.pid)
            while asking.poll() is None:
                with contextlib.suppress(psutil.Error):
                    most, workers = (
                        max(most, held(root)),
                        max(workers, len(root.children(recursive=True))),
                    )
                time.sleep(0.2)
        if asking.returncode:
            sys.exit(f"{checkout}: ended with {asking.returncode}")
    return most, workers, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", required=True, metavar="REV", help="the commit to compare with")
    options = parser.parse_args()
    with before_and_now(options.before) as checkouts:
        found = {name: peak(checkout) for name, checkout in checkouts.items()}
    for name, (most, workers, seconds) in found.items():
        print(
            f"{name:<7} {most / 1e9:.2f} GB in at most {workers} processes at once, {seconds:.0f} s"
        )
    print(f"ratio: {found['before'][0] / found['now'][0]:.2f}")


if __name__ == "__main__":
    main()
