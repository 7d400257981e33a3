"""`parity ci`: the steps of the GitHub workflows, to be run and tested anywhere."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import click

_FOLDER = click.Path(path_type=Path, exists=True, file_okay=False)
_NEW = click.Path(path_type=Path, file_okay=False)


@click.group()
def ci() -> None:
    """Steps of the GitHub workflows.

    `.github/workflows/parity.yml` runs them in this order: plan, shard in each job, then `parity
    merge`, annotate and moved. None of them needs GitHub.

    \b
    Examples:
      parity ci plan --runners macos-26 --seeds 5 --shards 1
      parity ci shard --help
    """  # noqa: D301


@ci.command()
@click.option("--runners", default="macos-26 macos-15", show_default=True,
              help="Labels of runners, separated by spaces.")  # fmt: skip
@click.option("--subject", default="mlx", show_default=True, metavar="PATHS",
              help="Paths under question; PATH@RELEASE pins a release for its cells.")  # fmt: skip
@click.option("--reference", default="mlx-lm hf", show_default=True, metavar="PATHS")
@click.option("--recipe", default="default", show_default=True, metavar="NAMES")
@click.option("--settings", default="", metavar="FACTOR=VALUE...", help="Of every cell.")
@click.option("--seeds", default="15", show_default=True, metavar="N|LIST")
@click.option("--shards", default=3, show_default=True, help="Jobs that the seeds are dealt to.")
@click.option("--groups", default=None, metavar="LISTS",
              help="Probes of a job, lists separated by spaces.  [default: stages, then training]")  # fmt: skip
@click.option("--pins", default="", metavar="REQUIREMENTS", help="As mlx-lm==0.32.2.")
@click.option("--newest", is_flag=True, help="The newest releases instead of the tested ones.")
@click.option("--python", default="3.12", show_default=True, help="Interpreter of the jobs.")
@click.option("--trainer", default="", metavar="OWNER/REPOSITORY",
              help="Trainer under test; `.` where the workflow checks it out.")  # fmt: skip
@click.option("--trainer-ref", default="", metavar="REF", help="Branch, tag or commit of it.")
@click.option("--harness", default=Path(), type=_FOLDER, show_default="here",
              help="Folder with pyproject.toml and constraints.txt of mlx-parity.")  # fmt: skip
@click.option("--out", default=Path("plan"), show_default=True, type=_NEW)
def plan(
    runners: str, subject: str, reference: str, recipe: str, settings: str, seeds: str,
    shards: int, groups: str | None, pins: str, newest: bool, python: str,
    trainer: str, trainer_ref: str, harness: Path, out: Path,
) -> None:  # fmt: skip
    """Write what is to be run and installed; print the matrix of jobs.

    The lines on stdout are for `$GITHUB_OUTPUT`: `jobs` and `runners`. `plan.json` lists all cells, so
    that those of a job that never came are missing in the report; `constraints.txt` and
    `requirements.txt` hold one version of each package for all jobs.

    \b
    Examples:
      parity ci plan --runners macos-26 --seeds 5 --shards 1
      parity ci plan --subject "unsloth@2026.5.2 unsloth@2026.10.9" --reference mlx-lm
      parity ci plan --subject my_trainer:Path --trainer owner/my-trainer --trainer-ref main
    """  # noqa: D301
    from parity.cells.plan import write_plan
    from parity.ci import jobs, versions
    from parity.files import write_atomically

    wanted = jobs.read_request(
        runners,
        subject,
        reference,
        recipe,
        groups or " ".join(jobs.GROUPS),
        seeds,
        shards,
        settings,
    )
    listed, cells = jobs.outputs(wanted), jobs.plan(wanted)
    chosen = versions.pins(pins)
    fixed = (
        versions.newest(harness / "pyproject.toml", chosen, python)
        if newest
        else versions.constraints((harness / "constraints.txt").read_text("utf-8"), chosen)
    )
    # unsloth-zoo is installed without what it requires, by a step of its own.
    needed = [pin for pin in chosen if not pin.startswith("unsloth")]
    if trainer and trainer != ".":
        needed.append(versions.commit(trainer, trainer_ref))
    write_plan(cells, out)
    write_atomically(out / "constraints.txt", fixed.encode())
    write_atomically(out / "requirements.txt", "\n".join([*needed, ""]).encode())
    click.echo(listed, nl=False)


@ci.command()
@click.option("--arguments", required=True, metavar="TEXT", help="Of `parity run`, quoted.")
@click.option("--out", default=Path("shard"), show_default=True, type=_NEW)
def shard(arguments: str, out: Path) -> None:
    """Run the cells of one job: `parity run` with the arguments of a job.

    Exit code 0 also where cells diverge, which the job that puts all together reports once; 3 where
    cells are missing or in error. What was written counts, then how the process ended.

    \b
    Example:
      parity ci shard --arguments "--subject mlx --reference mlx-lm --probes 02 --seeds 2"
    """  # noqa: D301
    from parity.ci import jobs

    words = [*shlex.split(arguments), "--out", str(out)]
    click.echo(shlex.join(["parity", "run", *words]), err=True)
    done = subprocess.run([sys.executable, "-m", "parity.cli", "run", *words])
    code, reason = jobs.outcome(out, done.returncode)
    if reason:
        click.echo(reason, err=True)
    sys.exit(code)


@ci.command()
@click.argument("folders", metavar="FOLDER...", type=_FOLDER, nargs=-1, required=True)
def annotate(folders: tuple[Path, ...]) -> None:
    """Print annotations of folders of records, at most one for each probe and pair.

    Where there are several, as of several runners, an annotation says of which of them it is, by name.

    \b
    Examples:
      parity ci annotate merged
      parity ci annotate merged/macos-26 merged/macos-15
    """  # noqa: D301
    from parity.ci.annotations import workflow_commands
    from parity.ci.jobs import read

    for line in workflow_commands({folder.resolve().name: read(folder) for folder in folders}):
        click.echo(line)


@ci.command()
@click.argument("before", type=click.Path(path_type=Path))
@click.argument("now", type=_FOLDER)
def moved(before: Path, now: Path) -> None:
    """Say in Markdown which package moved between the records of BEFORE and those of NOW.

    The versions are those that the processes reported. Where cells that were green are not any more,
    the commands are printed that search between the releases.

    \b
    Example:
      parity ci moved last merged
    """  # noqa: D301
    from parity.ci.jobs import read
    from parity.ci.versions import changed_cell, moved_text, versions
    from parity.ci.versions import moved as found

    click.echo("### Packages\n")
    if not before.is_dir() or not any(before.iterdir()):
        click.echo("There is no run before this one to compare with.\n")
        return
    old, new = read(before), read(now)
    changes = found(versions(old), versions(new))
    click.echo(moved_text(changes, changed_cell(old, new)))
