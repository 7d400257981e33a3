"""`parity list` and `parity factors`: the names that other commands take."""

from __future__ import annotations

from pathlib import Path

import click

from parity.commands.options import (
    recipe_options,
)


@click.command("list")
def list_() -> None:
    """Show the names that other commands take.

    Paths, probes, models, data, recipes and scenarios; and the folder of the cache.

    \b
    Example:
      parity list
    """  # noqa: D301
    from parity import resources
    from parity.paths.registry import registered
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


@click.command()
@recipe_options
def factors(recipe: str, settings: tuple[str, ...]) -> None:
    """Show every factor of a recipe.

    \b
    Examples:
      parity factors
      parity factors --recipe smollm2 --set lora.rank=4
    """  # noqa: D301
    import json

    from parity import recipe as recipes
    from parity.paths.registry import installed_knobs

    for name, value in recipes.load(recipe, settings, installed_knobs()).factors().items():
        click.echo(f"{name} = {json.dumps(value, ensure_ascii=False)}")


@click.command()
@click.argument("methods", nargs=-1, metavar="[METHOD]...")
def contract(methods: tuple[str, ...]) -> None:
    """Show what each method of a path takes and gives.

    Names, shapes and dtypes of its inputs and outputs, and the factors that it reads.

    \b
    Examples:
      parity contract
      parity contract train gradient
    """  # noqa: D301
    from parity.paths.contract import table

    click.echo(table(methods))


@click.command("new-path")
@click.argument("name")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False),
              help="A file that does not exist yet.  [default: print it]")  # fmt: skip
@click.option("--methods", is_flag=True,
              help="A class with every method of the contract, for what is neither on MLX nor on torch.")  # fmt: skip
def new_path(name: str, out: Path | None, methods: bool) -> None:
    """Write the skeleton of a path of your own.

    It runs your trainer as a whole, and lists what it may take and what may be left out.

    \b
    Examples:
      parity new-path my-trainer --out my_trainer_path.py
      parity new-path my-trainer --methods --out my_trainer_path.py
      parity run --subject my_trainer_path:MyTrainer --reference mlx-lm
    """  # noqa: D301
    from parity.errors import UsageError
    from parity.paths import skeleton

    text = skeleton.skeleton(name) if methods else skeleton.trainer(name)
    if out is None:
        click.echo(text, nl=False)
        return
    if out.exists():
        raise UsageError(f"{out} exists: give --out a file that does not")
    out.write_text(text, encoding="utf-8")
    subject = f"{out.stem}:{skeleton.class_name(name)}"
    click.echo(f"wrote {out}: parity run --subject {subject} --reference mlx-lm")
