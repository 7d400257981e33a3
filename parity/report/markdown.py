"""The report as Markdown, for the summary of a GitHub job."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from parity.cells.plan import GridRow
from parity.record import Record
from parity.report import labels
from parity.report.labels import SYMBOLS
from parity.report.text import describe
from parity.results.aggregate import Aggregate
from parity.results.texts import distinct

LIMIT = 1_000_000  # bytes; GitHub cuts a step's summary at 1 MiB
FAILURES = 500


def render(result: Aggregate) -> str:
    """The whole report, cut short among the failures where it would not fit."""
    parts = [*_parts(result)]
    size = sum(len(part.encode()) for part in parts)
    failures = result.failures(FAILURES)
    if failures:
        parts.append("### Failures\n")
    shown = 0
    for record in failures:
        part = _failure(record)
        size += len(part.encode())
        if size > LIMIT:
            break
        parts.append(part)
        shown += 1
    if more := int((result.red()["position"] >= 0).sum()) - shown:
        parts.append(f"…and {more:,} more: see report.html.\n")
    return "\n".join(parts)


def _parts(result: Aggregate) -> Iterator[str]:
    of = len(result.seeds)
    yield f"## Parity: {SYMBOLS[result.verdict]} {result.verdict}\n"
    yield f"{result.reason[:1].upper()}{result.reason[1:]}.\n"
    if peaks := labels.memory_of_run(result):
        yield f"Peak memory of the processes: {escape(peaks)}.\n"
    for (name, title, reason), which in labels.firsts(result).items():
        yield f"- **{name}** first at probe {title}: **{escape(reason)}**  "
        yield f"  {escape(labels.pairs_text(which, of))}"
        for hint in distinct(hint for first in which for hint in first.hints):
            yield f"  <br>Hint: {escape(hint)}"
    yield ""
    green = labels.pass_rates(result)
    head = ["probe", *map(str, result.seeds), "green of decided"]
    for pair, rows in grids(result).items():
        yield f"### {escape(pair)}\n"
        yield table(head, [[row.title, *cells, green[row]] for row, cells in rows])
    if result.grid:
        yield "<sub>" + ", ".join(f"{s} {name}" for name, s in SYMBOLS.items()) + "</sub>\n"
    yield from _tables(result)
    for kind, title in (
        ("shipped", "As shipped, the stacks differ"),
        ("finding", "Observed"),
        ("hint", "Hints"),
    ):
        if found := labels.notes_by_pair(result, kind):
            yield f"### {title}\n"
            for pair, texts in found.items():
                yield f"{escape(pair)}\n\n" + "\n".join(f"- {escape(t)}" for t in texts[:40])
                yield f"- and {len(texts) - 40} more\n" if len(texts) > 40 else ""
    for title, lines in labels.gaps(result).items():
        yield f"### {title}\n\n" + "\n".join(f"- {escape(line)}" for line in lines[:200]) + "\n"


def grids(result: Aggregate) -> dict[str, list[tuple[GridRow, list[str]]]]:
    """Pair to its rows with a symbol for each seed."""
    found: dict[str, list[tuple[GridRow, list[str]]]] = {}
    for row in result.grid:
        symbols = [SYMBOLS[state] for state in result.states(row).values()]
        found.setdefault(row.pair, []).append((row, symbols))
    return found


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
        yield table(head, [[c.row.pair, *labels.curve_cells(c)] for c in result.curves])
    if result.passes:
        yield "### Greedy decode\n"
        head = ["pair", "prompt", "subject", "reference", "paired over seeds"]
        yield table(
            head,
            [[p.row.pair, p.prompt, *labels.rates(p), p.comparison.summary] for p in result.passes],
        )


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A pipe table; no cell can end early or start markup.

    Columns are not padded: a long reason in one row would make every row as long.
    """
    from tabulate import tabulate

    cells = [[escape(cell) for cell in row] for row in rows]
    heads = [escape(cell) for cell in head]
    text = tabulate(cells, heads, tablefmt="github", stralign=None, disable_numparse=True)
    return f"{text}\n"


def escape(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    for mark in "\\`*_[]|~":
        text = text.replace(mark, "\\" + mark)
    text = text.replace("<", "&lt;").replace(">", "&gt;")
    # Control characters: tabulate reads one of them as a row of dashes.
    return "".join(c for c in " ".join(text.split()) if c >= " ")


def _failure(record: Record) -> str:
    title, _, body = describe(record).partition("\n")
    runs = map(len, re.findall("~+", body))
    title, fence = title.replace("<", "&lt;"), "~" * max(8, *(n + 1 for n in runs), 0)
    details = f"{fence}text\n{body[:20_000]}\n{fence}"
    return f"<details><summary>{title}</summary>\n\n{details}\n</details>\n"
