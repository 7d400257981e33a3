"""The report as Markdown, for the summary of a GitHub job."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

from parity.cells.plan import GridRow
from parity.record import Record
from parity.report import labels
from parity.report.labels import SYMBOLS
from parity.report.text import describe
from parity.results.aggregate import Aggregate
from parity.results.cells import WORST_FIRST
from parity.results.changes import FAILS, KINDS, STILL, Changes
from parity.results.texts import distinct

LIMIT = 1_000_000  # bytes; GitHub cuts a step's summary at 1 MiB
SHARE = 0.6  # of what is left, for the failures in full: the tables after them are to fit, too
FAILURES = 500
SEEDS = 30
"""With more of them a row of the grid counts its cells by state."""
LINES = 200
"""Lines of a list; the rest is counted."""


def render(result: Aggregate, limit: int = LIMIT) -> str:
    """The whole report, the worst first; where it would be longer than `limit` bytes, cut, and it says so."""
    document = _Document(limit)
    document.section("", _head(result))
    if result.changes:
        document.section("### Since the earlier run", _changes(result.changes))
    gaps = labels.gaps(result)
    for title in labels.URGENT:
        if title in gaps:
            document.section(f"### {title}", _bullets(gaps[title]), len(gaps[title]))
    for pair, lines in _grids(result):
        document.section(f"### {escape(pair)}", lines)
    if result.grid:
        document.section("", ["", "<sub>" + ", ".join(f"{s} {name}" for name, s in SYMBOLS.items()) + "</sub>"])  # fmt: skip
    red = int((result.red()["position"] >= 0).sum())
    if red:
        failures = map(_failure, result.failures(FAILURES))
        document.section("### Failures", failures, red, SHARE)
    if result.curves:
        head = ["pair", "difference", "greatest", "median of seeds", "allowed there", "over", "sign over seeds"]  # fmt: skip
        rows = [[c.row.pair, *labels.curve_cells(c)] for c in result.curves]
        document.section("### Step for step", table(head, rows).splitlines())
    if result.passes:
        head = ["pair", "prompt", "subject", "reference", "paired over seeds"]
        rows = [
            [p.row.pair, p.prompt, *labels.rates(p), p.comparison.summary] for p in result.passes
        ]
        document.section("### Greedy decode", table(head, rows).splitlines())
    for kind, title in (
        ("shipped", "As shipped, the stacks differ"),
        ("finding", "Observed"),
        ("hint", "Hints"),
    ):
        for pair, texts in labels.notes_by_pair(result, kind).items():
            document.section(f"### {title}: {escape(pair)}", _bullets(texts), len(texts))
    for title, lines in gaps.items():
        if title not in labels.URGENT:
            document.section(f"### {title}", _bullets(lines), len(lines))
    return document.text()


class _Document:
    """Sections of lines, as many as fit."""

    def __init__(self, limit: int) -> None:
        self._left = limit - 2000  # for what is said of what was cut
        self._lines: list[str] = []
        self._cut: list[str] = []

    def section(
        self, title: str, lines: Iterable[str], number: int | None = None, share: float = 1.0
    ) -> None:
        """Adds a heading and lines while they fit.

        Args:
            title: Markdown; may be empty.
            lines: Some or all of them.
            number: Of all lines, where `lines` may be fewer: the others are counted.
            share: Of what is left that the section may take.
        """
        lines = iter(lines)
        left, shown, begun = share * self._left, 0, False
        for line in chain([title, ""] if title else [], lines):
            left -= len(line.encode()) + 1
            if left < 0:
                self._cut.append(re.sub(r"^#+ ", "", title))
                break
            self._left -= len(line.encode()) + 1
            self._lines.append(line)
            shown += begun or not title
            begun = begun or not line
        if number is not None and begun and shown < number:
            self._lines += ["", f"…and {number - shown:,} more: see report.html."]
        self._lines.append("")

    def text(self) -> str:
        """All of it, and last what was cut."""
        if self._cut:
            cut = list(dict.fromkeys(filter(None, self._cut)))
            names = ", ".join(cut[:10]) + f" and {len(cut) - 10} more" * (len(cut) > 10)
            self._lines.append(f"Cut short to fit into a job summary: {names[:1500]}.")
        return "\n".join(self._lines) + "\n"


def _head(result: Aggregate) -> Iterator[str]:
    of = len(result.seeds)
    yield f"## Parity: {SYMBOLS[result.verdict]} {result.verdict}"
    yield ""
    yield f"{result.reason[:1].upper()}{result.reason[1:]}."
    yield ""
    if peaks := labels.memory_of_run(result):
        yield f"Peak memory of the processes: {escape(peaks)}."
        yield ""
    for (name, title, reason), which in labels.firsts(result).items():
        yield f"- **{name}** first at probe {title}: **{escape(reason)}**  "
        yield f"  {escape(labels.pairs_text(which, of))}"
        for hint in distinct(hint for first in which for hint in first.hints):
            yield f"  <br>Hint: {escape(hint)}"


def _changes(changes: Changes) -> Iterator[str]:
    yield f"{changes.sentence[:1].upper()}{changes.sentence[1:]}."
    yield ""
    yield from (f"- {escape(line)}" for line in changes.versions[:LINES])
    yield ""
    shown = [kind for kind in KINDS if kind in changes.counts]
    worst = changes.rows.sort_values([FAILS, "failing", STILL], ascending=False, kind="stable")
    rows = [
        [f"{row.title}, {row.pair}", *(str(line[kind]) for kind in shown)]
        for line in worst.head(LINES).to_dict("records")
        for row in [GridRow(*(line[name] for name in GridRow._fields))]
    ]
    if rows:
        yield from table(["", *shown], rows).splitlines()
    if more := len(changes.rows) - len(rows):
        yield f"…and {more:,} more rows"


def _bullets(lines: Sequence[str]) -> Iterator[str]:
    return (f"- {escape(line)}" for line in lines[:LINES])


def _grids(result: Aggregate) -> Iterator[tuple[str, list[str]]]:
    """Pair to the lines of its table: pairs that fail first, and in each the rows that do."""
    green, worst = labels.pass_rates(result), result.rows["state"].cat.codes.tolist()
    pairs: dict[str, list[int]] = {}
    for number in sorted(range(len(result.grid)), key=lambda i: (worst[i], i)):
        pairs.setdefault(result.grid[number].pair, []).append(number)
    many = len(result.seeds) > SEEDS
    states = [name for name in WORST_FIRST if name in result.counts]
    head = ["probe", *(states if many else map(str, result.seeds)), "green of decided"]
    for pair, numbers in pairs.items():
        rows = []
        for number in numbers:
            row = result.grid[number]
            if many:
                cells = [str(result.rows.at[number, name] or "") for name in states]
            else:
                found = result.states(row)
                cells = [SYMBOLS[found[s]] if s in found else "" for s in result.seeds]
            rows.append([row.title, *cells, green[row]])
        yield pair, table(head, rows).splitlines()


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
