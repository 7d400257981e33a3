"""`parity capture`: what a run asks of one path, in a file that stands in for it elsewhere."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from parity.commands.options import (
    EXIT_MISSING,
    OUT_FILE,
    device_option,
    probes_option,
    recipe_options,
    seeds_option,
    timeout_option,
)
from parity.errors import CaptureError, UsageError


@click.command()
@click.argument("path")
@click.option("--reference", metavar="PATH|BUNDLE",
              help="Capture PATH as a subject against this, which makes its inputs.")  # fmt: skip
@click.option("--modules", is_flag=True, help="Also every module's output, which is large.")
@seeds_option
@probes_option
@recipe_options
@click.option("--out", required=True, type=OUT_FILE,
              help="The bundle, a file whose name ends in .bundle.")  # fmt: skip
@device_option
@timeout_option
def capture(
    path: str,
    reference: str | None,
    modules: bool,
    seeds: str,
    probes: tuple[str, ...],
    recipe: str,
    settings: tuple[str, ...],
    out: Path,
    timeout: float,
) -> None:
    """Pack all that a run asks of PATH into one file.

    The bundle holds the captures with their environment and the reasons of those refused. It stands in for PATH where that cannot run, as a reference or, captured against one, as a
    subject: the verdicts are those of a run with both. The noise around a reference is in it.

    \b
    Examples:
      parity capture hf --out hf.bundle                           on a machine with torch ...
      parity run --subject mlx --reference hf.bundle              ... for one without
      parity capture mlx --reference hf.bundle --out mlx.bundle   on a Mac ...
      parity run --subject mlx.bundle --reference hf.bundle       ... judged anywhere
    """  # noqa: D301
    from parity import recipe as recipes
    from parity.capture import checks
    from parity.capture import engine as engines
    from parity.capture.bundle import SUFFIX, is_bundle, name_of
    from parity.cells import collect
    from parity.cells import matrix as runs
    from parity.report import progress

    if out.suffix != SUFFIX:
        raise UsageError(f"--out {out}: a bundle's name ends in {SUFFIX}, as {out.stem}{SUFFIX}")
    if is_bundle(path):
        raise UsageError(f"{path} is a bundle already: give the path that is to be captured")
    shared = recipes.load(recipe, settings, engines.knobs([path, *filter(None, [reference])]))
    matrix = runs.Matrix(
        runs.parse_probes(probes),
        path,
        (reference or path,),
        runs.parse_seeds(seeds),
        shared,
        origin=recipe,
    )
    checks.check_run(path, matrix.references, shared)
    cells, of = matrix.cells(), collect.of_subject if reference else collect.of_reference
    with (
        progress.counted(len(cells)) as (done, notice),
        engines.Engine(timeout=timeout, notice=notice) as engine,
    ):
        try:
            recorder = of(engine, cells, modules, done)
        except CaptureError as error:
            click.echo(f"parity: {error}", err=True)
            sys.exit(EXIT_MISSING)
    recorder.save(
        out,
        engines.declared(path),
        name_of(reference) if reference else "",
        shared,
        [stage.number for stage in matrix.stages],
        matrix.seeds,
    )
    size = out.stat().st_size / 1e6
    failed = False
    for name in dict.fromkeys(entry["path"] for entry in recorder.captures.values()):
        if errors := recorder.refused(CaptureError, name):
            click.echo(f"parity: {len(errors)} captures of {name} failed: {errors[0]}", err=True)
            failed |= name == path
    click.echo(f"wrote {out}: {len(recorder.files)} captures, {size:.1f} MB")
    sys.exit(EXIT_MISSING if failed else 0)
