"""`parity bisect`: what a person types and sees."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from parity import recipe as recipes
from parity import run as runs
from parity.bisect.causes import Bisection, Report, shipped
from parity.engine import Engine, check


def causes(
    subject: str,
    reference: str,
    recipe: str,
    settings: tuple[str, ...],
    set_subject: tuple[str, ...],
    as_shipped: bool,
    seed: int,
    repeats: int,
    out: Path,
    timeout: float,
) -> Report:
    """Searches stages, factors and places; progress goes to stderr."""
    shared = recipes.load(recipe, settings).override({"seed.value": seed})
    changes = runs.sides([("subject", text) for text in set_subject]).get("subject", {})
    shared.override(changes)
    check([subject, reference], shared)

    def watch(what: str, done: int, left: int) -> None:
        click.echo(f"  run {done + 1}, about {left} left: {what}", err=True)

    with Engine(timeout=timeout, log_dir=out / "logs") as engine:
        if as_shipped:
            shared, own = shipped(engine, subject, reference, shared)
            changes = {**own, **changes}
        click.echo(f"{len(changes)} factors differ: {', '.join(changes) or 'none'}", err=True)
        search = Bisection(engine, subject, reference, shared, changes, watch, repeats, recipe)
        search.notice = lambda text: click.echo(text, err=True)
        try:
            report = search.search()
        except KeyboardInterrupt:
            click.echo("stopped; the same command goes on where it was", err=True)
            sys.exit(130)
    report.save(out)
    return report
