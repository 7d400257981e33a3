"""The `parity` command. Each command imports what it needs when it runs, so that help is quick."""

from __future__ import annotations

import atexit
import gc
import shlex
import sys
from typing import Any, NoReturn

import click

from parity import __version__
from parity.commands.adapter import adapter
from parity.commands.audit import audit, check_path
from parity.commands.bisect import bisect
from parity.commands.cache import cache
from parity.commands.capture import capture
from parity.commands.ci import ci
from parity.commands.compare import compare
from parity.commands.merge import merge
from parity.commands.options import (
    EXIT_GREEN,
    EXIT_MISSING,
    EXIT_STOPPED,
    EXIT_USAGE,
    end_at_once,
)
from parity.commands.replay import replay
from parity.commands.report import report
from parity.commands.run import run
from parity.commands.show import contract, factors, list_, new_path
from parity.commands.sweep import sweep
from parity.errors import CaptureError, DiskFull, UnmatchedNames, Unsupported, UsageError


class Group(click.Group):
    """Shows errors without a traceback: wrong use in one line, a failed capture with its detail.

    Ctrl-C ends any command with exit code 130.

    Other exceptions are bugs and keep their traceback.
    """

    def invoke(self, context: click.Context) -> Any:
        """Runs the command."""
        try:
            return super().invoke(context)
        except (UsageError, Unsupported) as error:
            _exit(EXIT_USAGE, str(error))
        except (CaptureError, UnmatchedNames) as error:
            lines = [str(error), getattr(error, "detail", "").rstrip(), f"reproduce: {_command()}"]
            _exit(EXIT_MISSING, *filter(None, lines))
        except DiskFull as error:
            _exit(EXIT_MISSING, f"{error}; to go on: {_command()}")
        except click.exceptions.NoArgsIsHelpError:
            raise
        except click.UsageError as error:
            inner = error.ctx.command_path if error.ctx else context.command_path
            _exit(EXIT_USAGE, f"{_one_line(error.format_message())} (see `{inner} --help`)")
        except BrokenPipeError:
            sys.exit(EXIT_GREEN)
        except KeyboardInterrupt:
            click.echo(f"stopped; to start again: {_command()}", err=True)
            end_at_once(EXIT_STOPPED)


def _exit(code: int, *lines: str) -> NoReturn:
    click.echo("parity: " + "\n".join(lines), err=True)
    sys.exit(code)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _command() -> str:
    return shlex.join(["parity", *sys.argv[1:]])


_EPILOG = """\b
Examples:
  parity run                                   all probes, mlx against mlx-lm and hf, 3 seeds
  parity run --reference mlx-lm --seeds 15     bit-identity with the CLI on fifteen seeds
  parity run --probes 02,05 --set model.source=smollm2-135m
  parity run --subject my_trainer:Path         a trainer of your own
  parity bisect --reference hf --shipped       what makes two stacks differ
  parity check-path my_trainer:Path            whether it is fit to be judged
  parity audit my_trainer:Path                 knobs without effect, or with another
  parity sweep                                 all architectures, transformers against mlx-lm
  parity replay                                known cases with known causes
  parity report reports/run-1                  the report of a folder of records
  parity merge shards/* --out whole            the runs of several machines as one
  parity adapter check adapters                what a saved adapter is, and what is wrong
  parity cache                                 what is kept of earlier runs, and its size
  parity list                                  paths, probes, models, data, recipes
\b
Exit codes: 0 everything green, 1 something diverges or is inconclusive,
2 wrong use, 3 cells missing or in error, records damaged, or nothing was
compared (all skipped: the reason says what to install), 130 stopped by Ctrl-C.
\b
A path is one implementation of LoRA fine-tuning; a probe is a numbered
question about one stage. `parity COMMAND --help` has examples.
"""


@click.group(cls=Group, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="parity")
def main() -> None:
    """Tells whether an MLX fine-tuning path does the same thing as its reference."""
    # Modules and records are many objects that stay: looking for cycles among them, all along and once
    # more at the end, took a fifth of a run whose captures are kept.
    gc.set_threshold(50_000, 20, 100)
    atexit.register(gc.freeze)


commands = (
    run, bisect, check_path, audit, replay, report, merge, capture, compare, adapter, cache, list_, factors,
    contract, new_path, ci, sweep,
)  # fmt: skip
for command in commands:
    main.add_command(command)


if __name__ == "__main__":
    main()
