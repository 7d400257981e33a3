"""Exit codes and options that commands share."""

from __future__ import annotations

import functools
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])

EXIT_GREEN, EXIT_NOT_GREEN, EXIT_USAGE, EXIT_MISSING, EXIT_STOPPED = 0, 1, 2, 3, 130


def end_at_once(code: int) -> NoReturn:
    """Ends the process, also where a thread waits for another process's lock or an installation."""
    sys.stdout.flush()
    sys.stderr.flush()
    if threading.active_count() > 1:
        os._exit(code)
    sys.exit(code)


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


PARTS = (
    "loader", "wiring", "batching", "loss", "clip", "optimizer", "saver", "reader", "fuse",
)  # fmt: skip


def part_options(command: Command) -> Command:
    """`--subject-loss my_trainer:loss_fn` and the like: the command takes their words as `swaps`."""

    @functools.wraps(command)
    def with_swaps(**named: Any) -> Any:
        given = {part: named.pop(f"subject_{part}") for part in PARTS}
        swaps = [f"+{part}={spec}" for part, spec in given.items() if spec]
        return command(**{**named, "subject": named["subject"] + "".join(swaps)})

    wrapped: Any = with_swaps
    for part in reversed(PARTS):
        wrapped = click.option(
            f"--subject-{part}", metavar="MODULE:FUNCTION|PATH",
            help=f"The subject's {part}: a function of yours, or that of another path.",
        )(wrapped)  # fmt: skip
    return wrapped  # type: ignore[no-any-return]


seeds_option = click.option(
    "--seeds",
    default="3",
    show_default=True,
    metavar="N|LIST",
    help="How many seeds (1 to 15), or the seeds themselves with a comma: 3407,0,1 or 99,",
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


_PROFILE = "parity.profile"


def _begin_profile(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    if not wanted:
        return
    from parity import timing

    timeline = context.meta[_PROFILE] = timing.start(imports=True)
    begun = timing.Span("main", timing.IMPORT, "the command", timing.BORN, time.monotonic())
    timeline.add([begun])
    context.call_on_close(timing.stop)


profile_option = click.option(
    "--profile",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_begin_profile,
    help="Write where the wall time went: profile.html and profile.json beside the report.",
)


def write_profile(folder: Path) -> None:
    """Ends what `--profile` began, writes it and prints its table on stderr; nothing without it."""
    timeline = click.get_current_context().meta.pop(_PROFILE, None)
    if timeline is None:
        return
    from parity import timing

    end = time.monotonic()
    timing.stop()
    from parity.report import profile

    found = profile.profile(timeline.spans, timing.BORN, end)
    files = profile.save(folder, found)
    click.echo(profile.text(found), err=True)
    click.echo("wrote " + ", ".join(map(str, files)), err=True)


class OutPath(click.Path):
    """A file or folder that a command makes; that it can be made is seen before any work."""

    def convert(
        self, value: Any, param: click.Parameter | None, context: click.Context | None
    ) -> Any:
        """Checks the nearest folder that is there."""
        from parity.files import unwritable

        found = Path(os.fsdecode(super().convert(value, param, context)))
        if why := unwritable(found if self.dir_okay else found.parent):
            self.fail(f"{why}: give another place.", param, context)
        return found


OUT_FOLDER, OUT_FILE = OutPath(file_okay=False), OutPath(dir_okay=False)


def out_option(folder: str) -> Callable[[Command], Command]:
    """`--out`, the folder of the result."""
    return click.option(
        "--out",
        default=Path(folder),
        show_default=True,
        type=OUT_FOLDER,
        help="Folder of the result.",
    )


class JobsRange(click.IntRange):
    """A number of processes, or `auto`, which is 0."""

    def convert(
        self, value: Any, param: click.Parameter | None, context: click.Context | None
    ) -> Any:
        """Takes the word, else as a number."""
        return 0 if value == "auto" else super().convert(value, param, context)


jobs_option = click.option(
    "--jobs",
    default="auto",
    show_default=True,
    type=JobsRange(1, 64),
    metavar="auto|N",
    help="Processes that compute at once; auto: as many as there are cores and free memory for, a "
    "GPU's included.",
)


timeout_option = click.option(
    "--timeout",
    default=600.0,
    show_default=True,
    type=click.FloatRange(1),
    help="Seconds a capture may take.",
)
