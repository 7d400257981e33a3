"""`parity report`: the report of a folder of records."""

from __future__ import annotations

import sys
from pathlib import Path

import click


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
def report(folder: Path) -> None:
    """Make the report of a FOLDER of records.

    It is written as Markdown, HTML, JSON and CSV, and printed.

    Folders below it are read too, so that the shards of several machines make one report. A record
    whose verdict does not follow from its metrics is named and set aside; the exit code is then 3.

    \b
    Examples:
      parity report reports/run-2026-01-31
      parity report shards         folders of several machines, put below one
    """  # noqa: D301
    from parity.report import terminal
    from parity.report.write import write
    from parity.results.folder import read

    run, records = read([folder])
    result = run.aggregate(records)
    files = write(result, folder)
    terminal.render(result, terminal.console())
    click.echo("wrote " + ", ".join(str(file) for file in files))
    sys.exit(result.exit_code)
