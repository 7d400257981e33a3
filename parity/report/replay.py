"""The results of a replay as Markdown."""

from __future__ import annotations

from parity.replay.play import ScenarioResult
from parity.report.markdown import table as markdown_table


def table(outcomes: list[ScenarioResult]) -> str:
    """One row for each scenario."""
    head = ["scenario", "expected", "found", "", "searches", "runs", "seconds", "source"]
    rows = [
        (f"{o.name}: {o.title}", o.expected, o.found, o.status, f"{o.points}", f"{o.runs}",
         f"{o.seconds:.0f}", o.source)
        for o in outcomes
    ]  # fmt: skip
    return markdown_table(head, rows)
