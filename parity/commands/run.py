"""`parity run`: probes over seeds, with a report at the end."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from parity.commands.options import (
    EXIT_STOPPED,
    OUT_FOLDER,
    device_option,
    end_at_once,
    jobs_option,
    part_options,
    probes_option,
    profile_option,
    recipe_options,
    seeds_option,
    timeout_option,
    write_profile,
)

if TYPE_CHECKING:
    from parity.record import Record


@click.command()
@click.option(
    "--subject", default="mlx", show_default=True, metavar="PATH", help="The path under question."
)
@part_options
@click.option("--reference", "references", multiple=True, metavar="PATH",
              help="The path it is compared with; may be repeated.  [default: mlx-lm, hf]")  # fmt: skip
@seeds_option
@probes_option
@recipe_options
@click.option(
    "--set-subject", multiple=True, metavar="FACTOR=VALUE", help="Change a factor of the subject."
)
@click.option(
    "--set-reference",
    multiple=True,
    metavar="FACTOR=VALUE",
    help="Change a factor of the reference.",
)
@click.option(
    "--out",
    type=OUT_FOLDER,
    help="Folder of the run.  [default: reports/run-…]",
)
@jobs_option
@device_option
@timeout_option
@profile_option
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

    A PATH may be a bundle, the file in which `parity capture` keeps what a path gives: it stands in
    for the path where that cannot run.

    Captures are cached by content: what was finished before an interruption is not run again. Ctrl-C
    ends a run with a report of what is finished. The exit code is 0 if every verdict is green.

    \b
    Examples:
      parity run                                    mlx against mlx-lm and hf, 3 seeds
      parity run --reference mlx-lm --seeds 15
      parity run --probes 02,05 --set model.source=~/models/my-model
      parity run --set-subject lora.num_layers=16   change one side only
      parity run --subject trl --reference hf
      parity run --reference hf --device cuda
      parity run --reference hf.bundle
      parity run --subject my_package.trainer:MyPath
      parity run --subject-loss my_trainer:loss_fn   your loss, all else of path mlx
      parity run --subject hf --subject-loss my_trainer:loss_fn   the same on torch, all else of path hf
    """  # noqa: D301
    from parity import recipe as recipes
    from parity import timing
    from parity.capture import capacity, checks, storage
    from parity.capture import engine as engines
    from parity.capture.bundle import name_of
    from parity.cells import matrix as runs
    from parity.cells.plan import Plan, write_plan
    from parity.report import progress, terminal
    from parity.report.write import write
    from parity.results import expected as expectations
    from parity.results.aggregate import aggregate

    storage.limit()  # what the variable says is looked at before any work
    references = references or runs.REFERENCES
    shared = recipes.load(recipe, settings, engines.knobs([subject, *references]))
    changes = runs.sides(
        [*(("subject", t) for t in set_subject), *(("reference", t) for t in set_reference)]
    )
    for side in changes:
        shared.override(changes[side])
    matrix = runs.Matrix(
        runs.parse_probes(probes),
        subject,
        references,
        runs.parse_seeds(seeds),
        shared,
        changes,
        recipe,
    )
    checks.check_run(subject, matrix.references, shared)
    known = expectations.chosen(
        name_of(subject), map(name_of, matrix.references), expected, no_expected
    )
    room = capacity.of_recipe(shared, jobs)
    folder = out or runs.default_folder()
    plan = Plan.of(matrix.cells())
    write_plan(plan, folder)
    expectations.keep(known, folder)
    finished: list[Record] = []
    stopped = False
    try:
        with (
            progress.shown(len(matrix.cells())) as (done, notice),
            engines.Engine(
                timeout=timeout, log_dir=folder / "logs", notice=notice, jobs=room
            ) as engine,
        ):
            notice(str(room))
            records = runs.run_matrix(matrix, engine, folder, room.busy, done, finished)
    except KeyboardInterrupt:
        records, stopped = finished, True
    for sentence in engine.growth.said:
        click.echo(sentence, err=True)
    records = [expectations.mark(record, known) for record in records]
    for record in records:
        if record.expected:
            record.save(folder / "records")
    with timing.span(timing.COMPARE, "all records together"):
        result = aggregate(records, plan, known)
    with timing.span(timing.WRITE, "report"):
        files = write(result, folder)
    with timing.span(timing.WRITE, "terminal"):
        terminal.render(result, terminal.console())
    click.echo("wrote " + ", ".join(str(file) for file in files if file.suffix in (".md", ".html")))
    write_profile(folder)
    if stopped:
        words = sys.argv[1:] if out else [*sys.argv[1:], "--out", str(folder)]
        click.echo(
            f"stopped: {len(records)} of {len(matrix.cells())} cells are finished; "
            f"to go on: {shlex.join(['parity', *words])}",
            err=True,
        )
        end_at_once(EXIT_STOPPED)
    sys.exit(result.exit_code)
