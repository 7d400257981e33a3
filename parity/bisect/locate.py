"""The place inside a stage: the first bad module, forward or backward, or training step."""

from __future__ import annotations

from parity.bisect.locate_backward import backward
from parity.bisect.locate_cache import first_position
from parity.bisect.locate_forward import forward
from parity.bisect.locate_step import step
from parity.bisect.packing import packed_otherwise
from parity.bisect.place import Place
from parity.capture.engine import Engine
from parity.cells.cell import Cell
from parity.cells.run import context_of
from parity.errors import NO_ANSWER
from parity.record import Record


def locate(engine: Engine, cell: Cell, record: Record, packed_alike: bool = False) -> Place:
    """Names the place; empty where the stage has none to name.

    Args:
        engine: Runs both sides.
        cell: What diverges.
        record: Of it.
        packed_alike: Whether both sides are known to pack the same modules.
    """
    context = context_of(engine, cell)
    try:
        if cell.stage.name == "logits":
            place = forward(context)
            return place if packed_alike else packed_otherwise(context, place)
        if cell.stage.name == "gradient":
            return backward(context, record)
        if cell.stage.name == "kv_cache":
            return first_position(record)
        if cell.stage.name == "loss_curve":
            return step(context)
    except (*NO_ANSWER, KeyError) as error:
        return Place(f"the place could not be named: {error}")
    return Place()
