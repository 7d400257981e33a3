"""A run that captures everything, against another commit, in the same run.

Each commit runs on an empty cache with the compiled kernels, and they take turns. What frameworks took is
the sum of what each capture says of itself; the run's wall time times the processors is to be little more.

    python benchmarks/cold.py --before b9a0509 -- --seeds 1
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.cached import records, same_verdicts, timed, with_kernels
from benchmarks.checkouts import before_and_now
from parity.capture.capacity import cores
from parity.trace import Trace


class Cold(NamedTuple):
    """How one run went, in seconds."""

    wall: float
    frameworks: float
    captures: int

    @property
    def ratio(self) -> float:
        """Wall time of all processors for a second inside a framework."""
        return self.wall * cores() / self.frameworks


def run(checkout: Path, arguments: list[str], scratch: Path) -> Cold:
    """One run of a checkout on an empty cache."""
    cache = scratch / "cache"
    wall = timed(checkout, arguments, scratch / "out", with_kernels(cache))
    files = [*(cache / "captures").rglob("*.safetensors")]
    seconds = sum(Trace.load(file).environment["seconds"] for file in files)
    return Cold(wall, seconds, len(files))


def compare(checkouts: dict[str, Path], rounds: int, arguments: list[str]) -> None:
    found: dict[str, list[Cold]] = {name: [] for name in checkouts}
    made: dict[str, dict[str, Any]] = {}
    for _ in range(rounds):
        for name, checkout in checkouts.items():
            with tempfile.TemporaryDirectory() as scratch:
                found[name].append(once := run(checkout, arguments, Path(scratch)))
                made[name] = records(Path(scratch) / "out")
            print(
                f"{name:<7} {once.wall:6.1f} s of wall, {once.frameworks:6.1f} s in frameworks "
                f"({once.captures} captures): {once.ratio:.2f}",
                flush=True,
            )
    print(same_verdicts(made["before"], made["now"]))
    for what in ("wall", "frameworks", "captures"):
        first, second = (
            statistics.median(getattr(once, what) for once in found[name])
            for name in ("before", "now")
        )
        print(f"{what}: {first:.1f} before, {second:.1f} now, ratio {first / second:.2f}")
    ratios = [once.ratio for once in found["now"]]
    print(f"wall x {cores()} processors / seconds in frameworks: {statistics.median(ratios):.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", required=True, metavar="REV", help="the commit to compare with")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("arguments", nargs="*", help="of `parity run`, after --")
    options = parser.parse_args()
    with before_and_now(options.before) as checkouts:
        compare(checkouts, options.rounds, options.arguments)


if __name__ == "__main__":
    main()
