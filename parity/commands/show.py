"""`parity list` and `parity factors`: the names that other commands take."""

from __future__ import annotations

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

    for name, value in recipes.load(recipe, settings).factors().items():
        click.echo(f"{name} = {json.dumps(value, ensure_ascii=False)}")
