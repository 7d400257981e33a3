"""`parity bisect`: what a person types and sees. The answer goes to stdout, progress to stderr."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from parity.options import EXIT_GREEN, EXIT_NOT_GREEN, recipe_options

if TYPE_CHECKING:
    from parity.recipe import Recipe


@click.command()
@click.option("--subject", default="mlx", show_default=True, help="The path under question.")
@click.option("--reference", default="mlx-lm", show_default=True, help="What it is held against.")
@recipe_options
@click.option(
    "--set-subject", multiple=True, metavar="FACTOR=VALUE", help="Change a factor of the subject."
)
@click.option("--shipped", "as_shipped", is_flag=True, help="Let each path use its own defaults.")
@click.option(
    "--check",
    "command",
    metavar="COMMAND",
    help="Ask a command instead: it finds the recipe in $PARITY_RECIPE and exits with 0 (agrees), "
    "125 (cannot tell) or another code (differs).",
)
@click.option("--seed", default=3407, show_default=True, type=click.IntRange(0, 2**32 - 1))
@click.option(
    "--repeats",
    default=1,
    show_default=True,
    type=click.IntRange(1, 20),
    help="How often each question is asked; answers that disagree end in `inconclusive`.",
)
@click.option(
    "--out",
    default=Path("reports/bisect"),
    show_default=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of the result.",
)
@click.option(
    "--timeout",
    default=600.0,
    show_default=True,
    type=click.FloatRange(1),
    help="Seconds a capture may take.",
)
def bisect(
    recipe: str, settings: tuple[str, ...], set_subject: tuple[str, ...], seed: int, out: Path,
    **asked: Any,
) -> None:  # fmt: skip
    """Find what makes a subject differ from its reference.

    Stages first, in the order in which data flows; then the factors in which the two recipes differ,
    every minimal set of them; then, where no factor explains it, the module, tensor or step.

    \b
    Examples:
      parity bisect --reference hf --shipped
      parity bisect --set-subject lora.num_layers=16 --set-subject optim.weight_decay=0.01
      parity bisect --reference hf --recipe smollm2 --set model.source=smollm2-135m-as-saved
      parity bisect --set-subject lora.rank=4 --check './my-check.sh "$PARITY_RECIPE"'
    """  # noqa: D301
    from parity import recipe as recipes
    from parity.run import sides

    shared = recipes.load(recipe, settings).override({"seed.value": seed})
    changes = sides([("subject", text) for text in set_subject]).get("subject", {})
    shared.override(changes)
    try:
        verdict = _ask(shared, changes, recipe, out, **asked)
    except KeyboardInterrupt:
        click.echo("stopped; the same command goes on where it was", err=True)
        sys.exit(130)
    sys.exit(EXIT_GREEN if verdict == "agree" else EXIT_NOT_GREEN)


def _ask(
    shared: Recipe, changes: dict[str, Any], origin: str, out: Path, *,
    subject: str, reference: str, as_shipped: bool, command: str | None, repeats: int, timeout: float,
) -> str:  # fmt: skip
    """Runs the search, prints the answer, and returns the verdict."""
    from parity.bisect import check
    from parity.bisect.causes import Bisection, shipped
    from parity.engine import Engine
    from parity.engine import check as find_wrong_use

    if command:
        search = check.search(command, shared, changes, max(2, repeats), _watch, timeout)
        for cause in search.causes:
            click.echo(f"{' together with '.join(cause)} makes the command say that they differ")
        if not search.causes:
            click.echo(f"{search.verdict}: {search.reason}")
        return search.verdict
    find_wrong_use([subject, reference], shared)
    with Engine(timeout=timeout, log_dir=out / "logs") as engine:
        if as_shipped:
            shared, own = shipped(engine, subject, reference, shared)
            changes = {**own, **changes}
        click.echo(f"{len(changes)} factors differ: {', '.join(changes) or 'none'}", err=True)
        bisection = Bisection(
            engine, subject, reference, shared, changes, _watch, repeats, origin, notice=_notice
        )
        report = bisection.search()
    click.echo(report.answer())
    click.echo("wrote " + ", ".join(map(str, report.save(out))), err=True)
    return report.verdict


def _watch(what: str, done: int, left: int) -> None:
    """One line a question: what is known so far, what is asked, what is left."""
    click.echo(f"  run {done + 1}, about {left} left  {what}", err=True)


def _notice(text: str) -> None:
    click.echo(text, err=True)
