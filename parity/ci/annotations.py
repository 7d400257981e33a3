"""Annotations of a GitHub run: at most one for each probe and pair, the worst first."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from parity.cells.plan import GridRow
from parity.results.aggregate import NOT_RED, WORST_FIRST, Aggregate, state

MOST = 10
"""Annotations of one kind that GitHub shows for a step."""
WARNINGS = ("inconclusive",)


def workflow_commands(result: Aggregate, place: str = "") -> list[str]:
    """Workflow commands, `::error` or `::warning`, at most `MOST` of a kind.

    Args:
        result: All records of one runner.
        place: Where they were made, such as the label of the runner.
    """
    found: dict[str, list[str]] = defaultdict(list)
    for kind, title, message in _rows(result):
        found[kind].append(_command(kind, f"{title}{f' ({place})' if place else ''}", message))
    lines = []
    for kind, commands in found.items():
        if len(commands) > MOST:
            rest = len(commands) - MOST + 1
            text = f"{rest} more probes and pairs are not green: see the report"
            commands = [*commands[: MOST - 1], _command(kind, "and more", text)]
        lines += commands
    if result.damaged:
        text = f"{len(result.damaged)} damaged, the first: {result.damaged[0]}"
        lines.insert(0, _command("error", "Damaged records", text))
    return lines


def _rows(result: Aggregate) -> Iterator[tuple[str, str, str]]:
    """Kind, title and message for each probe and pair that is not green, whatever the model."""
    groups: dict[tuple[int, str, str, str], list[GridRow]] = defaultdict(list)
    for row in result.cells:
        groups[row.probe, row.stage, row.subject, row.reference].append(row)
    ranked = []
    for index, rows in enumerate(groups.values()):
        bad = [
            (WORST_FIRST.index(state(record)), row, seed, record)
            for row in rows
            for seed, record in result.cells[row].items()
            if state(record) not in NOT_RED
        ]
        if bad:
            ranked.append((min(rank for rank, *_ in bad), index, rows[0], bad))
    for rank, _, row, bad in sorted(ranked, key=lambda r: r[:2]):
        worst = [(r, seed, record) for n, r, seed, record in bad if n == rank]
        models = [*dict.fromkeys(r.model for r, _, _ in worst)]
        seeds = sorted({seed for _, seed, _ in worst})
        name, record = WORST_FIRST[rank], worst[0][2]
        message = f"{name} on {', '.join(models)}, seed{'s' * (len(seeds) > 1)} "
        message += ", ".join(map(str, seeds))
        message += f": {record.expected or record.reason}" if record else ": there is no record"
        if others := len(bad) - len(worst):
            message += f" ({others} more cells are not green)"
        if record and record.reproduce:
            message += f"\nreproduce: {record.reproduce}"
        kind = "warning" if name in WARNINGS else "error"
        yield kind, f"{row.title}, {row.subject} vs {row.reference}", message


def _command(kind: str, title: str, message: str) -> str:
    """`::error title=…::…` with the signs escaped that would end it."""

    def escaped(text: str, more: str = "") -> str:
        for sign in "%\r\n" + more:
            text = text.replace(sign, f"%{ord(sign):02X}")
        return text

    return f"::{kind} title={escaped(title, ':,')}::{escaped(message)}"
