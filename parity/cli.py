"""The `parity` command. Heavy modules are imported inside the commands that need them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from parity import __version__
from parity.bisect.command import bisect
from parity.errors import CaptureError, UnmatchedNames, Unsupported, UsageError
from parity.options import (
    EXIT_GREEN,
    EXIT_MISSING,
    EXIT_NOT_GREEN,
    EXIT_USAGE,
    device_option,
    recipe_options,
    timeout_option,
)
from parity.replay.command import replay


class Group(click.Group):
    """Turns the errors a person can mend into one line and exit code 2."""

    def invoke(self, context: click.Context) -> Any:
        """Runs the command."""
        try:
            return super().invoke(context)
        except UsageError as error:
            raise _Usage(str(error)) from None
        except BrokenPipeError:
            sys.exit(EXIT_GREEN)


class _Usage(click.ClickException):
    exit_code = EXIT_USAGE

    def show(self, file: Any = None) -> None:
        click.echo(f"parity: {self.format_message()}", err=True)


_EPILOG = """\b
Examples:
  parity run                                   all probes, mlx against mlx-lm and hf, 3 seeds
  parity run --reference mlx-lm --seeds 15     bit-identity with the CLI on fifteen seeds
  parity run --probes 02,05 --set model.source=smollm2-135m
  parity run --subject my_trainer:Path         a trainer of your own
  parity bisect --reference hf --shipped       what makes two stacks differ
  parity replay                                cases that people have met
  parity list                                  paths, probes, models, data, recipes
\b
Exit codes: 0 everything green, 1 something diverges or is inconclusive,
2 wrong use, 3 cells missing or in error.
"""


@click.group(cls=Group, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="parity")
def main() -> None:
    """Tells whether an MLX fine-tuning path does the same thing as its reference."""


@main.command()
@click.option(
    "--subject", default="mlx", show_default=True, metavar="PATH", help="The path under question."
)
@click.option("--reference", "references", multiple=True, metavar="PATH",
              help="What it is held against; may be repeated.  [default: mlx-lm, hf]")  # fmt: skip
@click.option("--seeds", default="3", show_default=True, metavar="N|LIST",
              help="How many seeds (up to 15), or the seeds themselves: 3407,0,1.")  # fmt: skip
@click.option(
    "--probes", multiple=True, metavar="LIST", help="Numbers or names, e.g. 02,05.  [default: all]"
)
@recipe_options
@click.option(
    "--set-subject", multiple=True, metavar="FACTOR=VALUE", help="Change a factor on one side only."
)
@click.option(
    "--set-reference",
    multiple=True,
    metavar="FACTOR=VALUE",
    help="Change a factor on one side only.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of the run.  [default: reports/run-…]",
)
@click.option(
    "--jobs",
    default=2,
    show_default=True,
    type=click.IntRange(1, 64),
    help="Cells under way at once.",
)
@device_option
@timeout_option
@click.option("--expected", type=click.Path(path_type=Path, exists=True, dir_okay=False),
              help="Known divergences.  [default: the fixtures' file of each pair]")  # fmt: skip
@click.option("--no-expected", is_flag=True, help="Expect no divergence.")
def run(
    subject: str,
    references: tuple[str, ...],
    seeds: str,
    probes: tuple[str, ...],
    recipe: str,
    settings: tuple[str, ...],
    set_subject: tuple[str, ...],
    set_reference: tuple[str, ...],
    out: Path | None,
    jobs: int,
    timeout: float,
    expected: Path | None,
    no_expected: bool,
) -> None:
    """Run probes over seeds and report.

    Captures are cached by content: what was finished before an interruption is not run again.
    """
    from parity import engine as engines
    from parity import expected as expectations
    from parity import recipe as recipes
    from parity import run as runs
    from parity.aggregate import aggregate, write
    from parity.plan import Plan, write_plan
    from parity.report import progress, terminal

    shared = recipes.load(recipe, settings)
    changes = runs.sides(
        [*(("subject", t) for t in set_subject), *(("reference", t) for t in set_reference)]
    )
    for side in changes:
        shared.override(changes[side])
    matrix = runs.Matrix(
        runs.parse_probes(probes),
        subject,
        references or runs.REFERENCES,
        runs.parse_seeds(seeds),
        shared,
        changes,
        recipe,
    )
    engines.check([subject, *matrix.references], shared)
    known = expectations.chosen(subject, matrix.references, expected, no_expected)
    folder = out or runs.default_folder()
    plan = Plan.of(matrix.cells())
    write_plan(plan, folder)
    expectations.keep(known, folder)
    with (
        progress.shown(len(matrix.cells())) as (done, notice),
        engines.Engine(
            timeout=timeout, log_dir=folder / "logs", notice=notice, repeat=True
        ) as engine,
    ):
        records = runs.run(matrix, engine, folder, jobs, done)
    records = [expectations.mark(record, known) for record in records]
    for record in records:
        if record.expected:
            record.save(folder / "records")
    result = aggregate(records, plan, known)
    files = write(result, folder)
    terminal.render(result, terminal.console())
    click.echo("wrote " + ", ".join(str(file) for file in files if file.suffix in (".md", ".html")))
    sys.exit(result.exit_code)


@main.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
def report(folder: Path) -> None:
    """Aggregate a folder of records: table, JSON, CSV, Markdown, HTML."""
    from parity import expected, record
    from parity.aggregate import aggregate, write
    from parity.plan import read_plan
    from parity.report import terminal

    known = expected.kept(folder)
    records = [expected.mark(found, known) for found in record.load_all(folder)]
    result = aggregate(records, read_plan(folder), known)
    files = write(result, folder)
    terminal.render(result, terminal.console())
    click.echo("wrote " + ", ".join(str(file) for file in files))
    sys.exit(result.exit_code)


@main.command()
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

    Traces can be captured on different machines and compared on a third.

    \b
    Examples:
      parity capture mlx train --out mac.safetensors
      parity capture hf train --out linux.safetensors
      parity compare mac.safetensors linux.safetensors
    """  # noqa: D301
    from parity import engine as engines
    from parity import recipe as recipes
    from parity.paths.base import METHODS
    from parity.trace import Trace

    if method not in METHODS:
        raise UsageError(f"unknown method {method!r}: give one of {', '.join(METHODS)}")
    shared = recipes.load(recipe, settings)
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


@main.command()
@click.argument("subject", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.argument("reference", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--floor", "floor", type=click.Path(path_type=Path, exists=True, dir_okay=False),
              help="A float64 trace of the same thing, to measure the noise floor with.")  # fmt: skip
@click.option("--exact", is_flag=True, help="Bits must be equal.")
def compare(subject: Path, reference: Path, floor: Path | None, exact: bool) -> None:
    """Compare two traces array by array."""
    from parity.comparing import compare_traces
    from parity.report import terminal
    from parity.trace import Trace

    metrics = compare_traces(
        Trace.load(subject), Trace.load(reference), Trace.load(floor) if floor else None, exact
    )
    verdict = terminal.render_metrics(metrics, terminal.console())
    sys.exit(EXIT_GREEN if verdict.green else EXIT_NOT_GREEN)


@main.command("list")
def list_() -> None:
    """Show paths, probes, models, data, recipes and scenarios."""
    from parity import resources
    from parity.paths.base import registered
    from parity.stages import BY_NUMBER

    click.echo("paths")
    for name, target in sorted(registered().items()):
        click.echo(f"  {name:<10} {target}")
    click.echo("probes")
    for stage in BY_NUMBER:
        click.echo(f"  {stage.number:02d} {stage.name:<20} {stage.question}")
    click.echo("models     " + ", ".join([*resources.names("models"), *resources.EXTRA_MODELS]))
    click.echo("data       " + ", ".join(resources.names("data")))
    click.echo("recipes    " + ", ".join(resources.names("recipes")))
    click.echo("scenarios  " + ", ".join(resources.names("scenarios")))
    click.echo(f"cache      {resources.cache()}")


@main.command()
@recipe_options
def factors(recipe: str, settings: tuple[str, ...]) -> None:
    """Show every factor of a recipe with its value."""
    import json

    from parity import recipe as recipes

    for name, value in recipes.load(recipe, settings).factors().items():
        click.echo(f"{name} = {json.dumps(value, ensure_ascii=False)}")


main.add_command(bisect)
main.add_command(replay)


if __name__ == "__main__":
    main()
