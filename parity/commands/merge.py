"""`parity merge`: the folders of many runs as one."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from parity.commands.options import OUT_FOLDER


@click.command()
@click.argument("folders", nargs=-1, required=True, metavar="DIR…",
                type=click.Path(path_type=Path, exists=True, file_okay=False))  # fmt: skip
@click.option("--out", required=True, type=OUT_FOLDER,
              help="Folder of the whole run, which does not exist yet.")  # fmt: skip
def merge(folders: tuple[Path, ...], out: Path) -> None:
    """Put the runs of several machines into one folder.

    Each DIR holds one or more folders of `parity run`, whole or copied. The result is one folder for
    `parity report`, the same bytes whatever the order of DIR…. Records found twice count once;
    several of one cell are kept, and the worst counts. Damaged files are named and left out, and cells
    of the plans without a record are missing: the exit code is 3 then, as it is for the report.

    \b
    Examples:
      parity merge shards/* --out whole
      parity merge mac linux cuda --out whole && parity report whole
    """  # noqa: D301
    from parity.results.folder import read
    from parity.results.merge import merge

    merge(folders, out)
    run, records = read([out])
    result = run.aggregate(records)
    for line in result.damaged:
        click.echo(f"damaged: {line}", err=True)
    for line in result.problems:
        click.echo(f"warning: {line}", err=True)
    number = f"{records.size:,} record{'s' * (records.size != 1)}"
    click.echo(f"wrote {out}: {number}; {result.reason}")
    sys.exit(result.exit_code)
