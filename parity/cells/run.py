"""Carrying out cells: captures of both sides, compared by a stage, become a record."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

from parity import __version__
from parity.capture.engine import Engine
from parity.capture.keys import git_state
from parity.cells.cell import Cell, reproduce
from parity.cells.matrix import Matrix
from parity.errors import CaptureError, UnmatchedNames, Unsupported
from parity.judge.hints import hints
from parity.paths.registry import resolve
from parity.recipe import Recipe
from parity.record import Record, Side, Verdict, conclude, first_divergence
from parity.stages.context import Comparison, Context
from parity.trace import Trace

REFEREE = "hf"  # the path that runs in float64


def run_cell(engine: Engine, cell: Cell, repeat: bool = False) -> Record:
    """Runs one cell; whatever goes wrong in it becomes its record.

    Args:
        engine: Owns workers and cache.
        cell: What is asked.
        repeat: Run the subject of a cell that diverges once more: what does not repeat itself is no
            evidence.
    """
    started = time.perf_counter()
    result, verdict, reason, detail = Comparison(), None, "", ""
    context = context_of(engine, cell)
    if cell.subject == cell.reference and not cell.changes:
        reason = "the subject is the reference: such a comparison cannot fail"
        verdict = Verdict.INCONCLUSIVE
    else:
        try:
            result = cell.stage.run(context)
        except Unsupported as error:
            verdict, reason = Verdict.SKIP, str(error)
        except UnmatchedNames as error:
            verdict, reason = Verdict.DIVERGE, str(error)
        except CaptureError as error:
            verdict, reason, detail = Verdict.ERROR, str(error), error.detail
        except Exception as error:  # one broken cell must not end the run
            reason = f"{type(error).__name__} while comparing: {error}"
            verdict, detail = Verdict.ERROR, traceback.format_exc()
    if aside := context.operations_aside:
        result.findings.append(f"bits are not expected to be equal: {aside}")
    verdict, reason = (verdict, reason) if verdict else conclude(result.metrics)
    if verdict is Verdict.DIVERGE and repeat and result.metrics:
        verdict, reason = _repeated(engine, cell, context, result, reason)
    sides = {
        side: Side(
            path=getattr(cell, side),
            recipe=context.recipes[side].factors(),
            digest=context.recipes[side].digest(),
            environment=context.environments.get(side, {}),
        )
        for side in ("subject", "reference")
    }
    record = Record(
        tool=__version__,
        probe=cell.stage.number,
        stage=cell.stage.name,
        model=cell.model,
        seed=cell.recipe.seed.value,
        expectation="identical" if context.exact else "noise floor",
        verdict=verdict,
        reason=reason,
        metrics=result.metrics,
        findings=result.findings,
        hints=result.hints,
        series=result.series,
        passes=result.passes,
        facts=result.facts,
        first_divergence=first_divergence(result.metrics) if verdict is Verdict.DIVERGE else None,
        detail=detail,
        artifacts=list(context.files) if verdict is Verdict.DIVERGE else [],
        seconds=time.perf_counter() - started,
        git=git_state(),
        reproduce=reproduce(cell),
        **sides,
    )
    return record.model_copy(update={"hints": [*record.hints, *hints(record)]})


def _repeated(
    engine: Engine, cell: Cell, context: Context, result: Comparison, reason: str
) -> tuple[Verdict, str]:
    """The verdict after the subject was run once more (A/A); adds what it found."""

    def capture(side: str, method: str, recipe: Recipe, inputs: Trace) -> Trace:
        if side != "subject":
            return context.capture(side, method, recipe, inputs)
        return engine.capture(cell.subject, method, recipe, inputs, "-again")

    def both(method: str, recipes: Mapping[str, Recipe], inputs: Trace) -> tuple[Trace, Trace]:
        return (
            capture("subject", method, recipes["subject"], inputs),
            capture("reference", method, recipes["reference"], inputs),
        )

    try:
        again = cell.stage.run(replace(context, capture=capture, both=both))
    except (Unsupported, UnmatchedNames, CaptureError) as error:
        return Verdict.INCONCLUSIVE, f"{reason}; a repeat of the subject failed: {error}"
    values, other = ([str((m.name, m.value)) for m in r.metrics] for r in (result, again))
    if conclude(again.metrics)[0].green:
        return (
            Verdict.INCONCLUSIVE,
            f"the subject does not repeat itself: once {reason}, and once it agrees",
        )
    if values != other:
        result.findings.append("a repeat of the subject gives other numbers, and diverges too")
    return Verdict.DIVERGE, reason


def context_of(engine: Engine, cell: Cell) -> Context:
    """What the stage of a cell is given."""
    recipes = {
        side: cell.recipe.override(cell.changes.get(side, {})) for side in ("subject", "reference")
    }
    environments: dict[str, dict[str, Any]] = {}
    files: dict[str, None] = {}
    specs = {"subject": cell.subject, "reference": cell.reference, "referee": REFEREE}
    kinds = {side: resolve(specs[side]) for side in recipes}
    double = referee_of(recipes["reference"])

    def note(side: str, trace: Trace) -> Trace:
        environments.setdefault(side, dict(trace.environment))
        files.setdefault(os.path.relpath(trace.file, engine.cache))
        return trace

    def capture(side: str, method: str, recipe: Recipe, inputs: Trace) -> Trace:
        return note(side, engine.capture(specs[side], method, recipe, inputs))

    def both(method: str, recipes: Mapping[str, Recipe], inputs: Trace) -> tuple[Trace, Trace]:
        subject, reference = engine.both(specs, method, recipes, inputs)
        return note("subject", subject), note("reference", reference)

    return Context(
        recipe=cell.recipe,
        recipes={**recipes, "referee": double},
        shipped=_Shipped(engine, specs, cell.recipe),
        frameworks={side: kind.framework for side, kind in kinds.items()},
        operations={s: kind.operations.get(cell.stage.name, "") for s, kind in kinds.items()},
        environments=environments,
        files=files,
        has_referee=double != recipes["reference"],
        capture=capture,
        both=both,
    )


def referee_of(recipe: Recipe) -> Recipe:
    """The same in float64, with the weights that a half-precision run computes with."""
    half = recipe.model.dtype in ("bfloat16", "float16")
    weights = recipe.model.dtype if half else recipe.model.weights
    return recipe.override({"model.dtype": "float64", "model.weights": weights})


class _Shipped(dict[str, Recipe]):
    """Shipped recipes by side, made when first asked for: most stages never do."""

    def __init__(self, engine: Engine, specs: Mapping[str, str], recipe: Recipe) -> None:
        super().__init__()
        self._engine, self._specs, self._recipe = engine, specs, recipe

    def __missing__(self, side: str) -> Recipe:
        self[side] = self._engine.shipped(self._specs[side], self._recipe)
        return self[side]


def run_matrix(
    matrix: Matrix,
    engine: Engine,
    folder: Path,
    jobs: int,
    done: Callable[[Record], None],
) -> list[Record]:
    """Runs every cell; each record is on disk before the next is reported.

    Args:
        matrix: What to run.
        engine: Owns workers and cache.
        folder: Takes `records/`.
        jobs: Cells under way at once. Captures of one path queue at its one process.
        done: Called with each finished record.

    Returns:
        Records in the order of the cells.
    """
    cells = matrix.cells()
    pool = ThreadPoolExecutor(max_workers=jobs, thread_name_prefix="cell")
    try:
        futures = {
            pool.submit(run_cell, engine, cell, True): index for index, cell in enumerate(cells)
        }
        records: dict[int, Record] = {}
        for future in as_completed(futures):
            record = future.result()
            record.save(folder / "records")
            records[futures[future]] = record
            done(record)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return [records[index] for index in range(len(cells))]
