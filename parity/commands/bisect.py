"""`parity bisect`: the search for a cause. The answer goes to stdout, progress to stderr."""

from __future__ import annotations

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
    device_option,
    end_at_once,
    jobs_option,
    out_option,
    part_options,
    profile_option,
    recipe_options,
    timeout_option,
    write_profile,
)

if TYPE_CHECKING:
    from parity.capture.engine import Engine
    from parity.capture.environments import Range
    from parity.cells.cell import Cell
    from parity.recipe import Recipe
    from parity.report.search_progress import Display


EXIT_CODES = {"agree": EXIT_GREEN, "agree in part": EXIT_MISSING, "not compared": EXIT_MISSING}
"""By verdict; `found` and `inconclusive` are not green."""


@click.command()
@click.option("--subject", default="mlx", show_default=True, help="The path under question.")
@part_options
@click.option(
    "--reference", default="mlx-lm", show_default=True, help="The path it is compared with."
)
@recipe_options
@click.option(
    "--set-subject", multiple=True, metavar="FACTOR=VALUE", help="Change a factor of the subject."
)
@click.option(
    "--set-reference",
    multiple=True,
    metavar="FACTOR=VALUE",
    help="Change the reference throughout.",
)
@click.option("--shipped", "as_shipped", is_flag=True, help="Let each path use its own defaults.")
@click.option(
    "--check",
    "command",
    metavar="COMMAND",
    help="Let a shell command decide: it finds the recipe's file in $PARITY_RECIPE and exits with 0 "
    "(they agree), 125 (it cannot tell) or another code (they differ).",
)
@click.option(
    "--package",
    metavar="RANGE",
    help="Find the release that changed a probe's verdict: mlx-lm==0.30.0..0.32.2, several "
    "separated by commas.",
)
@click.option(
    "--repo",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Find the commit of a checkout instead, between --good and --bad.",
)
@click.option("--good", metavar="REVISION", help="A commit of --repo that is known to be good.")
@click.option("--bad", metavar="REVISION", help="A commit of --repo that is known to be bad.")
@click.option(
    "--probe",
    help="Search at this probe alone, also at one that is run where it is named, such as fuse. With "
    "--package and --repo the probe that they run.  [default there: 02]",
)
@click.option(
    "--side",
    type=click.Choice(["subject", "reference", "both"]),
    default="subject",
    show_default=True,
    help="The side that runs the other versions.",
)
@click.option("--seed", default=3407, show_default=True, type=click.IntRange(0, 2**32 - 1))
@click.option(
    "--repeats",
    default=1,
    show_default=True,
    type=click.IntRange(1, 20),
    help="How often each run is repeated; repeats that disagree end in `inconclusive`.",
)
@out_option("reports/bisect")
@jobs_option
@device_option
@timeout_option
@profile_option
def bisect(
    recipe: str, settings: tuple[str, ...], set_subject: tuple[str, ...],
    set_reference: tuple[str, ...], seed: int, out: Path, **options: Any,
) -> None:  # fmt: skip
    """Find what makes a subject differ from its reference.

    First the stages, in the order in which data flows through them. In a stage that diverges, every
    minimal set of factors that makes it diverge; where no factor does, the module, tensor or step.

    \b
    Exit codes:
      0  all that could differ was compared, and agrees
      1  a cause was found, or the search is inconclusive
      2  wrong use
      3  what was compared agrees, but not everything was compared

    \b
    Examples:
      parity bisect --reference hf --shipped
      parity bisect --set-subject lora.num_layers=16 --set-subject optim.weight_decay=0.01
      parity bisect --reference hf --recipe smollm2 --set model.source=smollm2-135m-as-saved
      parity bisect --subject my_trainer:Path --probe fuse
      parity bisect --reference hf --package mlx-lm==0.28.0..0.29.1 --probe 02
      parity bisect --subject my_trainer:Path --repo ../my-trainer --good v1 --bad main --probe 07
      parity bisect --set-subject lora.rank=4 --check './my-check.sh "$PARITY_RECIPE"'
    """  # noqa: D301
    from parity import recipe as recipes
    from parity import timing
    from parity.capture.engine import knobs
    from parity.cells.matrix import sides

    own = knobs([options["subject"], options["reference"]])
    shared = recipes.load(recipe, settings, own).override({"seed.value": seed})
    changes = sides([("subject", text) for text in set_subject]).get("subject", {})
    held = sides([("reference", text) for text in set_reference]).get("reference", {})
    for changed in (changes, held):
        shared.override(changed)
    try:
        with timing.span(timing.SEARCH, "stages, factors, parts and places"):
            verdict = _search(shared, changes, held, recipe, out, **options)
    except KeyboardInterrupt:
        click.echo("stopped; run the same command again to continue", err=True)
        end_at_once(EXIT_STOPPED)
    write_profile(out)
    sys.exit(EXIT_CODES.get(verdict, EXIT_NOT_GREEN))


def _search(
    shared: Recipe, changes: dict[str, Any], held: dict[str, Any], origin: str, out: Path, *,
    subject: str, reference: str, as_shipped: bool, command: str | None, repeats: int, timeout: float,
    jobs: int, **versions: Any,
) -> str:  # fmt: skip
    """Runs the search, prints the answer, and returns the verdict."""
    from parity.bisect import check
    from parity.bisect.answer import answer
    from parity.bisect.causes import CauseSearch
    from parity.capture import capacity
    from parity.capture.checks import check as find_wrong_use
    from parity.capture.engine import Engine
    from parity.report.search_files import save
    from parity.report.search_progress import Lines, shown
    from parity.stages import STAGES, find

    probe = versions.pop("probe")
    stages = (STAGES[0], find(probe)) if probe else STAGES
    if command:
        # The command writes to the same terminal: no display that is redrawn in place.
        report = check.report(command, shared, changes, max(2, repeats), Lines().watch, timeout)
    else:
        find_wrong_use([subject, reference], shared)
        spans = _ranges(
            versions.pop("package"), versions["repo"], versions["good"], versions["bad"]
        )
        room = capacity.of_recipe(shared, jobs)
        with Engine(timeout=timeout, log_dir=out / "logs", jobs=room) as engine, shown() as display:
            if spans or versions["repo"]:
                cell = _cell(subject, reference, shared, changes, origin, probe or "02")
                return _versions(engine, cell, out, display, spans=spans, **versions)
            if as_shipped:
                mine = engine.shipped(subject, shared)
                shared = engine.shipped(reference, shared)
                own = {name: value for name, (value, _) in mine.difference(shared).items()}
                changes = {**own, **changes}
            display.notice(f"{len(changes)} factors differ: {', '.join(changes) or 'none'}")
            report = CauseSearch(
                engine, subject, reference, shared, changes, display.watch, repeats, origin,
                stages=stages, notice=display.notice, held=held,
            ).search()  # fmt: skip
    click.echo(answer(report))
    click.echo("wrote " + ", ".join(map(str, save(out, report))), err=True)
    return report.verdict


def _cell(
    subject: str, reference: str, shared: Recipe, changes: dict[str, Any], origin: str, probe: str
) -> Cell:
    from parity.cells.cell import Cell
    from parity.stages import find

    sides = {"subject": changes} if changes else {}
    return Cell(find(probe), subject, reference, shared, sides, origin)


def _ranges(
    package: str | None, repo: Path | None, good: str | None, bad: str | None
) -> list[Range]:
    """The releases of --package; finds wrong use of it and of --repo before any work."""
    from parity.capture.environments import parse_range
    from parity.errors import UsageError

    if repo and not package and not (good and bad):
        raise UsageError("--repo needs --good REVISION and --bad REVISION")
    return [parse_range(part) for part in package.split(",")] if package else []


def _versions(
    engine: Engine, cell: Cell, out: Path, display: Display, *, spans: list[Range],
    repo: Path | None, good: str | None, bad: str | None, side: str,
) -> str:  # fmt: skip
    """Searches releases or commits; prints a sentence for each change."""
    from parity.bisect.versions import VersionSearch
    from parity.report.search_files import save_versions

    bisection = VersionSearch(
        engine, cell, side, ledger=out / "versions.json", progress=display.progress
    )
    if spans:
        found = bisection.each(*spans)
    else:
        assert repo and good and bad
        found = [bisection.commit(repo, good, bad)]
    for change in found:
        click.echo(change.sentence())
        if change.runs:
            display.notice(f"{change.runs} runs in {change.seconds:.0f} s")
    files = save_versions(out, found, shlex.join(["parity", *sys.argv[1:]]))
    display.notice("wrote " + ", ".join(map(str, files)))
    return "inconclusive" if any(change.found.inconclusive for change in found) else "found"
