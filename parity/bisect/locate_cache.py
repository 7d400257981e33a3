"""The first position of a conversation at which a KV cache gives other logits, over all its modes."""

from __future__ import annotations

import re

from parity.bisect.place import Place, differs
from parity.record import Record

PLACE = re.compile(r"turn (\d+), position (\d+)$")


def first_position(record: Record) -> Place:
    """The earliest of the places that the metrics of the stage name; empty if none does."""
    found = sorted(
        (int(match[2]), int(match[1]), index)
        for index, metric in enumerate(record.metrics)
        if metric.gate and differs(metric) and (match := PLACE.search(metric.where))
    )
    if not found:
        return Place()
    position, turn, index = found[0]
    first = record.metrics[index]
    others = [record.metrics[i].name for at, _, i in found[1:] if at == position]
    later = [
        f"{record.metrics[i].name} from position {at} on" for at, _, i in found if at > position
    ]
    sentence = f"first off at turn {turn}, position {position}: {', '.join([first.name, *others])}"
    if first.note:
        sentence += f" ({first.note})"
    if later:
        sentence += f"; later: {', '.join(later)}"
    return Place(sentence, f"turn {turn}, position {position}", "cache")
