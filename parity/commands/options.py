"""Exit codes and options that commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])

EXIT_GREEN, EXIT_NOT_GREEN, EXIT_USAGE, EXIT_MISSING = 0, 1, 2, 3


def recipe_options(command: Any) -> Any:
    """`--recipe` and `--set`."""
    for option in (
        click.option("--set", "settings", multiple=True, metavar="FACTOR=VALUE",
                     help="Change a factor of the recipe, e.g. lora.num_layers=16."),
        click.option("--recipe", default="default", show_default=True, metavar="NAME|FILE",
                     help="A recipe of the fixtures or a TOML file."),
    ):  # fmt: skip
        command = option(command)
    return command


seeds_option = click.option(
    "--seeds",
    default="3",
    show_default=True,
    metavar="N|LIST",
    help="How many seeds (up to 15), or the seeds themselves: 3407,0,1.",
)

probes_option = click.option(
    "--probes", multiple=True, metavar="LIST", help="Numbers or names, e.g. 02,05.  [default: all]"
)


def _choose_device(_: click.Context, __: click.Parameter, name: str | None) -> None:
    from parity.capture import devices

    devices.choose(name)


device_option = click.option(
    "--device",
    metavar="cpu|cuda",
    expose_value=False,
    callback=_choose_device,
    help="Where hf and trl compute; MLX chooses by itself.  [default: cpu]",
)


def out_option(folder: str) -> Callable[[Command], Command]:
    """`--out`, the folder of the result."""
    return click.option(
        "--out",
        default=Path(folder),
        show_default=True,
        type=click.Path(path_type=Path, file_okay=False),
        help="Folder of the result.",
    )


timeout_option = click.option(
    "--timeout",
    default=600.0,
    show_default=True,
    type=click.FloatRange(1),
    help="Seconds a capture may take.",
)
