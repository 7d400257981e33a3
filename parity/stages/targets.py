"""Supervised targets of training rows: where two sides differ in them, in words and as patterns."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from parity.names import each
from parity.trace import Trace

SHOWN = 4  # targets that a sentence names

Target = tuple[int, int]
"""(index of a token in its row, id that is supervised there)."""


@dataclass(frozen=True)
class TrainingRow:
    """A training row: its ids, and the index of the first token that is to be learned."""

    ids: tuple[int, ...]
    start: int
    title: str


@dataclass
class TargetDifference:
    """What one side alone supervises in a row."""

    row: TrainingRow
    subject: set[Target] = field(default_factory=set)
    reference: set[Target] = field(default_factory=set)
    both: set[Target] = field(default_factory=set)
    mixed: bool = False
    """Equal rows are supervised in several ways, and not in the same several."""

    @property
    def count(self) -> int:
        """Targets that differ."""
        return len(self.subject) + len(self.reference) or int(self.mixed)


def sentence(differences: list[TargetDifference], pieces: Mapping[str, str]) -> str:
    """What each side alone supervises, the first few by token, id and text."""
    bad = [difference for difference in differences if difference.count]
    parts = []
    for side in ("subject", "reference"):
        alone = [(d.row, target) for d in bad for target in sorted(getattr(d, side))]
        if not alone:
            continue
        shown = [
            f"token {index} of {row.title} (id {token} {pieces.get(str(token), '')!r}, "
            f"{place(row, index)})"
            for row, (index, token) in alone[:SHOWN]
        ]
        more = f" and {len(alone) - SHOWN} more" if len(alone) > SHOWN else ""
        parts.append(f"the {side} alone supervises {', '.join(shown)}{more}")
    if not parts:
        return f"equal rows are supervised in several ways, first {bad[0].row.title}"
    return f"{'; '.join(parts)}; {len(bad)} of {len(differences)} rows differ"


def place(row: TrainingRow, index: int) -> str:
    """Where in its row a token stands."""
    length = len(row.ids)
    if index >= length:
        return "one past the end" if index == length else "padding"
    if index < row.start:
        return "in the prompt"
    return "the last token" if index == length - 1 else "inside"


def patterns(differences: Iterable[TargetDifference]) -> dict[str, float]:
    """Targets that the subject supervises more (+) or fewer (-), where all rows agree in it."""
    kinds: dict[str, list[int]] = defaultdict(list)
    explained: Counter[str] = Counter()
    prompts, total = [], 0
    for difference in differences:
        counts = Counter(_kinds(difference))
        total += difference.count
        row = difference.row
        whole = 1 in {index for index, _ in difference.subject | difference.reference}
        if row.start > 1 and whole and counts["at the start"]:
            explained["whose prompt is supervised"] += abs(counts["at the start"])
            prompts.append(int(np.sign(counts.pop("at the start"))))
        if difference.both:  # a row of nothing but prompt has no start and no end
            for kind in ("at the start", "at the last token", "past the end"):
                kinds[kind].append(counts[kind])
                explained[kind] += abs(counts[kind])
    facts = {
        f"positions per row {kind}": float(counts[0])
        for kind, counts in kinds.items()
        if counts[0] and len(set(counts)) == 1
    }
    if prompts and len(set(prompts)) == 1:
        facts["rows whose prompt is supervised"] = float(sum(prompts))
    # Whether that is all: targets that differ in another way.
    left = {f"left, {kind}": float(total - count) for kind, count in explained.items() if count}
    return facts | left


def _kinds(difference: TargetDifference) -> dict[str, int]:
    length, begin = len(difference.row.ids), min((i for i, _ in difference.both), default=0)
    counts: Counter[str] = Counter()
    for sign, targets in ((1, difference.subject), (-1, difference.reference)):
        for index, _ in targets:
            if index >= length:
                counts["past the end"] += sign
            elif index < begin:
                counts["at the start"] += sign
            elif index == length - 1:
                counts["at the last token"] += sign
    return counts


def rows_that_fill(differences: list[TargetDifference], subject: Trace, reference: Trace) -> float:
    """How many rows differ because they fill their batch on one side; 0 if any other differs.

    There the position past their end is missing: > 0 in the subject, < 0 in the reference. Where the
    mask is the same, a position that is not there has no padding to stand in.
    """
    bad = [d for d in differences if d.subject or d.reference]
    sides = {(bool(d.subject), bool(d.reference)) for d in bad}
    ends = all(i == len(d.row.ids) for d in bad for i, _ in d.subject | d.reference)
    if not ends or len(sides) != 1 or sides == {(True, True)}:
        return 0.0
    lacks = subject if sides == {(False, True)} else reference
    full = {tuple(row) for ids in each(lacks.arrays, "ids") for row in ids.tolist()}
    if any(d.row.ids not in full for d in bad):
        return 0.0
    return float(len(bad) if lacks is subject else -len(bad))
