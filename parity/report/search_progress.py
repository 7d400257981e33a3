"""The progress of a search on stderr: redrawn in place on a terminal, else line by line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

import click

if TYPE_CHECKING:
    from parity.bisect.search import CheckResult

STYLES = {"✗": "bold red", "✓": "green", "?": "yellow"}
OUTCOMES = {"like the low end": "✓", "like the high end": "✗"}


class Display(Protocol):
    """Shows the progress of a search."""

    def watch(self, what: str, done: int, left: int) -> None:
        """A run begins: what is known so far and what it checks, finished runs, runs left."""

    def notice(self, text: str) -> None:
        """A stage is finished."""

    def progress(self, candidate: str, answer: CheckResult, left: int) -> None:
        """A release or commit was checked."""


class Lines:
    """One line for each event."""

    def watch(self, what: str, done: int, left: int) -> None:
        """See `Display.watch`."""
        click.echo(f"  run {done + 1}, about {left} left  {what}", err=True)

    def notice(self, text: str) -> None:
        """See `Display.notice`."""
        click.echo(text, err=True)

    def progress(self, candidate: str, answer: CheckResult, left: int) -> None:
        """See `Display.progress`."""
        click.echo(f"  {candidate}: {answer.outcome}, {answer.reason}, about {left} left", err=True)


class Screen:
    """A bar of the runs, a strip of the outcomes so far, and the present run, redrawn in place."""

    def __init__(self, live: Any) -> None:
        self._live = live
        self._strip = ""

    def watch(self, what: str, done: int, left: int) -> None:
        """See `Display.watch`."""
        strip, _, rest = what.partition("… ")
        self._draw(strip, rest, done, left)

    def notice(self, text: str) -> None:
        """See `Display.notice`."""
        from rich.text import Text

        self._live.console.print(text, markup=False)
        self._live.update(Text("searching …", style="dim"), refresh=True)

    def progress(self, candidate: str, answer: CheckResult, left: int) -> None:
        """See `Display.progress`."""
        self._strip += OUTCOMES.get(answer.outcome, "?")
        self._draw(self._strip, f"{candidate}: {answer.reason}", len(self._strip), left)

    def _draw(self, strip: str, what: str, done: int, left: int) -> None:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        known = Text()
        for mark in strip:
            known.append(mark, STYLES[mark])
        line = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=max(done + left, 1), completed=done, width=24)
        line.add_row(bar, f"run {done + 1}, about {left} left", known)
        self._live.update(Group(line, Text(what, overflow="ellipsis", no_wrap=True)), refresh=True)


@contextlib.contextmanager
def shown() -> Iterator[Display]:
    """A display that fits stderr."""
    from rich.console import Console
    from rich.live import Live

    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield Lines()
        return
    with Live(console=console, transient=True, auto_refresh=False) as live:
        yield Screen(live)
