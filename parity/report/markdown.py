"""The report for a GitHub job summary, and the words that all reports share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from math import isnan

from parity.cells.plan import GridRow
from parity.record import Record
from parity.report.text import describe
from parity.results.aggregate import Aggregate, FirstFailure, Note, PassRates, state
from parity.results.series import Curve
from parity.results.statistics import wilson

LIMIT = 1_000_000  # bytes; GitHub cuts a step's summary at 1 MiB
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


def render(result: Aggregate) -> str:
    """The whole report, cut short among the failures where it would not fit."""
    parts = [*_parts(result)]
    size = sum(len(part.encode()) for part in parts)
    failures = result.failures()
    if failures:
        parts.append("### Failures\n")
    for index, record in enumerate(failures):
        part = _failure(record)
        size += len(part.encode())
        if size > LIMIT:
            parts.append(f"…and {len(failures) - index} more: see report.html.\n")
            break
        parts.append(part)
    return "\n".join(parts)


def number(value: float) -> str:
    """Three digits."""
    return f"{value:.3g}"


def seeds_said(seeds: Sequence[int], of: int) -> str:
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


def pairs_said(firsts: Sequence[FirstFailure], of: int) -> str:
    """`mlx vs mlx-lm · tiny-gemma3 (all 3 seeds), ...`."""
    return ", ".join(f"{f.row.pair} ({seeds_said(f.seeds, of)})" for f in firsts)


def sign_said(curve: Curve) -> str:
    """Which way the subject leans, over seeds."""
    if curve.largest == 0:
        return "equal"
    if not (curve.higher or curve.lower):
        return "–"
    text = f"{curve.higher} higher, {curve.lower} lower"
    return f"{text}; systematic (p = {curve.sign_p:.2g})" if curve.systematic else text


def over_said(curve: Curve) -> str:
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


def power_said(passes: PassRates) -> str:
    """What so many seeds could have shown, and how many could show more."""
    c = passes.comparison
    if c.discordance_upper is not None:
        return f"up to {100 * c.discordance_upper:.0f} % may differ"
    needed = c.seeds_needed or "over 10000"
    return f"{100 * c.power:.0f} % power; 80 % at {needed} seeds"


def pass_rates(result: Aggregate) -> dict[GridRow, str]:
    """Row to its green share of the decided seeds, with the Wilson interval."""
    rows = result.summary.to_dict("records")
    return {
        GridRow(*(row[name] for name in GridRow._fields)): _rate(
            row["identical"] + row["agree"] + row["stale"], row["decided"]
        )
        for row in rows
    }


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
            found.setdefault(note.row.pair, []).append(note_said(note, len(result.seeds)))
    return {pair: [*dict.fromkeys(texts)] for pair, texts in found.items()}


def note_said(note: Note, of: int) -> str:
    """The note, without what its heading says already, and its seeds."""
    text = note.text.removeprefix("as shipped: ").removeprefix("as shipped, ")
    varies = ", numbers of the first" if note.varies else ""
    return f"{text} ({seeds_said(note.seeds, of)}{varies})"


def _parts(result: Aggregate) -> Iterator[str]:
    of = len(result.seeds)
    yield f"## Parity: {SYMBOLS[result.verdict]} {result.verdict}\n"
    yield f"{result.reason[:1].upper()}{result.reason[1:]}.\n"
    for (name, title, reason), which in firsts(result).items():
        yield f"- **{name}** first at probe {title}: **{_plain(reason)}**  "
        yield f"  {_plain(pairs_said(which, of))}"
        for hint in dict.fromkeys(hint for first in which for hint in first.hints):
            yield f"  <br>Hint: {_plain(hint)}"
    yield ""
    green = pass_rates(result)
    head = ["probe", *map(str, result.seeds), "green of decided"]
    for pair, rows in grids(result).items():
        yield f"### {_plain(pair)}\n"
        yield table(head, [[row.title, *cells, green[row]] for row, cells in rows])
    if result.cells:
        yield "<sub>" + ", ".join(f"{s} {name}" for name, s in SYMBOLS.items()) + "</sub>\n"
    yield from _tables(result)
    for kind, title in (
        ("shipped", "As shipped, the stacks differ"),
        ("finding", "Observed"),
        ("hint", "Hints"),
    ):
        if found := notes_by_pair(result, kind):
            yield f"### {title}\n"
            for pair, texts in found.items():
                yield f"{_plain(pair)}\n\n" + "\n".join(f"- {_plain(t)}" for t in texts[:40])
                yield f"- and {len(texts) - 40} more\n" if len(texts) > 40 else ""
    for title, lines in gaps(result).items():
        yield f"### {title}\n\n" + "\n".join(f"- {_plain(line)}" for line in lines[:200]) + "\n"


def grids(result: Aggregate) -> dict[str, list[tuple[GridRow, list[str]]]]:
    """Pair to its rows with a symbol for each seed."""
    found: dict[str, list[tuple[GridRow, list[str]]]] = {}
    for row, by_seed in result.cells.items():
        symbols = [SYMBOLS[state(record)] for record in by_seed.values()]
        found.setdefault(row.pair, []).append((row, symbols))
    return found


def gaps(result: Aggregate) -> dict[str, list[str]]:
    """Heading to lines of what was not compared or not to be taken at face value."""
    of = len(result.seeds)
    titles = {
        "error": "In error",
        "missing": "Missing",
        "stale": "No longer diverges",
        "expected": "Expected to diverge",
        "skip": "Skipped",
    }
    found = {
        titles[name]: [
            f"{g.row.title}, {g.row.pair}, {seeds_said(g.seeds, of)}: {g.reason}" for g in which
        ]
        for name, which in result.gaps.items()
    }
    found["Mind"] = [*result.problems]
    return {title: lines for title, lines in found.items() if lines}


def _tables(result: Aggregate) -> Iterator[str]:
    if result.curves:
        yield "### Step for step\n"
        head = [
            "pair",
            "difference",
            "greatest",
            "median of seeds",
            "allowed there",
            "over",
            "sign over seeds",
        ]
        yield table(head, [[c.row.pair, *curve_cells(c)] for c in result.curves])
    if result.passes:
        yield "### Greedy decode\n"
        head = ["pair", "prompt", "subject", "reference", "paired over seeds"]
        yield table(
            head,
            [[p.row.pair, p.prompt, *rates(p), p.comparison.summary] for p in result.passes],
        )


def curve_cells(curve: Curve) -> list[str]:
    """A curve as the cells of a table."""
    nearest = f"{number(curve.nearest)} of {number(curve.tolerance)}"
    allowed = "–" if isnan(curve.tolerance) else nearest
    values = number(curve.largest), number(curve.median), allowed
    return [curve.quantity, *values, over_said(curve), sign_said(curve)]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A pipe table; what could end a cell or start markup is escaped."""

    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(map(_plain, cells)) + " |"

    return "\n".join([line(head), "|" + " --- |" * len(head), *map(line, rows)]) + "\n"


def _plain(text: str) -> str:
    """Text as it is: no markup, no new line."""
    for mark in "\\`*_[]|~":
        text = text.replace(mark, "\\" + mark)
    return " ".join(text.replace("<", "&lt;").replace(">", "&gt;").split())


def _failure(record: Record) -> str:
    title, _, body = describe(record).partition("\n")
    title, fence = title.replace("<", "&lt;"), "~" * 8
    details = f"{fence}text\n{body[:20_000]}\n{fence}"
    return f"<details><summary>{title}</summary>\n\n{details}\n</details>\n"
