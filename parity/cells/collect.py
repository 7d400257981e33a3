"""Bundles are made by running the stages themselves, so that nothing lists what a run asks.

For a reference every stage is run with the reference in the subject's place as well, once as if bits
had to be equal and once as if not, and all that could be measured around the reference is measured:
whatever the real subject will do, what the stage asks is there. A subject is run against its reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from parity.capture.bundle import Recorder
from parity.capture.engine import Engine, declared
from parity.cells.cell import Cell
from parity.cells.run import REFEREE, ROUNDS, context_of, run_cell, sources_of
from parity.errors import NO_ANSWER, CaptureError, MissingCapture
from parity.judge import noise
from parity.recipe import Recipe
from parity.stages.context import Context
from parity.stages.logits import Logits
from parity.stages.pair import ROUNDED, Pair
from parity.trace import Trace

Done = Callable[[], None]


@dataclass(frozen=True)
class Thorough(Context):
    """A context in which all that a pair can measure is asked for, whatever is compared."""

    def pair(self, method: str, inputs: Trace, changes: Mapping[str, Any] | None = None) -> Pair:
        """See `Context.pair`."""
        pair = super().pair(method, inputs, changes)
        for source in (
            noise.REFEREE,
            noise.PERTURBED,
            *[ROUNDED] * (not pair.rounded_is_reference),
        ):
            pair.measured(source)
        return pair


class _Shipped(dict[str, Recipe]):
    """The reference's shipped recipe on both sides; half precision on one shortens what both train."""

    def __init__(self, real: Mapping[str, Recipe], half: bool) -> None:
        super().__init__()
        self._real, self._half = real, half

    def __missing__(self, side: str) -> Recipe:
        recipe = self._real["reference"]
        half = {"model.dtype": "bfloat16"} if self._half and side == "subject" else {}
        return recipe.override(half)


def of_reference(engine: Engine, cells: Iterable[Cell], modules: bool, done: Done) -> Recorder:
    """All that runs of these cells ask of their reference, whatever the subject.

    Args:
        engine: Owns workers and cache.
        cells: Cells whose subject is their reference.
        modules: Collect the captures of modules as well.
        done: Called after each cell.
    """

    def collect(cell: Cell, recorder: Recorder) -> None:
        sources = sources_of(engine, cell)
        knobs = declared(cell.reference).knobs
        sources["reference"] = recorder.source(cell.reference, sources["reference"], knobs)
        sources["referee"] = recorder.source(REFEREE, sources["referee"])
        plain = context_of(engine, cell, sources)

        def both(method: str, recipes: Mapping[str, Recipe], inputs: Trace) -> tuple[Trace, Trace]:
            trace = plain.capture("reference", method, recipes["reference"], inputs)
            return trace, trace

        for exact in (True, False):
            context = Thorough(**{**vars(plain), "both": both})
            context = replace(
                context,
                frameworks={"subject": "" if not exact else plain.frameworks["reference"],
                            "reference": plain.frameworks["reference"]},
                shipped=_Shipped(plain.shipped, half=not exact),
            )  # fmt: skip
            try:
                cell.stage.run(context)
                if modules and isinstance(cell.stage, Logits):
                    inputs = cell.stage.inputs(context)
                    context.pair("logits", Trace(inputs.arrays, {"modules": True}))
            except (*NO_ANSWER, MissingCapture):
                continue  # the recorder has the reason

    return _of_one_environment(engine, list(cells), modules, collect, done)


def of_subject(engine: Engine, cells: Iterable[Cell], modules: bool, done: Done) -> Recorder:
    """All that these cells ask of their subject, the repeat of one that diverges included."""

    def collect(cell: Cell, recorder: Recorder) -> None:
        sources = sources_of(engine, cell)
        knobs = declared(cell.subject).knobs
        sources["subject"] = recorder.source(cell.subject, sources["subject"], knobs)
        run_cell(engine, cell, repeat=True, sources=sources)

    return _of_one_environment(engine, list(cells), modules, collect, done)


def _of_one_environment(
    engine: Engine,
    cells: list[Cell],
    modules: bool,
    collect: Callable[[Cell, Recorder], None],
    done: Done,
) -> Recorder:
    """Runs all cells again where captures of a path came from several environments.

    Raises:
        CaptureError: They still do.
    """
    for _ in range(ROUNDS):
        recorder = Recorder(modules)
        for cell in cells:
            collect(cell, recorder)
            done()
        if not recorder.mixed:
            return recorder
        for path in recorder.mixed:
            engine.renew(path)
    path, differing = next(iter(recorder.mixed.items()))
    raise CaptureError(f"captures of {path} come from several environments: {'; '.join(differing)}")
