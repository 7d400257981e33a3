"""`parity adapter`: adapters that are saved: checked, converted, exchanged between stacks."""

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

    DIR is what mlx-lm, PEFT, unsloth-zoo or TRL leave, or a GGUF file: its names, settings and
    values are compared with those of the model that was exported (--against), and transformers' GGUF reader runs both. The answer says what it is and what is wrong: settings that contradict the tensors, a lost scale, layers counted from the wrong
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
      parity adapter check fused_model/ggml-model-f16.gguf --against fused_model
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


@adapter.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--to", "stack", required=True, type=click.Choice(["peft", "mlx-lm"]),
              help="The stack that is to read it.")  # fmt: skip
@click.option("--out", required=True, metavar="DIR", type=click.Path(path_type=Path),
              help="A folder that does not exist yet.")  # fmt: skip
def convert(folder: Path, stack: str, out: Path) -> None:
    """Rewrite an adapter of mlx-lm in the files of PEFT, or the other way round.

    Neither of the two ships such a conversion: this one is mlx-parity's own. Values keep their bits
    (bfloat16 becomes float32); A and B are transposed, scale = alpha / r. What the other files
    cannot hold is refused. No loader is started: `parity adapter check OUT --base MODEL --against
    DIR` compares the two.

    \b
    Examples:
      parity adapter convert adapters --to peft --out adapters-for-peft
      parity adapter convert adapter-of-peft --to mlx-lm --out adapters
    """  # noqa: D301
    from parity.adapters.convert import LAYOUTS, convert

    written = convert(folder, LAYOUTS[stack], out)
    click.echo(
        f"wrote {out}: {len(written.modules)} modules in the files of {stack}, converted by "
        "mlx-parity: no conversion of mlx-lm's or PEFT's own"
    )


@adapter.command()
@click.option("--model", default="tiny-gemma3", show_default=True, metavar="MODEL",
              help="The base: a fixture's name, a folder or a hub id.")  # fmt: skip
@click.option("--path", "paths", multiple=True, metavar="PATH",
              help="A writer and reader; may be repeated.  [default: mlx-lm, unsloth, hf, trl]")  # fmt: skip
@click.option(
    "--json", "as_json", is_flag=True, help="The records as JSON in the place of Markdown."
)
@device_option
@timeout_option
def matrix(model: str, paths: tuple[str, ...], as_json: bool, timeout: float) -> None:
    """Load what each stack writes with the loader of each: a table of writers and readers.

    Every path saves the same kind of adapter, with its own saver, from its live model. Every path loads
    these files with its own loader: as they are, else as the writer exports them for the other
    stack, else after mlx-parity's own conversion. Compared are scale · A · B of each module, and the
    logits with those of the model that was saved.

    Exit codes: 0 every pair is read in some way and does the same, 1 one is not, 3 one could not
    be run.

    \b
    Examples:
      parity adapter matrix
      parity adapter matrix --model tiny-qwen3 --path mlx-lm --path hf
      parity adapter matrix --path mlx-lm@0.29.1 --path unsloth
    """  # noqa: D301
    from itertools import product

    from parity.adapters.convert import convert
    from parity.capture.checks import check as find_wrong_use
    from parity.capture.engine import Engine
    from parity.cells.cell import Cell
    from parity.cells.run import run_cell
    from parity.files import to_json
    from parity.paths.registry import knobs
    from parity.recipe import DEFAULT, load
    from parity.record import Verdict
    from parity.report.exchange import table
    from parity.stages.exchange import Exchange

    chosen = paths or ("mlx-lm", "unsloth", "hf", "trl")
    recipe = load(DEFAULT, [f"model.source={model}"], knobs(chosen))
    find_wrong_use(chosen, recipe)
    records = []
    with Engine(timeout=timeout) as engine:
        for writer, reader in product(chosen, repeat=2):
            record = run_cell(engine, Cell(Exchange(convert), reader, writer, recipe))
            both = " ".join(f"--path {path}" for path in dict.fromkeys((writer, reader)))
            again = f"parity adapter matrix --model {model} {both}"
            record = record.model_copy(update={"reproduce": again})
            click.echo(f"{writer} → {reader}: {record.verdict}", err=True)
            records.append(record)
    click.echo(
        to_json([r.model_dump(mode="json") for r in records]).decode()
        if as_json
        else table(records)
    )
    verdicts = {record.verdict for record in records}
    if verdicts & {Verdict.DIVERGE, Verdict.INCONCLUSIVE}:
        sys.exit(EXIT_NOT_GREEN)
    sys.exit(EXIT_GREEN if all(verdict.green for verdict in verdicts) else EXIT_MISSING)


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
