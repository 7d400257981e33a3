"""`parity sweep`: every architecture that transformers and mlx-lm both know, by release."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from parity.commands.options import (
    EXIT_GREEN,
    EXIT_MISSING,
    EXIT_NOT_GREEN,
    EXIT_STOPPED,
    end_at_once,
    jobs_option,
    out_option,
)

if TYPE_CHECKING:
    from parity.capture.engine import Engine
    from parity.sweep.columns import Columns
    from parity.sweep.run import Found, Sweep


@click.command()
@click.option(
    "--subject", default="mlx", show_default=True, help="The path that runs mlx-lm's models."
)
@click.option(
    "--package",
    metavar="RANGE",
    help="Releases as columns: mlx-lm==0.29.1..0.32.2, or one: mlx-lm==0.32.2.",
)
@click.option("--releases", "count", default=4, show_default=True, type=click.IntRange(2, 60),
              help="Columns of --package or --repo, evenly spaced, both ends among them.")  # fmt: skip
@click.option("--repo", type=click.Path(path_type=Path, exists=True, file_okay=False),
              help="Commits of a checkout of mlx-lm as columns, between --good and --bad.")  # fmt: skip
@click.option("--good", metavar="REVISION", help="The first commit of --repo.")
@click.option("--bad", metavar="REVISION", help="The last commit of --repo.")
@click.option(
    "--only",
    multiple=True,
    metavar="LIST",
    help="Architectures, e.g. llama,gemma3_text.  [default: all]",
)
@click.option("--question", "questions", multiple=True, metavar="LIST",
              help="Questions: loads, logits, gradient, KV cache, tokens.  [default: all]")  # fmt: skip
@click.option("--configuration", "chosen", multiple=True, metavar="LIST",
              help="Configurations: plain, traps, 'rope yarn' and so on.  [default: all]")  # fmt: skip
@click.option(
    "--list",
    "only_list",
    is_flag=True,
    help="List the architectures with their traps, and run nothing else.",
)
@jobs_option
@click.option(
    "--timeout",
    default=180.0,
    show_default=True,
    type=click.FloatRange(1),
    help="Seconds a capture may take.",
)
@click.option("--narrow/--no-narrow", default=True, show_default=True,
              help="Look for the release of each change between two columns.")  # fmt: skip
@out_option("reports/architectures")
def sweep(
    subject: str, package: str | None, count: int, repo: Path | None, good: str | None, bad: str | None,
    only: tuple[str, ...], questions: tuple[str, ...], chosen: tuple[str, ...], only_list: bool, jobs: int,
    timeout: float, narrow: bool, out: Path,
) -> None:  # fmt: skip
    """Compare all architectures, release by release.

    Of each that transformers and mlx-lm both have a tiny random model is made whose configuration sets as many traps as it has keys
    for. It is asked whether it loads, and whether logits, gradient, KV cache and tokens are transformers'.
    Of each cell that is red the cause is searched. What is finished is kept: the same command goes on
    where it was stopped.

    \b
    Exit codes:
      0  every cell is green
      1  a cell is red
      2  wrong use
      3  a column or an architecture could not be asked, nothing is red

    \b
    Examples:
      parity sweep                                      what is installed, all architectures
      parity sweep --only llama,gemma3_text
      parity sweep --package mlx-lm==0.29.1..0.32.2     four releases, and what changed between them
      parity sweep --package mlx-lm==0.28.0..0.32.2 --releases 18
      parity sweep --repo ../mlx-lm --good v0.31.0 --bad main
      parity sweep --list
    """  # noqa: D301
    from parity import resources
    from parity.capture import capacity, storage
    from parity.capture.engine import Engine
    from parity.errors import UsageError
    from parity.sweep.questions import QUESTIONS
    from parity.sweep.run import Sweep

    wanted = _listed(questions) or QUESTIONS
    if lost := [name for name in wanted if name not in QUESTIONS]:
        raise UsageError(f"--question {lost[0]!r}: questions are {', '.join(QUESTIONS)}")
    # Workers of both frameworks stay alive, so that none is started for each architecture anew.
    room = capacity.jobs(capacity.here(), jobs)
    room = room._replace(alive=max(room.alive, 2 * room.busy + 1))
    storage.check_writable(resources.cache())
    with Engine(timeout=timeout, jobs=room) as engine:
        columns = _columns(engine, subject, package, count, repo, good, bad)
        running = Sweep(columns, engine.cache, room.busy, wanted, _listed(chosen), _progress())
        try:
            if only_list:
                _show(running, _listed(only))
                return
            code = _run(running, columns, _listed(only), out, narrow)
        finally:
            running.close()
    for sentence in engine.growth.said:
        click.echo(sentence, err=True)
    sys.exit(code)


def _listed(values: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(part.strip() for value in values for part in value.split(",") if part.strip())


def _columns(
    engine: Engine, subject: str, package: str | None, count: int, repo: Path | None,
    good: str | None, bad: str | None,
) -> Columns:  # fmt: skip
    from parity.capture.environments import parse_range
    from parity.errors import UsageError
    from parity.paths.registry import resolve
    from parity.sweep import columns

    if resolve(subject).framework != "mlx":
        raise UsageError(
            f"--subject {subject}: a sweep compares mlx-lm's models with transformers: give a path on MLX"
        )
    if package and repo:
        raise UsageError("give either --package or --repo")
    if repo:
        if not (good and bad):
            raise UsageError("--repo needs --good and --bad, its first and its last commit")
        return columns.of_repo(engine, subject, repo, good, bad, count)
    if good or bad:
        raise UsageError("--good and --bad are commits of --repo, which is not given")
    if not package:
        return columns.installed(engine, subject)
    exact = re.fullmatch(r"\s*mlx-lm==([\w.]+?)\s*", package)
    if exact and ".." not in package:
        return columns.of_package_exactly(engine, subject, [exact[1]])
    return columns.of_package(engine, subject, parse_range(package), count)


def _progress() -> Any:
    def show(cell: Any, kept: bool) -> None:
        from parity.report.sweep_text import line

        click.echo(line(cell) + ("  (kept)" if kept else f"  {cell.seconds:.0f} s"), err=True)

    return show


def _run(running: Sweep, columns: Columns, only: tuple[str, ...], out: Path, narrowed: bool) -> int:
    from parity.report import sweep_files
    from parity.sweep.changes import changes, narrow
    from parity.sweep.run import Found

    found = Found([planned.name for planned in columns.planned])
    try:
        running.run(only, found)
        moves = changes(found)
        if narrowed:
            notice = lambda text: click.echo(f"narrowing down: {text}", err=True)  # noqa: E731
            moves = [
                each
                for change in moves
                for each in narrow(
                    change, columns, running, found.architectures[change.architecture], notice
                )
            ]
    except KeyboardInterrupt:
        running.stop()
        files = sweep_files.write(out, found, [], complete=False)
        click.echo(f"wrote {files[0]}", err=True)
        command = shlex.join(["parity", *sys.argv[1:]])
        click.echo(
            f"stopped: {len(found.cells)} of {found.expected} cells are finished; to go on: {command}",
            err=True,
        )
        end_at_once(EXIT_STOPPED)
    files = sweep_files.write(out, found, moves, complete=True)
    from parity.report.sweep_text import summary

    click.echo(summary(found, moves))
    click.echo("wrote " + ", ".join(map(str, files)))
    return _code(found)


def _code(found: Found) -> int:
    if any(answer.red for cell in found.cells.values() for answer in cell.answers):
        return EXIT_NOT_GREEN
    lacking = (
        found.unavailable or any(a.why_not for a in found.architectures.values()) or not found.cells
    )
    return EXIT_MISSING if lacking else EXIT_GREEN


def _show(running: Sweep, only: tuple[str, ...]) -> None:
    for name, architecture in running.listed(only):
        if architecture.why_not:
            click.echo(f"{name}: {architecture.why_not}")
            continue
        click.echo(f"{name} ({architecture.kind})")
        for configuration in architecture.found.made:
            traps = "; ".join(f"{trap.kind}: {trap.name}" for trap in configuration.traps)
            click.echo(f"  {configuration.name}" + (f": {traps}" if traps else ""))
