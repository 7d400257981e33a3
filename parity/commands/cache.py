"""`parity cache`: what the cache holds, and how it is kept small."""

from __future__ import annotations

import json
from datetime import datetime
from typing import TYPE_CHECKING

import click

from parity.errors import UsageError

if TYPE_CHECKING:
    from parity.capture.storage import Contents, Entry

_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group(invoke_without_command=True)
@_json_option
@click.pass_context
def cache(context: click.Context, as_json: bool) -> None:
    """Show what the cache holds, or prune it.

    Captures are kept by content, so that none is run twice. While a command
    makes captures, those used least recently are removed, so that the cache
    holds at most $PARITY_CACHE_LIMIT (20GB). $PARITY_CACHE names the folder.

    \b
    Examples:
      parity cache                       number, size and last use of what it holds
      parity cache --json
      parity cache prune --limit 5GB     remove the captures used least recently
      parity cache prune --all           remove all that no running command uses
    """  # noqa: D301
    if context.invoked_subcommand is not None:
        return
    from parity import resources
    from parity.capture import storage

    found, most = storage.contents(resources.cache()), storage.limit()
    if as_json:
        click.echo(json.dumps(_data(found, most), indent=1))
        return
    click.echo(f"{found.folder}: {storage.shown(found.size)} of at most {storage.shown(most)}")
    rows = [(storage.KINDS[kind], entries) for kind, entries in found.entries.items() if entries]
    rows += [("left behind by killed commands, and locks", found.left)] if found.left else []
    for title, entries in rows:
        times = " to ".join(dict.fromkeys(_day(t) for t in _span(entries)))
        size = storage.shown(sum(entry.size for entry in entries))
        click.echo(f"  {title:<42} {len(entries):>7,}  {size:>8}  last used {times}")
    if found.left:
        click.echo("`parity cache prune` removes what was left behind")


@cache.command()
@click.option("--limit", "size", metavar="SIZE",
              help="What the cache may hold, as 5GB, 500MB or 2GiB.  [default: $PARITY_CACHE_LIMIT, else 20GB]")  # fmt: skip
@click.option("--all", "everything", is_flag=True, help="Remove all that no running command uses.")
@_json_option
def prune(size: str | None, everything: bool, as_json: bool) -> None:
    """Remove captures used least recently, and what killed commands left behind.

    What a running command has used in the last quarter of an hour stays, whatever the limit. Kernels,
    checkpoints and environments are removed with --all alone, and only while no command runs.

    \b
    Examples:
      parity cache prune                 down to the limit
      parity cache prune --limit 5GB
      parity cache prune --all
    """  # noqa: D301
    from parity import resources
    from parity.capture import storage

    if everything and size is not None:
        raise UsageError(f"--limit {size} with --all: give one of them")
    most = storage.limit(size)
    done = storage.prune(resources.cache(), most, everything)
    if as_json:
        click.echo(json.dumps({"removed": done.count, "bytes": done.size, "kept": done.kept}))
        return
    click.echo(
        f"removed {done.count:,} files and folders, {storage.shown(done.size)}; "
        f"{storage.shown(done.kept)} are left"
    )
    if done.kept > most and not everything:
        click.echo(
            "that is over the limit: the rest is in use, or no capture (`parity cache prune --all`)"
        )


def _data(found: Contents, most: int) -> dict[str, object]:
    kinds = {**found.entries, "left behind": found.left}
    return {
        "folder": str(found.folder),
        "bytes": found.size,
        "limit": most,
        "kinds": {
            kind: {
                "count": len(entries),
                "bytes": sum(entry.size for entry in entries),
                "last_used": _span(entries),
            }
            for kind, entries in kinds.items()
        },
    }


def _span(entries: list[Entry]) -> list[float]:
    """When the entry that was used least recently was used, and the one used last; seconds since 1970."""
    times = [entry.used for entry in entries]
    return [min(times), max(times)] if times else []


def _day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d")
