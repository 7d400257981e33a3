"""The progress of a run, on stderr."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from parity.record import Record, Verdict

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_STYLES = {
    Verdict.IDENTICAL: "green",
    Verdict.AGREE: "green",
    Verdict.DIVERGE: "bold red",
    Verdict.INCONCLUSIVE: "yellow",
    Verdict.ERROR: "bold magenta",
    Verdict.SKIP: "dim",
}


@contextlib.contextmanager
def shown(total: int) -> Iterator[tuple[Callable[[Record], None], Callable[[str], None]]]:
    """A bar with what is running now, and a line for each record that is not green.

    Yields:
        A function to call with each finished record, and one to call with what starts.
    """
    with _bar(total) as (progress, task):
        console = progress.console

        def done(record: Record) -> None:
            progress.advance(task)
            # Without a terminal there is no bar: each cell then gets a line.
            if record.verdict.green and console.is_terminal:
                return
            pair = f"{record.subject.path} vs {record.reference.path}"
            style = _STYLES[record.verdict]
            progress.console.print(
                f"[{style}]{record.verdict:<12}[/] {record.probe:02d} {record.stage:<20} {pair:<16} "
                f"seed {record.seed:<6} {record.seconds:5.1f} s"
                + ("" if record.verdict.green else f"  {_escape(record.reason)}"),
                soft_wrap=True,
            )

        def notice(sentence: str) -> None:
            progress.update(task, description=_escape(sentence))

        yield done, notice


@contextlib.contextmanager
def counted(total: int) -> Iterator[tuple[Callable[[], None], Callable[[str], None]]]:
    """A bar alone.

    Yields:
        A function for what is finished and one for what starts.
    """
    with _bar(total) as (progress, task):
        yield (
            lambda: progress.advance(task),
            lambda sentence: progress.update(task, description=_escape(sentence)),
        )


@contextlib.contextmanager
def _bar(total: int) -> Iterator[tuple[Progress, TaskID]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    console = Console(stderr=True, highlight=False)
    with Progress(*columns, console=console, transient=True) as progress:
        yield progress, progress.add_task("starting workers", total=total)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text.splitlines()[0] if text else "")
