"""A run: cells over probes, references and seeds, written as records while it goes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from parity import timing
from parity.capture.engine import Engine
from parity.cells.cell import Cell
from parity.cells.kept import run_kept
from parity.errors import UsageError
from parity.recipe import DEFAULT, Recipe
from parity.record import Record
from parity.stages import BY_NUMBER, find
from parity.stages.context import Stage

REFERENCES = ("mlx-lm", "hf")
SEEDS = (3407, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13)
"""Fifteen seeds in a fixed order; the first is the one people quote."""


@dataclass(frozen=True)
class Matrix:
    """What is to be run."""

    stages: tuple[Stage, ...]
    subject: str
    references: tuple[str, ...]
    seeds: tuple[int, ...]
    recipe: Recipe
    changes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    origin: str = DEFAULT

    def cells(self) -> list[Cell]:
        """Seed by seed, so that early answers come early."""
        return [
            Cell(
                stage,
                self.subject,
                reference,
                self.recipe.override({"seed.value": seed}),
                self.changes,
                self.origin,
            )
            for seed in self.seeds
            for stage in self.stages
            for reference in self.references
        ]


def parse_seeds(text: str) -> tuple[int, ...]:
    """`3` means the first three of `SEEDS`; `3407,0` names seeds, and so does `5,` with its comma.

    Raises:
        UsageError: Not numbers, none, the same one twice, or a single one that is no count.
    """
    try:
        numbers = [int(part) for part in text.removesuffix(",").split(",")]
    except ValueError:
        raise UsageError(
            f"--seeds {text!r}: give a count such as 3 or seeds such as 3407,0"
        ) from None
    if any(number < 0 or number >= 2**32 for number in numbers):
        raise UsageError(f"--seeds {text!r}: seeds lie between 0 and 2**32 - 1")
    if "," not in text:
        if 0 < numbers[0] <= len(SEEDS):
            return SEEDS[: numbers[0]]
        raise UsageError(
            f"--seeds {text}: a single number is a count, from 1 to {len(SEEDS)}; "
            f"for the seed {numbers[0]} write --seeds {numbers[0]},"
        )
    if len(set(numbers)) < len(numbers):
        raise UsageError(f"--seeds {text!r}: a seed stands twice")
    return tuple(numbers)


def parse_probes(names: Iterable[str]) -> tuple[Stage, ...]:
    """Stages by number or name in the order of their numbers; none given means all."""
    wanted = [find(part) for name in names for part in name.split(",")]
    if not wanted:
        return BY_NUMBER
    return tuple(sorted(dict.fromkeys(wanted), key=lambda stage: stage.number))


def default_folder() -> Path:
    """A new folder below reports/."""
    return Path("reports") / datetime.now().strftime("run-%Y%m%d-%H%M%S")


def sides(changes: Sequence[tuple[str, str]]) -> dict[str, dict[str, Any]]:
    """Groups `(side, "factor=value")` by side."""
    from parity.recipe import parse_setting

    grouped: dict[str, dict[str, Any]] = {}
    for side, text in changes:
        name, value = parse_setting(text)
        grouped.setdefault(side, {})[name] = value
    return grouped


def _timed_cell(engine: Engine, cell: Cell) -> Record:
    with timing.span(timing.COMPARE, f"{cell.stage.number:02d} {cell.id}"):
        return run_kept(engine, cell, repeat=True)


def run_matrix(
    matrix: Matrix,
    engine: Engine,
    folder: Path,
    jobs: int,
    done: Callable[[Record], None],
    finished: list[Record] | None = None,
) -> list[Record]:
    """Runs every cell; each record is on disk before the next is reported.

    Args:
        matrix: What to run.
        engine: Owns workers and cache.
        folder: Takes `records/`.
        jobs: Cells under way at once. Captures of one path queue at its one process.
        done: Called with each finished record.
        finished: Takes each finished record, for whoever stops the run.

    Returns:
        Records in the order of the cells.
    """
    cells = matrix.cells()
    pool = ThreadPoolExecutor(max_workers=jobs, thread_name_prefix="cell")
    try:
        futures = {
            pool.submit(_timed_cell, engine, cell): index for index, cell in enumerate(cells)
        }
        records: dict[int, Record] = {}
        for future in as_completed(futures):
            record = future.result()
            with timing.span(timing.WRITE, record.name):
                record.save(folder / "records")
            records[futures[future]] = record
            if finished is not None:
                finished.append(record)
            done(record)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return [records[index] for index in range(len(cells))]
