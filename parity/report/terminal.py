"""The report in a terminal: readable in 80 columns, without colour and in plain ASCII."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from io import TextIOWrapper
from typing import TYPE_CHECKING

from parity.cells.plan import GridRow
from parity.report import labels
from parity.report.text import describe
from parity.results.aggregate import Aggregate
from parity.results.changes import FAILS, FIXED, STILL, Changes

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table
    from rich.text import Text

SHOWN = 3  # failures printed in full
ROWS = 20  # rows with a change
LINES = 40  # of a list
STYLES = {
    "identical": "green",
    "agree": "green",
    "diverge": "bold red",
    "expected": "yellow",
    "stale": "bold red",
    "inconclusive": "yellow",
    "error": "bold magenta",
    "skip": "dim",
    "missing": "bold yellow",
}
ASCII = {"≈": "~", "✗": "x", "x": "e", "–": "-", "·": "."}


def console() -> Console:
    """Standard output; colour only where it is a terminal and NO_COLOR is not set."""
    from rich.console import Console

    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # an ASCII terminal shows `?` for `·`
    return Console(highlight=False)


def render(result: Aggregate, console: Console) -> None:
    """Grid, steps, what differs as shipped, failures, and last the verdict with the exit code."""
    for model in dict.fromkeys(row.model for row in result.grid):
        _grid(result, model, console)
    if result.grid:
        console.print(_legend(console))
    _curves(result, console)
    _passes(result, console)
    for kind, title in (("shipped", "As shipped, the stacks differ:"), ("hint", "Hints:")):
        for pair, texts in labels.notes_by_pair(result, kind).items():
            _section(console, f"{title} {pair}", texts)
    for title, lines in labels.gaps(result).items():
        _section(console, f"{title}:", lines)
    failures = result.red()
    for record in result.failures(SHOWN):
        console.print()
        console.print(describe(record), markup=False, soft_wrap=True)
    if len(failures) > SHOWN:
        console.print(f"\nand {len(failures) - SHOWN} more, all of them in report.html")
    if result.changes:
        _changes(result.changes, console)
    _conclusion(result, console)


def _grid(result: Aggregate, model: str, console: Console) -> None:
    """One character a cell; tables are set one below the other where pairs do not fit."""
    from rich.text import Text

    rows = [row for row in result.grid if row.model == model]
    pairs = [*dict.fromkeys((row.subject, row.reference) for row in rows)]
    probes = [*dict.fromkeys((row.probe, row.stage) for row in sorted(rows, key=lambda r: r.probe))]
    room = console.width - max(len(row.title) for row in rows)
    n = len(result.seeds)
    spaced = 2 * n - 1 + 2 <= room // min(len(pairs), 2)
    width = 2 + max(
        2 * n - 1 if spaced else min(n, room - 2), *(len(" vs ".join(p)) for p in pairs)
    )
    at_once = max(1, room // width)
    console.print(Text(f"\n{model}", "bold") + Text(f" · {_seeds(result.seeds)}"))
    for start in range(0, len(pairs), at_once):
        chunk = pairs[start : start + at_once]
        table = _table("probe", *(" vs ".join(pair) for pair in chunk))
        for probe in probes:
            found = [GridRow(model, *pair, *probe) for pair in chunk]
            cells = [
                _cells([*result.states(r).values()], spaced, room - 2, console) if r in rows else ""
                for r in found
            ]
            table.add_row(found[0].title, *cells)
        console.print(table)


def _cells(states: Sequence[str], spaced: bool, room: int, console: Console) -> RenderableType:
    from rich.text import Text

    if len(states) > room:  # too many seeds for one character each
        counted = Counter(states).items()
        parts = [Text(f"{n}{_symbol(s, console)}", STYLES[s]) for s, n in counted]
        return Text(" ").join(parts)
    return Text(" " if spaced else "").join(Text(_symbol(s, console), STYLES[s]) for s in states)


def _symbol(name: str, console: Console) -> str:
    symbol = labels.SYMBOLS[name]
    return ASCII.get(symbol, symbol) if console.options.ascii_only else symbol


def _legend(console: Console) -> Text:
    from rich.text import Text

    parts = [Text(f"{_symbol(s, console)} {s}", STYLES[s]) for s in labels.SYMBOLS]
    return Text("  ").join(parts)


def _seeds(seeds: Sequence[int]) -> str:
    if len(seeds) > 20:
        return f"{len(seeds)} seeds from {seeds[0]} to {seeds[-1]}"
    return f"seed{'s, left to right' if len(seeds) > 1 else ''}: {' '.join(map(str, seeds))}"


def _curves(result: Aggregate, console: Console) -> None:
    pairs = dict.fromkeys(curve.row.pair for curve in result.curves)
    for pair in pairs:
        console.print(f"\nStep for step, {pair}", markup=False, style="bold")
        table = _table("", "greatest", "median", "allowed", "over (seeds)", "subject (seeds)")
        for curve in result.curves:
            if curve.row.pair == pair:
                table.add_row(*labels.curve_cells(curve))
        console.print(table)


def _passes(result: Aggregate, console: Console) -> None:
    """Pass rates with Wilson intervals; p is the exact paired one, corrected for all prompts."""
    from rich.text import Text

    for pair in dict.fromkeys(passes.row.pair for passes in result.passes):
        console.print(Text(f"\nGreedy decode, {pair}", "bold"))
        table = _table("after", "subject", "reference", "p", "what the seeds can show")
        for p in result.passes:
            if p.row.pair == pair:
                cells = (*labels.rates(p), labels.number(p.holm_p), labels.power_text(p))
                table.add_row(Text(p.prompt), *cells)
        console.print(table)


def _section(console: Console, head: str, lines: Sequence[str]) -> None:
    """A heading and wrapped lines below it."""
    from rich.padding import Padding
    from rich.text import Text

    console.print(Text(f"\n{head}", "bold"))
    for line in lines[:LINES]:
        console.print(Padding(Text(line), (0, 0, 0, 2), expand=False))
    if len(lines) > LINES:
        console.print(f"  and {len(lines) - LINES:,} more")


def _table(*heads: str) -> Table:
    from rich.table import Table

    table = Table(box=None, header_style="dim", pad_edge=False, padding=(0, 2, 0, 0))
    for head in heads:
        table.add_column(head)
    return table


def _changes(changes: Changes, console: Console) -> None:
    """What changed since an earlier run: each row with the number of its cells."""
    from rich.text import Text

    console.print(Text(f"\nSince the earlier run: {changes.sentence}", "bold"))
    for line in changes.versions:
        console.print(Text(f"  {line}"))
    kinds = [kind for kind in (FAILS, STILL, FIXED) if kind in changes.counts]
    if kinds:
        table = _table("", *kinds)
        worst = changes.rows.sort_values(kinds, ascending=False, kind="stable")
        worst = worst[worst[kinds].sum(axis=1) > 0]
        for cells in worst.head(ROWS).to_dict("records"):
            row = GridRow(*(cells[name] for name in GridRow._fields))
            numbers = (str(cells[kind] or "") for kind in kinds)
            table.add_row(Text(f"{row.title}, {row.pair}"), *numbers)
        console.print(table)
        if len(worst) > ROWS:
            console.print(f"and {len(worst) - ROWS} more rows")


def _conclusion(result: Aggregate, console: Console) -> None:
    from rich.text import Text

    console.print()
    for (name, title, reason), which in labels.firsts(result).items():
        console.print(Text(f"{name} first at probe {title}: {reason}", STYLES[name]))
        console.print(Text(f"  {labels.pairs_text(which, len(result.seeds))}"))
    if peaks := labels.memory_of_run(result):
        console.print(Text(f"peak memory of the processes: {peaks}", "dim"))
    line = f"PARITY {result.verdict} · {result.reason} · exit code {result.exit_code}"
    console.print(Text(line, STYLES[result.verdict]))
