"""The `parity` command. Heavy modules are imported inside the commands that need them."""

from __future__ import annotations

import sys
from typing import Any

import click

from parity import __version__
from parity.commands.bisect import bisect
from parity.commands.capture import capture
from parity.commands.options import EXIT_GREEN, EXIT_USAGE
from parity.commands.replay import replay
from parity.commands.report import report
from parity.commands.run import run
from parity.commands.show import contract, factors, list_, new_path
from parity.errors import UsageError


class Group(click.Group):
    """Turns the errors a person can mend into one line and exit code 2."""

    def invoke(self, context: click.Context) -> Any:
        """Runs the command."""
        try:
            return super().invoke(context)
        except UsageError as error:
            raise _Usage(str(error)) from None
        except BrokenPipeError:
            sys.exit(EXIT_GREEN)


class _Usage(click.ClickException):
    exit_code = EXIT_USAGE

    def show(self, file: Any = None) -> None:
        click.echo(f"parity: {self.format_message()}", err=True)


_EPILOG = """\b
Examples:
  parity run                                   all probes, mlx against mlx-lm and hf, 3 seeds
  parity run --reference mlx-lm --seeds 15     bit-identity with the CLI on fifteen seeds
  parity run --probes 02,05 --set model.source=smollm2-135m
  parity run --subject my_trainer:Path         a trainer of your own
  parity bisect --reference hf --shipped       what makes two stacks differ
  parity replay                                cases that people have met
  parity list                                  paths, probes, models, data, recipes
\b
Exit codes: 0 everything green, 1 something diverges or is inconclusive,
2 wrong use, 3 cells missing or in error.
"""


@click.group(cls=Group, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="parity")
def main() -> None:
    """Tells whether an MLX fine-tuning path does the same thing as its reference."""


for command in (run, bisect, replay, report, capture, list_, factors, contract, new_path):
    main.add_command(command)


if __name__ == "__main__":
    main()
