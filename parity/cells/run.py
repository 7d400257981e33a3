"""Carrying out cells: captures of both sides, compared by a stage, become a record."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from parity import __version__
from parity.capture import machine
from parity.capture.bundle import is_bundle, opened
from parity.capture.checks import not_installed
from parity.capture.engine import AGAIN, Declared, Engine, Source, declared, shipped
from parity.capture.keys import git_state
from parity.cells.cell import Cell, reproduce
from parity.errors import NO_ANSWER, CaptureError, MissingCapture, UnmatchedNames, Unsupported
from parity.judge.hints import hints
from parity.paths.parts import origin
from parity.recipe import Recipe
from parity.record import Record, Side, Verdict, conclude, first_divergence
from parity.stages.context import Comparison, Context
from parity.stages.exchange import Exchange
from parity.stages.pair import Extent
from parity.trace import Trace

REFEREE = "hf"  # the path that runs in float64
ROUNDS = 3  # times that a cell is run for want of one environment


def run_cell(
    engine: Engine,
    cell: Cell,
    repeat: bool = False,
    sources: Mapping[str, Source] | None = None,
    extent: Extent = Extent.RECORD,
) -> Record:
    """Runs one cell; whatever goes wrong in it becomes its record.

    Where captures of one side came from several environments it is run again, with those of the
    present one alone.

    Args:
        engine: Owns workers and cache.
        cell: What is asked.
        repeat: Run the subject of a cell that diverges once more: what does not repeat itself is no
            evidence.
        sources: What answers captures, by side; see `sources_of`.
        extent: How much is asked.
    """
    sources, found = sources or sources_of(engine, cell), dict[str, str]()
    for _ in range(ROUNDS):
        record, mixed = _round(engine, cell, repeat, sources, extent)
        again = {side: spec_of(cell, side) for side in mixed}
        if not mixed or any(map(is_bundle, again.values())):
            break
        for side, spec in again.items():
            found[side] = (
                f"captures of the {side} came from two environments ({'; '.join(mixed[side])}): "
                "the cell was run again in the present one"
            )
            engine.renew(spec)
    if mixed:
        side, differing = next(iter(mixed.items()))
        reason = f"captures of the {side} come from several environments: {'; '.join(differing)}"
        changes = {"verdict": Verdict.ERROR, "reason": reason, "first_divergence": None}
        record = record.model_copy(update=changes)
    return record.model_copy(update={"findings": [*record.findings, *found.values()]})


def _round(
    engine: Engine, cell: Cell, repeat: bool, sources: Mapping[str, Source], extent: Extent
) -> tuple[Record, dict[str, list[str]]]:
    """The record of one run, and what differs between the environments of a side's captures."""
    started = time.perf_counter()
    result, verdict, reason, detail = Comparison(), None, "", ""
    mixed: dict[str, list[str]] = {}
    context = replace(context_of(engine, cell, sources, mixed), extent=extent)
    # What a path saved it may well read otherwise.
    itself = cell.subject == cell.reference and not isinstance(cell.stage, Exchange)
    if itself and not cell.changes:
        reason = "the subject is the reference: such a comparison cannot fail"
        verdict = Verdict.INCONCLUSIVE
    elif reason := next(filter(None, map(not_installed, (cell.subject, cell.reference))), ""):
        verdict = Verdict.SKIP
    else:
        try:
            result = cell.stage.run(context)
        except Unsupported as error:
            verdict, reason = Verdict.SKIP, str(error)
        except UnmatchedNames as error:
            verdict, reason = Verdict.DIVERGE, str(error)
        except MissingCapture as error:
            verdict, reason = Verdict.ERROR, str(error)
        except CaptureError as error:
            verdict, reason, detail = Verdict.ERROR, str(error), error.detail
        except Exception as error:  # one broken cell must not end the run
            reason = f"{type(error).__name__} while comparing: {error}"
            verdict, detail = Verdict.ERROR, traceback.format_exc()
    result.findings += context.notes
    if aside := context.operations_aside:
        result.findings.append(f"bits are not expected to be equal: {aside}")
    for side, other in (("subject", "reference"), ("reference", "subject")):
        made_of = context.environments.get(side, {})
        result.findings += origin(side, cell.stage.name, made_of, cell.names[other])
    reasons = dict.fromkeys(m.why_floor for m in result.metrics if m.why_floor)
    result.findings += [f"held to the noise floor and not to bits: {why}" for why in reasons]
    verdict, reason = (verdict, reason) if verdict else conclude(result.metrics)
    if verdict is Verdict.DIVERGE and repeat and result.metrics:
        verdict, reason = _repeated(cell, context, sources, result, reason)
    sides = {
        side: Side(
            path=name,
            recipe=context.recipes[side].factors(),
            digest=context.recipes[side].digest(),
            environment=context.environments.get(side, {}),
        )
        for side, name in cell.names.items()
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
    return record.model_copy(update={"hints": [*record.hints, *hints(record)]}), mixed


def _repeated(
    cell: Cell, context: Context, sources: Mapping[str, Source], result: Comparison, reason: str
) -> tuple[Verdict, str]:
    """The verdict after the subject was run once more (A/A); adds what it found."""

    def capture(side: str, method: str, recipe: Recipe, inputs: Trace) -> Trace:
        if side != "subject":
            return context.capture(side, method, recipe, inputs)
        return sources["subject"](method, recipe, inputs, AGAIN)

    def both(method: str, recipes: Mapping[str, Recipe], inputs: Trace) -> tuple[Trace, Trace]:
        return (
            capture("subject", method, recipes["subject"], inputs),
            capture("reference", method, recipes["reference"], inputs),
        )

    try:
        again = cell.stage.run(replace(context, capture=capture, both=both))
    except NO_ANSWER as error:
        return Verdict.INCONCLUSIVE, f"{reason}; a repeat of the subject failed: {error}"
    except MissingCapture as error:
        return Verdict.ERROR, f"{reason}; {error}"
    values, other = ([str((m.name, m.value)) for m in r.metrics] for r in (result, again))
    if conclude(again.metrics)[0].green:
        return (
            Verdict.INCONCLUSIVE,
            f"the subject does not repeat itself: once {reason}, and once it agrees",
        )
    if values != other:
        result.findings.append("a repeat of the subject gives other numbers, and diverges too")
    return Verdict.DIVERGE, reason


def spec_of(cell: Cell, side: str) -> str:
    """The path or bundle that answers a side; a bundle of the reference holds its referee."""
    if side == "referee":
        return cell.reference if is_bundle(cell.reference) else REFEREE
    return str(getattr(cell, side))


def sources_of(engine: Engine, cell: Cell) -> dict[str, Source]:
    """What answers captures of subject, reference and referee."""
    return {
        "subject": engine.source(cell.subject),
        "reference": engine.source(cell.reference),
        "referee": engine.source(spec_of(cell, "referee"), REFEREE),
    }


def context_of(
    engine: Engine,
    cell: Cell,
    sources: Mapping[str, Source] | None = None,
    mixed: dict[str, list[str]] | None = None,
) -> Context:
    """What the stage of a cell is given.

    Args:
        engine: Runs both sides at once.
        cell: What is asked.
        sources: What answers captures, by side; see `sources_of`.
        mixed: Takes what differs between the environments of one side's captures.
    """
    answers = sources or sources_of(engine, cell)
    recipes = {
        side: cell.recipe.override(cell.changes.get(side, {})) for side in ("subject", "reference")
    }
    environments: dict[str, dict[str, Any]] = {}
    files: dict[str, None] = {}
    sides = {side: declared(getattr(cell, side)) for side in recipes}
    double = referee_of(recipes["reference"])

    def note(side: str, trace: Trace) -> Trace:
        first = environments.setdefault(side, dict(trace.environment))
        if peak := trace.environment.get(machine.PEAK_MEMORY):
            first[machine.PEAK_MEMORY] = max(first.get(machine.PEAK_MEMORY, 0), peak)
        if mixed is not None and (found := machine.differences(first, trace.environment)):
            mixed.setdefault(side, found)
        files.setdefault(os.path.relpath(trace.file, engine.cache))
        return trace

    def capture(side: str, method: str, recipe: Recipe, inputs: Trace) -> Trace:
        return note(side, answers[side](method, recipe, inputs))

    def again(side: str, method: str, recipe: Recipe, inputs: Trace) -> Trace:
        return note(side, answers[side](method, recipe, inputs, AGAIN))

    def both(method: str, recipes: Mapping[str, Recipe], inputs: Trace) -> tuple[Trace, Trace]:
        subject, reference = engine.both(answers, method, recipes, inputs)
        return note("subject", subject), note("reference", reference)

    return Context(
        recipe=cell.recipe,
        recipes={**recipes, "referee": double},
        shipped=_Shipped(answers, cell.recipe),
        frameworks={side: path.framework for side, path in sides.items()},
        operations=_operations(cell, sides, answers),
        environments=environments,
        files=files,
        has_referee=recipes["reference"].model.dtype != "float64",
        rounded_is_reference=cell.names["reference"] == REFEREE,
        capture=capture,
        again=again,
        both=both,
        own_factors=tuple(f for path in sides.values() for f in path.own_factors),
    )


def _operations(
    cell: Cell, sides: Mapping[str, Declared], sources: Mapping[str, Source]
) -> dict[str, str]:
    """What each side computes otherwise than usual; captured elsewhere, where it was as well.

    Equal operations give equal bits on equal machines alone.
    """
    own = {side: path.operations.get(cell.stage.name, "") for side, path in sides.items()}
    bundled = any(is_bundle(getattr(cell, side)) for side in sides)
    if not bundled or len({path.framework for path in sides.values()}) > 1:
        return own
    found = []
    for side in sides:
        spec = getattr(cell, side)
        try:
            found.append(
                opened(spec).environment
                if is_bundle(spec)
                else sources[side]("defaults", cell.recipe, Trace()).environment
            )
        except NO_ANSWER:  # the stage will meet it, too
            return own
    if not (differ := machine.differences(found[1], found[0], common=True)):
        return own
    return {**own, "subject": f"the sides ran in two environments ({'; '.join(differ)})"}


def referee_of(recipe: Recipe) -> Recipe:
    """The same in float64, with the weights that a half-precision run computes with.

    Without gradient checkpointing, which changes no operation: what is computed again in a backward
    pass would be computed in float32.
    """
    half = recipe.model.dtype in ("bfloat16", "float16")
    double = {
        "model.dtype": "float64",
        "model.weights": recipe.model.dtype if half else recipe.model.weights,
        "train.gradient_checkpointing": False,
    }
    return recipe.override(double)


class _Shipped(dict[str, Recipe]):
    """Shipped recipes by side, made when first asked for: most stages never do."""

    def __init__(self, sources: Mapping[str, Source], recipe: Recipe) -> None:
        super().__init__()
        self._sources, self._recipe = sources, recipe

    def __missing__(self, side: str) -> Recipe:
        self[side] = shipped(self._sources[side], self._recipe)
        return self[side]
