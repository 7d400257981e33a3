"""`parity audit` and `parity check-path`: whether a path does what it says of itself."""

from __future__ import annotations

import json
import sys

import click

from parity.commands.options import (
    EXIT_GREEN,
    EXIT_MISSING,
    EXIT_NOT_GREEN,
    device_option,
    timeout_option,
)


@click.command()
@click.argument("path")
@click.option("--factors", multiple=True, metavar="LIST",
              help="Names of factors or sections, e.g. optim,lora.rank.  [default: all]")  # fmt: skip
@click.option("--set", "settings", multiple=True, metavar="FACTOR=VALUE",
              help="Change the small recipe that factors are moved in.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@device_option
@timeout_option
def audit(
    path: str, factors: tuple[str, ...], settings: tuple[str, ...], as_json: bool, timeout: float
) -> None:
    """Move each factor that PATH honours, and see what changes.

    Named are factors without any effect, factors that change something else than they do on another
    path, and defaults that are not in effect. A factor is called swallowed only where the same move
    with the same inputs has an effect on hf or mlx.

    \b
    Exit codes:
      0  every factor was moved and had its effect, or was refused
      1  a factor is swallowed or has another effect, or a default is another one
      2  wrong use
      3  of a factor it is not known what it does

    \b
    Examples:
      parity audit my_trainer:Path
      parity audit unsloth@2026.5.2 --factors lora,optim.clip
      parity audit mlx-lm --factors optim --json
    """  # noqa: D301
    from parity.audit.audit import WRONG, Auditor, Status
    from parity.audit.moves import moves, named
    from parity.capture import checks
    from parity.capture import engine as engines
    from parity.errors import UsageError
    from parity.files import to_json
    from parity.paths.registry import resolve
    from parity.recipe import parse_setting
    from parity.report import audit as report

    checks.check_fitness(path)
    names = [part.strip() for name in factors for part in name.split(",")]
    known = [move.factor for move in moves(resolve(path))]
    if lost := [name for name in names if not any(named(f, name) for f in known)]:
        raise UsageError(
            f"--factors {lost[0]!r}: path {path!r} honours {', '.join(dict.fromkeys(known))}"
        )
    with engines.Engine(timeout=timeout) as engine:
        changes = dict(parse_setting(text) for text in settings)
        auditor = Auditor(engine, path, changes, lambda f: click.echo(report.line(f), err=True))
        found = auditor.audit(names)
    click.echo(json.dumps(json.loads(to_json(found))) if as_json else report.text(found))
    if found.named(*WRONG) or found.defaults:
        sys.exit(EXIT_NOT_GREEN)
    doubtful = found.named(Status.FAILED, Status.NO_EFFECT, Status.NOT_SEEN)
    not_known = doubtful or found.not_moved or found.not_known
    sys.exit(EXIT_MISSING if not_known else EXIT_GREEN)


@click.command("check-path")
@click.argument("path")
@device_option
@timeout_option
def check_path(path: str, timeout: float) -> None:
    """Tell whether PATH is fit to be judged.

    On a tiny model: whether what it gives fits the contract and which stages it can be judged at,
    whether it repeats itself and its seed has an effect, which settings are known, whether each part
    that could be swapped is the one that it uses, and whether the bare trainer and the watched one end
    in the same bytes. Exit code 1: a check is not passed.

    \b
    Examples:
      parity check-path my_trainer:Path
      parity check-path mlx-lm
    """  # noqa: D301
    from parity.audit.fitness import Examiner
    from parity.capture import checks
    from parity.capture import engine as engines
    from parity.report import audit as report

    checks.check_fitness(path)
    with engines.Engine(timeout=timeout) as engine:
        examiner = Examiner(engine, path, lambda found: click.echo(report.check(found)))
        found = examiner.examine()
    click.echo(report.fitness(found))
    sys.exit(EXIT_NOT_GREEN if found.wrong() else EXIT_GREEN)
