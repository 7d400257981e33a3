"""`parity compare`: what two machines captured, judged on a third."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from parity.commands.options import OUT_FOLDER
from parity.commands.run import run
from parity.errors import UsageError

_BUNDLE = click.Path(path_type=Path, exists=True, dir_okay=False)


@click.command()
@click.argument("subject", type=_BUNDLE)
@click.argument("reference", type=_BUNDLE)
@click.option("--out", type=OUT_FOLDER,
              help="Folder of the run.  [default: reports/run-…]")  # fmt: skip
@click.option("--expected", type=click.Path(path_type=Path, exists=True, dir_okay=False),
              help="Known divergences.  [default: the fixtures' file of each pair]")  # fmt: skip
@click.option("--no-expected", is_flag=True, help="Expect no divergence.")
@click.pass_context
def compare(
    context: click.Context,
    subject: Path,
    reference: Path,
    out: Path | None,
    expected: Path | None,
    no_expected: bool,
) -> None:
    """Compare the bundles SUBJECT and REFERENCE.

    Probes, seeds and recipe are those that both bundles were made for; what only one was made for is
    named. Neither framework nor model is needed. The records are those of `parity run` with both.

    \b
    Examples:
      parity compare mlx.bundle hf.bundle
      parity compare mlx.bundle hf.bundle --out whole/mac-against-cuda
    """  # noqa: D301
    from parity.capture.bundle import is_bundle, opened

    for file in (subject, reference):
        if not is_bundle(str(file)):
            raise UsageError(
                f"{file}: give a bundle of `parity capture`, whose name ends in .bundle"
            )
    made = [opened(str(file)).manifest for file in (subject, reference)]
    chosen = {name: _common(name, made, (subject, reference)) for name in ("probes", "seeds")}
    context.invoke(
        run,
        subject=str(subject),
        references=(str(reference),),
        seeds=",".join(map(str, chosen["seeds"])) + ",",
        probes=tuple(map(str, chosen["probes"])),
        recipe="default",
        settings=_settings(made, (subject, reference)),
        set_subject=(),
        set_reference=(),
        out=out,
        jobs=2,
        timeout=600.0,
        expected=expected,
        no_expected=no_expected,
    )


def _common(name: str, made: Sequence[Mapping[str, Any]], files: Sequence[Path]) -> list[int]:
    """What both were made for; what one alone was is named on stderr."""
    both = [n for n in made[0][name] if n in made[1][name]]
    for manifest, file in zip(made, files, strict=True):
        if alone := [str(n) for n in manifest[name] if n not in both]:
            click.echo(f"warning: {file} alone has {name} {', '.join(alone)}", err=True)
    if not both:
        raise UsageError(
            f"{files[0]} and {files[1]} have no {name} in common: capture them for some"
        )
    return both


def _settings(made: Sequence[Mapping[str, Any]], files: Sequence[Path]) -> tuple[str, ...]:
    """The recipe of both as settings of the default one."""
    from parity.recipe import Recipe

    ours, theirs = (manifest["factors"] for manifest in made)
    for name in ours.keys() & theirs.keys():
        if ours[name] != theirs[name] and name != "seed.value":
            raise UsageError(
                f"{name}={ours[name]!r} in {files[0]}, but {theirs[name]!r} in {files[1]}: "
                "capture both with one recipe"
            )
    default = Recipe().factors()
    return tuple(
        f"{name}={json.dumps(value, ensure_ascii=False)}"
        for name, value in {**theirs, **ours}.items()
        if name != "seed.value" and value is not None and default.get(name) != value
    )
