"""A sweep on a terminal: a line a cell, and the totals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from parity.sweep.answers import ABSENT, GREEN, RED, Cell
from parity.sweep.changes import Change
from parity.sweep.questions import QUESTIONS
from parity.sweep.run import Found

MARKS = {
    "identical": "=",
    "agree": "✓",
    "diverge": "✗",
    "error": "!",
    "inconclusive": "?",
    "not asked": "–",
    ABSENT: "·",
}
"""By verdict."""


def line(cell: Cell) -> str:
    """`llama 0.32.2  loads ✓  logits ✗ …`."""
    if cell.note:
        return f"{cell.architecture} {cell.release}: {cell.note}"
    shown = [
        f"{question} {MARKS[cell.verdict(question)]}" for question in QUESTIONS if cell.of(question)
    ]
    return f"{cell.architecture} {cell.release}: {'  '.join(shown)}"


def summary(found: Found, moves: Sequence[Change]) -> str:
    """Totals by column, and what changed between columns."""
    lines = []
    for column in found.columns:
        cells = [cell for (_, name), cell in found.cells.items() if name == column]
        counts: Counter[str] = Counter()
        for cell in cells:
            for question in QUESTIONS:
                verdict = cell.verdict(question)
                counts["green" if verdict in GREEN else "red" if verdict in RED else "other"] += 1
        why = f": {found.unavailable[column]}" if column in found.unavailable else ""
        lines.append(
            f"{column}: {len(cells)} architectures, {counts['green']} answers green, {counts['red']} red, "
            f"{counts['other']} not asked{why}"
        )
    without = sum(
        1
        for cell in found.cells.values()
        for answer in cell.answers
        if answer.red and not answer.causes
    )
    lines.append(f"red answers without a cause in words: {without}")
    lines += [change.sentence() for change in moves]
    return "\n".join(lines)
