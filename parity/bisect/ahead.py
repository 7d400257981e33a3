"""What a search will ask of the reference, captured beside it where a processor is idle."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from parity.capture.engine import Engine
from parity.cells.cell import Cell
from parity.cells.run import context_of, sources_of
from parity.errors import DiskFull
from parity.recipe import Recipe
from parity.stages.context import Context
from parity.stages.pair import Extent
from parity.trace import Trace

PATIENCE = 0.5  # seconds that a capture may take to its end, which is kept


class _Over(Exception):
    pass


@contextlib.contextmanager
def ahead(engine: Engine, cells: Iterable[Cell]) -> Iterator[None]:
    """Captures the reference's side of cells in their order, as long as the block lasts.

    A cause changes the subject, so that its captures cannot be known before. Each stage is run with the
    reference's traces on both sides; what it concludes is thrown away, and what fails is met again by
    the search.
    """
    if engine.jobs.busy < 2:
        yield
        return
    over = threading.Event()
    # A daemon, so that Ctrl-C need not wait for it.
    thread = threading.Thread(target=_run, args=(engine, list(cells), over), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(timeout=PATIENCE)
        if thread.is_alive() and thread.ident:
            engine.drop(thread.ident)
            thread.join()


def _run(engine: Engine, cells: Iterable[Cell], over: threading.Event) -> None:
    for cell in cells:
        try:
            cell.stage.run(_alone(context_of(engine, cell, sources_of(engine, cell)), over))
        except (_Over, DiskFull):  # the search meets it as well
            return
        except Exception:
            continue


def _alone(context: Context, over: threading.Event) -> Context:
    """The same, in which the reference answers for both sides, until it is over."""

    def capture(side: str, method: str, recipe: Recipe, inputs: Trace) -> Trace:
        if over.is_set():
            raise _Over
        if side == "subject":
            side, recipe = "reference", context.recipes["reference"]
        return context.capture(side, method, recipe, inputs)

    def both(method: str, recipes: Mapping[str, Recipe], inputs: Trace) -> tuple[Trace, Trace]:
        trace = capture("reference", method, recipes["reference"], inputs)
        return trace, trace

    return replace(context, capture=capture, both=both, extent=Extent.VERDICT)
