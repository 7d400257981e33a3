"""Annotations of a GitHub run: at most one for each probe and pair, the worst first."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from parity.results.aggregate import Aggregate

MOST = 10
"""Annotations of one kind that GitHub shows for a step."""
SEEDS = 20
"""Seeds named in an annotation."""
WARNINGS = ("inconclusive",)


Group = tuple[int, str, str, str]
"""Probe, stage, subject and reference."""


def workflow_commands(results: Mapping[str, Aggregate]) -> list[str]:
    """Workflow commands, `::error` or `::warning`, at most `MOST` of a kind.

    Args:
        results: All records, by where they were made, such as the label of a runner. The names are in
            the annotations where there are several.
    """
    groups: dict[Group, dict[str, tuple[str, str, str]]] = defaultdict(dict)
    for place, result in results.items():
        for group, *row in _rows(result):
            kind, title, message = row
            groups[group][place] = kind, title, message
    found: dict[str, list[str]] = {"error": [], "warning": []}
    for rows in groups.values():
        kind = min(kind for kind, *_ in rows.values())
        title = next(title for _, title, _ in rows.values())
        message = "\n".join(
            f"{place}: {text}" if len(rows) > 1 else text for place, (_, _, text) in rows.items()
        )
        where = f" ({', '.join(rows)})" if len(results) > 1 else ""
        found[kind].append(_command(kind, f"{title}{where}", message))
    lines = []
    for kind, commands in found.items():
        if len(commands) > MOST:
            rest = len(commands) - MOST + 1
            text = f"{rest} more probes and pairs are not green: see the report"
            commands = [*commands[: MOST - 1], _command(kind, "and more", text)]
        lines += commands
    damaged = [line for result in results.values() for line in result.damaged]
    if damaged:
        text = f"{len(damaged)} damaged, the first: {damaged[0]}"
        lines.insert(0, _command("error", "Damaged records", text))
    return lines


def _rows(result: Aggregate) -> Iterator[tuple[Group, str, str, str]]:
    """Group, kind, title and message for each probe and pair that is not green, whatever the model."""
    groups: dict[Group, list[Any]] = {}
    red: Any = result.red().itertuples(index=False)
    for cell in red:
        row = result.grid[cell.row]
        groups.setdefault((row.probe, row.stage, row.subject, row.reference), []).append(cell)
    # The order of `red`: the worst cell of each group stands first in it, and so do the groups.
    for group, bad in groups.items():
        row, name = result.grid[bad[0].row], str(bad[0].state)
        worst = [cell for cell in bad if cell.state == name]
        models = dict.fromkeys(result.grid[cell.row].model for cell in worst)
        seeds = sorted({cell.seed for cell in worst})
        message = f"{name} on {', '.join(models)}, seed{'s' * (len(seeds) > 1)} "
        message += ", ".join(map(str, seeds[:SEEDS]))
        message += f" and {len(seeds) - SEEDS} more" * (len(seeds) > SEEDS)
        records = result.records([bad[0].position]) if bad[0].position >= 0 else []
        message += "".join(f": {r.expected or r.reason}" for r in records) or ": there is no record"
        if others := len(bad) - len(worst):
            message += f" ({others} more cells are not green)"
        message += "".join(f"\nreproduce: {r.reproduce}" for r in records if r.reproduce)
        kind = "warning" if name in WARNINGS else "error"
        yield group, kind, f"{row.title}, {row.subject} vs {row.reference}", message


def _command(kind: str, title: str, message: str) -> str:
    """`::error title=…::…` with the signs escaped that would end it."""

    def escaped(text: str, more: str = "") -> str:
        for sign in "%\r\n" + more:
            text = text.replace(sign, f"%{ord(sign):02X}")
        return text

    return f"::{kind} title={escaped(title, ':,')}::{escaped(message)}"
