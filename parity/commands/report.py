"""`parity report`: the report of a folder of records."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import click

from parity.commands.options import OUT_FOLDER


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--against", type=click.Path(path_type=Path, exists=True, file_okay=False),
              metavar="OLD", help="An earlier run: say what changed since.")  # fmt: skip
@click.option("--format", "formats", default="", metavar="LIST",
              help="Some of json,csv,parquet,junit,markdown,html.  [default: all]")  # fmt: skip
@click.option("--out", type=OUT_FOLDER,
              help="Folder of the files.  [default: FOLDER]")  # fmt: skip
def report(folder: Path, against: Path | None, formats: str, out: Path | None) -> None:
    """Make the report of a FOLDER of records.

    It is written as HTML, Markdown, JSON, CSV, Parquet and JUnit's XML, and printed. FOLDER is one of
    `parity run` or `parity merge`, or holds several.

    A record whose verdict does not follow from its metrics is named and set aside; the exit code is
    then 3. With --against the exit code is that of FOLDER alone.

    \b
    Examples:
      parity report reports/run-2026-01-31
      parity report shards         folders of several machines, put below one
      parity report tonight --against yesterday
      parity report whole --format markdown,junit --out summary
    """  # noqa: D301
    from parity.report import terminal
    from parity.report.write import parse_formats, write
    from parity.results.changes import changes
    from parity.results.folder import read

    wanted = parse_formats(formats)
    run, records = read([folder])
    result = run.aggregate(records)
    if against:
        old, records = read([against])
        result = replace(result, changes=changes(result, old.aggregate(records)))
    files = write(result, out or folder, wanted)
    terminal.render(result, terminal.console())
    click.echo("wrote " + ", ".join(str(file) for file in files))
    sys.exit(result.exit_code)
