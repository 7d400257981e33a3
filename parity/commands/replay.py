"""`parity replay`: known cases."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from parity.commands.options import (
    EXIT_GREEN,
    EXIT_MISSING,
    EXIT_NOT_GREEN,
    EXIT_STOPPED,
    end_at_once,
    out_option,
    timeout_option,
)

if TYPE_CHECKING:
    from parity.replay.play import ScenarioResult
    from parity.replay.scenario import Scenario


@click.command()
@click.argument("names", nargs=-1, metavar="[SCENARIO|FILE]...")
@click.option("--list", "listing", is_flag=True, help="List the scenarios and run none.")
@out_option("reports/replay")
@timeout_option
def replay(names: tuple[str, ...], listing: bool, out: Path, timeout: float) -> None:
    """Run known cases with known causes.

    Each scenario is a case that somebody reported: a stage and a cause, or a suspicion that turned
    out to make no difference. Exit code 0: all came out as expected; 1: one did not; 3: one could not
    be run here.

    \b
    Examples:
      parity replay                           all of them
      parity replay --list                    names, expectations, titles
      parity replay last-16-layers compile    these two
      parity replay my-case.toml              one of your own
    """  # noqa: D301
    from parity.replay import scenario

    chosen = [scenario.load(name) for name in names or scenario.names()]
    if listing:
        for case in chosen:
            click.echo(f"{case.name:24} {case.expect.text():44} {case.title}")
        return
    try:
        outcomes = _play(chosen, out, timeout)
    except KeyboardInterrupt:
        click.echo("stopped; run the same command again to continue", err=True)
        end_at_once(EXIT_STOPPED)
    statuses = [str(outcome.status) for outcome in outcomes]
    click.echo(f"{statuses.count('as expected')} of {len(outcomes)} scenarios came out as expected")
    if "not as expected" in statuses:
        sys.exit(EXIT_NOT_GREEN)
    sys.exit(EXIT_MISSING if "not run" in statuses else EXIT_GREEN)


def _play(chosen: list[Scenario], out: Path, timeout: float) -> list[ScenarioResult]:
    """Runs scenarios one after the other; the results so far are written after each."""
    from parity.capture.engine import Engine
    from parity.files import to_json, write_atomically
    from parity.replay.play import play
    from parity.report.replay import table

    outcomes: list[ScenarioResult] = []
    with Engine(timeout=timeout, log_dir=out / "logs") as engine:
        for index, case in enumerate(chosen):
            click.echo(f"[{index + 1}/{len(chosen)}] {case.name}: {case.title}", err=True)
            outcome = play(case, engine, lambda text: click.echo(f"    {text}", err=True))
            outcomes.append(outcome)
            write_atomically(out / "replay.md", table(outcomes).encode())
            write_atomically(out / "replay.json", to_json(outcomes))
            click.echo(f"{_MARKS[outcome.status]} {outcome.name}: {outcome.found}")
            if outcome.status != "as expected":
                click.echo(f"    expected: {outcome.expected}\n    source: {outcome.source}")
            click.echo(f"    {outcome.runs} runs, {outcome.seconds:.0f} s", err=True)
    click.echo(f"wrote {out / 'replay.md'}, {out / 'replay.json'}", err=True)
    return outcomes


_MARKS = {"as expected": "✓", "not as expected": "✗", "not run": "–"}
