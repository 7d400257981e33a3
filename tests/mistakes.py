"""Typical mistakes at the terminal; `python -m tests.mistakes` runs them and writes docs/mistakes.md."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from click.testing import CliRunner

PAGE = Path(__file__).parents[1] / "docs" / "mistakes.md"
HEAD = """# Mistakes at the terminal

Each ends with exit code 2 and one line on stderr, before any work is done. This page is written by
`python -m tests.mistakes`, which runs each of them; `tests/test_mistakes.py` runs them again.

| mistake | command | what is printed |
|---|---|---|
"""
BROKEN = """import nothing_of_that_name
"""
RAISING = """raise RuntimeError("no licence for this machine")
"""
TRAINER = '''from parity.paths.mlx import MlxPath
class Misspelt(MlxPath):
    name = "misspelt"
    honours = (*MlxPath.honours, "optim.weightdecay")
class NotInstalled(MlxPath):
    name = "not-installed"
    packages = (*MlxPath.packages, "a-trainer-of-mine")
'''  # fmt: skip
LOSSES = """
import torch
def loss(logits, labels): ...
def masked(model, ids, gadget): ...
"""
FILES = {
    "torch_loss.py": LOSSES,
    "broken.py": BROKEN,
    "raising.py": RAISING,
    "trainer.py": TRAINER,
    "notes.txt": "a file\n",
    "old.bundle": "no zip\n",
    "half.toml": "[lora]\nrank = \n",
    "strange.toml": "[lorra]\nrank = 8\n",
    "weightless/config.json": '{"model_type": "llama"}\n',
    "rows/train.jsonl": '{"text": "one"}\n{"text": two}\n',
    "empty/train.jsonl": "",
    "reports/nothing.txt": "",
    "taken.py": "",
}


class Mistake(NamedTuple):
    """A mistake in a few words, the command line, and variables of the environment."""

    what: str
    command: str
    variables: tuple[tuple[str, str], ...] = ()


MISTAKES = [
    Mistake("a misspelt command", "rnu"),
    Mistake("a misspelt option", "run --sedes 3"),
    Mistake("an option without its value", "run --seeds"),
    Mistake("an unknown path", "run --subject mlxlm"),
    Mistake("a trainer whose module is not there", "run --subject my_trainer:Path"),
    Mistake("a trainer whose class is not there", "run --subject trainer:Path"),
    Mistake("a trainer that imports what is not installed", "run --subject broken:Path"),
    Mistake("a trainer that raises on import", "run --subject raising:Path"),
    Mistake("a class that is no path", "run --subject pathlib:Path"),
    Mistake("a factor misspelt in a trainer", "run --subject trainer:Misspelt"),
    Mistake("a trainer whose package is not installed", "run --subject trainer:NotInstalled"),
    Mistake("a release that is no version", "run --subject unsloth@latest"),
    Mistake("a part that no path has", "run --subject mlx+mask=mlx-lm"),
    Mistake("a part of another framework", "run --subject mlx+loss=hf"),
    Mistake("a loss on torch in a path on MLX", "run --subject-loss torch_loss:loss"),
    Mistake(
        "a loss that takes what cannot be told", "run --subject hf --subject-loss torch_loss:masked"
    ),
    Mistake("no number of seeds", "run --seeds few"),
    Mistake("a count of seeds, or a seed?", "run --seeds 99"),
    Mistake("a seed twice", "run --seeds 3,3"),
    Mistake("an unknown probe", "run --probes 99"),
    Mistake("a misspelt probe", "run --probes gradeint"),
    Mistake("a value of the wrong type", "run --set lora.rank=abc"),
    Mistake("a value out of range", "run --set lora.num_layers=0"),
    Mistake("a value that is none of those known", "run --set-subject optim.name=lion"),
    Mistake("a misspelt factor", "run --set lora.numlayers=4"),
    Mistake("a factor without a value", "run --set lora.rank"),
    Mistake("a recipe that is not there", "run --recipe mine.toml"),
    Mistake("a recipe that is not TOML", "run --recipe half.toml"),
    Mistake("a section that no recipe has", "run --recipe strange.toml"),
    Mistake("a model that is not there", "run --set model.source=tiny-gema"),
    Mistake("a folder without weights", "run --set model.source=weightless"),
    Mistake("a hub id that cannot be had", "run --set model.source=someone/no-such-model"),
    Mistake("data that is not there", "run --set data.source=rows.jsonl"),
    Mistake("a row that is not JSON", "run --set data.source=rows"),
    Mistake("data without rows", "run --set data.source=empty"),
    Mistake("--out below a file", "run --out notes.txt/run"),
    Mistake("a cache that cannot be written", "run", (("PARITY_CACHE", "notes.txt/cache"),)),
    Mistake("a limit of the cache that is no size", "run", (("PARITY_CACHE_LIMIT", "lots"),)),
    Mistake("a device that no path has", "run --device tpu"),
    Mistake("no jobs", "run --jobs 0"),
    Mistake("a bundle that is not there", "run --reference hf.bundle"),
    Mistake("a file that is no bundle", "run --reference old.bundle"),
    Mistake("a bundle of another name", "capture mlx --out mlx.zip"),
    Mistake("a search in a bundle", "bisect --reference old.bundle"),
    Mistake("releases the wrong way round", "bisect --package mlx-lm==0.31..0.28"),
    Mistake("a checkout without its ends", "bisect --repo reports"),
    Mistake("an unknown scenario", "replay last-16-layer"),
    Mistake("a folder without records", "report reports"),
    Mistake("a folder that is not there", "report reports/run-1"),
    Mistake("a skeleton over a file", "new-path mine --out taken.py"),
    Mistake("a factor that a path does not honour", "audit mlx-lm --factors optim.clip"),
    Mistake("an audit of a bundle", "audit old.bundle"),
    Mistake("a fitness of no path", "check-path mlxlm"),
    Mistake("an unknown method", "contract gradients"),
    Mistake("an adapter that is not there", "adapter check adapters"),
]


class Outcome(NamedTuple):
    """What a command ended with."""

    code: int
    out: str
    err: str
    bug: BaseException | None
    """An exception that `main` let through."""


@contextlib.contextmanager
def workplace():
    """A folder with `FILES`, which is the working directory meanwhile."""
    before, path, modules = Path.cwd(), [*sys.path], {*sys.modules}
    with tempfile.TemporaryDirectory() as folder:
        for name, text in FILES.items():
            file = Path(folder) / name
            file.parent.mkdir(exist_ok=True)
            file.write_text(text, encoding="utf-8")
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)
            sys.path[:] = path
            for name in {"broken", "raising", "trainer"} & (sys.modules.keys() - modules):
                del sys.modules[name]


def run(mistake: Mistake) -> Outcome:
    """The real command, in this process and in a folder of `workplace`."""
    from parity.cli import main

    with mock.patch.dict(os.environ, dict(mistake.variables)):
        done = CliRunner().invoke(main, mistake.command.split(), prog_name="parity")
    bug = None if isinstance(done.exception, SystemExit) else done.exception
    folder = str(Path.cwd())
    return Outcome(done.exit_code, done.stdout, done.stderr.replace(folder, "…"), bug)


def page() -> str:
    """All of docs/mistakes.md."""
    rows = []
    with workplace():
        for mistake in MISTAKES:
            words = [f"{name}={value}" for name, value in mistake.variables]
            command = " ".join([*words, "parity", mistake.command])
            err = run(mistake).err.strip().replace("|", "\\|")
            rows.append(f"| {mistake.what} | `{command}` | {err} |")
    return HEAD + "\n".join(rows) + "\n"


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
