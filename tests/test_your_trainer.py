"""The guide: every command of it is run, and what it says comes out."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.cost import long

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "docs" / "your-trainer.md").read_text(encoding="utf-8")
COMMANDS = [
    line
    for block in re.findall(r"```sh\n(.*?)```", GUIDE, re.DOTALL)
    for line in block.splitlines()
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return shutil.copytree(ROOT / "examples", tmp_path_factory.mktemp("guide") / "examples")


def parity(folder, *words):
    """As typed in a folder of one's own."""
    return subprocess.run(
        [sys.executable, "-m", "parity.cli", *words],
        cwd=folder, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
    )  # fmt: skip


def said(done, folder, out):
    """All that a command says, on lines of any width."""
    files = [f.read_text(encoding="utf-8") for f in (folder / out).rglob("*.md")]
    files += [f.read_text(encoding="utf-8") for f in (folder / out).rglob("records/*.json")]
    return " ".join(" ".join([done.stdout, *files]).split())


NAMED = [(shlex.split(command)[-1], command) for command in COMMANDS]


@pytest.mark.parametrize(
    "command",
    [c if n == "loss" else long(c, id=n) for n, c in NAMED],
    ids=[n for n, _ in NAMED],
)
def test_a_command_of_the_guide_gives_what_the_guide_quotes(command, folder):
    if "mlx_lm_lora" in command and not find_spec("mlx_lm_lora"):
        pytest.skip("mlx-lm-lora is not installed: pip install --no-deps mlx-lm-lora")
    if "unsloth" in command and not find_spec("unsloth_zoo"):
        pytest.skip("unsloth-zoo is not installed: pip install --no-deps unsloth-zoo")
    words = shlex.split(command)
    done = parity(folder, *words[1:])
    after = GUIDE.partition(command)[2].partition("```sh")[0]
    code = 0 if "All are identical: exit code 0" in after else 1
    assert done.returncode == code, done.stdout + done.stderr[-2000:]
    text = said(done, folder, words[-1])
    for quote in re.findall(r"^> (\S.*)$", after, re.MULTILINE):
        assert quote in text
    if "mlx_lm_lora" in command:
        assert "the subject never trains on" in text
        assert "the subject does not repeat itself bit for bit" in text


def test_the_path_in_the_guide_is_the_example():
    [code] = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    assert (ROOT / "examples" / "finetune_path.py").read_text(encoding="utf-8").endswith(code)


def test_the_examples_are_as_short_as_they_are_said_to_be():
    lines = {file.name: file.read_text().splitlines() for file in ROOT.glob("examples/*_path.py")}
    assert len(lines["mlx_lm_lora_path.py"]) <= 40
    assert len(lines["sft_trainer_path.py"]) <= 26
    assert len(lines["unsloth_path.py"]) <= 60


def test_a_skeleton_lists_what_may_be_taken_and_runs(folder):
    made = parity(folder, "new-path", "my-trainer", "--out", "my_path.py")
    assert made.returncode == 0, made.stderr
    text = (folder / "my_path.py").read_text()
    assert "`adapted`: or the loaded model" in text and "num_layers" in text
    words = [
        "run",
        "--subject",
        "my_path:MyTrainer",
        "--seeds",
        "1",
        "--probes",
        "04",
        "--out",
        "s",
    ]
    done = parity(folder, *words, "--reference", "mlx-lm")
    assert done.returncode == 3
    assert "my-trainer: call your trainer here" in said(done, folder, "s")
    lint = [sys.executable, "-m", "ruff", "check", "--isolated", str(folder / "my_path.py")]
    assert subprocess.run(lint, check=False, capture_output=True).returncode == 0
