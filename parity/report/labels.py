"""The texts that all reports share: symbols, seeds, rates, differences, and the lists of warnings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isnan

from parity.capture.machine import PEAK_MEMORY
from parity.cells.plan import GridRow
from parity.record import Record
from parity.results.aggregate import Aggregate, FirstFailure
from parity.results.details import Note, PassRates
from parity.results.series import Curve
from parity.results.statistics import wilson

SYMBOLS = {
    "identical": "=",
    "agree": "≈",
    "diverge": "✗",
    "expected": "x",
    "stale": "+",
    "inconclusive": "?",
    "error": "!",
    "skip": "–",
    "missing": "·",
}


def memory(record: Record) -> str:
    """`412 MB (mlx), 731 MB (hf)`: the peak of each side's processes; empty where none reported it."""
    sides = (record.subject, record.reference)
    found = {side.path: side.environment.get(PEAK_MEMORY) for side in sides}
    return _megabytes({path: peak for path, peak in found.items() if peak})


def memory_of_run(result: Aggregate) -> str:
    """The same over all records of a run."""
    return _megabytes(result.memory)


def _megabytes(peaks: Mapping[str, int]) -> str:
    return ", ".join(f"{peak / 1e6:,.0f} MB ({path})" for path, peak in peaks.items())


def number(value: float) -> str:
    """Three digits."""
    return f"{value:.3g}"


def seeds_text(seeds: Sequence[int], of: int) -> str:
    """`seed 3407`, `seeds 0, 1`, `both seeds`, `all 15 seeds` or `4 of 15 seeds`."""
    if len(seeds) == of > 1:
        return "both seeds" if of == 2 else f"all {of} seeds"
    if len(seeds) > 3:
        return f"{len(seeds)} of {of} seeds"
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def firsts(result: Aggregate) -> dict[tuple[str, str, str], list[FirstFailure]]:
    """(state, title of the probe, reason) to the pairs that go wrong there first."""
    found: dict[tuple[str, str, str], list[FirstFailure]] = {}
    for first in result.first:
        found.setdefault((first.state, first.row.title, first.reason), []).append(first)
    return found


def pairs_text(firsts: Sequence[FirstFailure], of: int) -> str:
    """`mlx vs mlx-lm · tiny-gemma3 (all 3 seeds), ...`."""
    return ", ".join(f"{f.row.pair} ({seeds_text(f.seeds, of)})" for f in firsts)


def sign_text(curve: Curve) -> str:
    """Which way the subject leans, over seeds."""
    if curve.largest == 0:
        return "equal"
    if not (curve.higher or curve.lower):
        return "–"
    text = f"{curve.higher} higher, {curve.lower} lower"
    return f"{text}; systematic (p = {curve.sign_p:.2g})" if curve.systematic else text


def first_step_over(curve: Curve) -> str:
    """First step over the tolerance and in how many seeds."""
    if isnan(curve.tolerance):
        return "not gated"
    if curve.first_step is None:
        return "none"
    return f"step {curve.first_step} ({len(curve.over)} of {len(curve.seeds)})"


def rates(passes: PassRates) -> tuple[str, str]:
    """Pass rate of subject and reference with their intervals."""
    c = passes.comparison
    return tuple(_rate(n, len(c.seeds)) for n in (c.a + c.b, c.a + c.c))  # type: ignore[return-value]


def power_text(passes: PassRates) -> str:
    """What so many seeds could have shown, and how many could show more."""
    c = passes.comparison
    if c.discordance_upper is not None:
        return f"up to {100 * c.discordance_upper:.0f} % may differ"
    needed = c.seeds_needed or "over 10000"
    return f"{100 * c.power:.0f} % power; 80 % at {needed} seeds"


def pass_rates(result: Aggregate) -> dict[GridRow, str]:
    """Row to its green share of the decided seeds, with the Wilson interval."""
    green = result.rows[["identical", "agree", "stale"]].sum(axis=1)
    counts = zip(result.grid, green, result.rows["decided"], strict=True)
    return {row: _rate(int(passed), int(decided)) for row, passed, decided in counts}


def _rate(passed: int, n: int) -> str:
    if n == 0:
        return "–"
    ci = wilson(passed, n)
    return f"{passed}/{n} ({100 * ci.low:.0f}–{100 * ci.high:.0f} %)"


def notes_by_pair(result: Aggregate, kind: str) -> dict[str, list[str]]:
    """Pair to what was noted of it, in the order of the probes, each text once."""
    found: dict[str, list[str]] = {}
    for note in result.notes:
        if note.kind == kind:
            found.setdefault(note.row.pair, []).append(note_text(note, len(result.seeds)))
    return {pair: [*dict.fromkeys(texts)] for pair, texts in found.items()}


def note_text(note: Note, of: int) -> str:
    """The note without the prefix that its heading repeats, and its seeds."""
    text = note.text.removeprefix("as shipped: ").removeprefix("as shipped, ")
    varies = ", numbers of the first" if note.varies else ""
    return f"{text} ({seeds_text(note.seeds, of)}{varies})"


URGENT = ("Damaged records", "In error", "Missing", "No longer diverges")
"""Headings of `gaps` that keep a run from being green."""


def gaps(result: Aggregate) -> dict[str, list[str]]:
    """Heading to lines: cells without a comparison, damaged records, and reasons to doubt a number."""
    of = len(result.seeds)
    titles = {
        "error": "In error",
        "missing": "Missing",
        "stale": "No longer diverges",
        "expected": "Expected to diverge",
        "skip": "Skipped",
    }
    found = {"Damaged records": [*result.damaged]}
    found |= {
        titles[name]: [
            f"{g.row.title}, {g.row.pair}, {seeds_text(g.seeds, of)}: {g.reason}" for g in which
        ]
        for name, which in result.gaps.items()
    }
    found["Warnings"] = [*result.problems]
    return {title: lines for title, lines in found.items() if lines}


def curve_cells(curve: Curve) -> list[str]:
    """A curve as the cells of a table."""
    nearest = f"{number(curve.nearest)} of {number(curve.tolerance)}"
    allowed = "–" if isnan(curve.tolerance) else nearest
    values = number(curve.largest), number(curve.median), allowed
    return [curve.quantity, *values, first_step_over(curve), sign_text(curve)]
