"""`parity capture`: what one path emits, kept in a file."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from parity.commands.options import (
    EXIT_MISSING,
    device_option,
    recipe_options,
    timeout_option,
)
from parity.errors import CaptureError, UnmatchedNames, Unsupported, UsageError


@click.command()
@click.argument("path")
@click.argument("method")
@recipe_options
@click.option("--inputs", type=click.Path(path_type=Path, exists=True, dir_okay=False),
              help="A trace that holds what the method is handed.")  # fmt: skip
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="File of the trace.",
)
@device_option
@timeout_option
def capture(
    path: str,
    method: str,
    recipe: str,
    settings: tuple[str, ...],
    inputs: Path | None,
    out: Path,
    timeout: float,
) -> None:
    """Run one METHOD of one PATH and keep its trace.

    \b
    Example:
      parity capture mlx train --out mac.safetensors
    """  # noqa: D301
    from parity import recipe as recipes
    from parity.capture import engine as engines
    from parity.paths.contract import METHODS
    from parity.paths.registry import knobs
    from parity.trace import Trace

    if method not in METHODS:
        raise UsageError(f"unknown method {method!r}: give one of {', '.join(METHODS)}")
    shared = recipes.load(recipe, settings, knobs([path]))
    engines.check([path], shared)
    with engines.Engine(timeout=timeout) as engine:
        try:
            given = Trace.load(inputs) if inputs else Trace()
            trace = engine.capture(path, method, shared, given)
        except Unsupported as error:
            raise UsageError(str(error)) from None
        except (CaptureError, UnmatchedNames) as error:
            click.echo(f"parity: {error}\n{getattr(error, 'detail', '')}", err=True)
            sys.exit(EXIT_MISSING)
    trace.save(out)
    click.echo(f"wrote {out}: {len(trace.arrays)} arrays, {len(trace.scalars)} scalars")
