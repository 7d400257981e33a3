"""`parity adapter check`: an adapter that somebody hands over, checked without training anything."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from parity.commands.options import (
    EXIT_GREEN,
    EXIT_MISSING,
    EXIT_NOT_GREEN,
    device_option,
    timeout_option,
)

if TYPE_CHECKING:
    from parity.adapters.check import Result


@click.group()
def adapter() -> None:
    """Look at adapters that are saved already.

    \b
    Examples:
      parity adapter check adapters                  what it is, what is wrong
      parity adapter check adapters --base my-model  with a real loader
    """  # noqa: D301


@adapter.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--base", metavar="MODEL",
              help="The model that it is for: a fixture's name, a folder or a hub id.")  # fmt: skip
@click.option("--against", metavar="DIR", type=click.Path(path_type=Path),
              help="Another artefact that should do the same.")  # fmt: skip
@click.option("--loader", metavar="PATH",
              help="The path whose loader is used.  [default: that of what wrote it]")  # fmt: skip
@click.option("--files-only", is_flag=True, help="Start no loader: logits are not measured.")
@click.option("--json", "as_json", is_flag=True, help="The result as JSON on stdout.")
@click.option("--junit", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False),
              help="Also write the result as JUnit's XML.")  # fmt: skip
@device_option
@timeout_option
def check(
    folder: Path,
    base: str | None,
    against: Path | None,
    loader: str | None,
    files_only: bool,
    as_json: bool,
    junit: Path | None,
    timeout: float,
) -> None:
    """Check an adapter, or a fused model, that is saved in DIR.

    DIR is what mlx-lm, PEFT, unsloth-zoo or TRL leave. The answer says what it is and what is wrong: settings that contradict the tensors, a lost scale, layers counted from the wrong
    end, names that no module takes, wrong shapes, NaN, no effect, a fuse that changed nothing.

    With --base its names and shapes are compared with the model's, and a real loader loads both and
    measures what the adapter does to the logits. Without it much cannot be told, and the answer
    lists what.

    Exit codes: 0 nothing wrong was found in what was checked, 1 findings, 2 wrong use or damaged
    files, 3 nothing wrong was found, but a loader or a comparison that was wanted could not run.

    \b
    Examples:
      parity adapter check adapters
      parity adapter check adapters --base ~/models/my-model
      parity adapter check adapters --base my-org/my-model --files-only --junit adapter.xml
      parity adapter check adapters --base tiny-gemma3 --against adapters-of-peft
      parity adapter check fused_model --base tiny-gemma3 --against adapters
    """  # noqa: D301
    from parity.adapters import check as checks
    from parity.adapters.junit import to_junit
    from parity.capture.engine import Engine
    from parity.errors import UsageError
    from parity.files import to_json, write_atomically
    from parity.paths.registry import resolve

    if loader is not None and (base is None or files_only):
        raise UsageError("--loader needs --base, and no --files-only: it loads the adapter into it")
    if loader is not None:
        resolve(loader)
    result = checks.check(
        folder, base, against, loader, None if files_only else lambda: Engine(timeout=timeout)
    )
    if junit is not None:
        write_atomically(junit, to_junit(result))
    if as_json:
        click.echo(to_json(result.as_dict()).decode())
    else:
        for line in lines(result):
            click.echo(line)
    if result.findings:
        sys.exit(EXIT_NOT_GREEN)
    sys.exit(EXIT_MISSING if result.lacking else EXIT_GREEN)


def lines(result: Result) -> list[str]:
    """A result as text."""
    found = [result.folder]
    found += [f"  {name:<14} {text}" for name, text in result.described.items()]
    found += [
        f"  {outcome.check:<14} {outcome.note}" for outcome in result.outcomes if outcome.note
    ]
    if result.findings:
        found.append("findings")
        found += [f"  {f.check:<14} {f.where}: {f.text}" for f in result.findings]
    if result.notes:
        found.append("notes")
        found += [f"  {note}" for note in result.notes]
    if result.unchecked:
        found.append("not checked, or not in full")
        found += [f"  {outcome.check:<14} {outcome.unchecked}" for outcome in result.unchecked]
    return [*found, result.sentence()]
