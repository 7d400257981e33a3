"""The guides: their links and pictures exist, their commands can be typed, and the tour is run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from parity.cli import main

ROOT = Path(__file__).parents[1]
OWN = [
    ROOT / "docs" / name
    for name in ("tour.md", "report.md", "github-actions.md", "add-a-probe.md", "architectures.md")
]
PICTURES = ROOT / "docs" / "images"


def lines(file: Path) -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", file.read_text(encoding="utf-8"), re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line]


@pytest.mark.parametrize("file", OWN, ids=lambda file: file.name)
def test_links_lead_somewhere(file):
    for name in re.findall(r"\]\((?!https?:)([^)#]+)", file.read_text(encoding="utf-8")):
        assert (file.parent / name).exists(), name
    for name in re.findall(
        r"`((?:parity|probes|tests|\.github)/[\w./-]+)`", file.read_text("utf-8")
    ):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("line", [line for file in OWN for line in lines(file)])
def test_a_command_that_is_written_down_can_be_typed(line):
    command, words = main, shlex.split(line)[1:]
    while hasattr(command, "commands"):
        name, *words = words
        command = command.commands[name]
    known = {text for option in command.params for text in option.opts}
    assert {word for word in words if re.fullmatch("--[a-z-]+", word)} <= known


def test_pictures_are_small():
    files = [*PICTURES.glob("*.png")]
    assert files and all(file.stat().st_size < 150_000 for file in files)


def run(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    _, *words = shlex.split(line)
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "parity.cli", *words], cwd=folder, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip


@pytest.mark.long
def test_the_tour_goes_as_it_is_told(tmp_path):
    codes, texts = [], []
    for line in lines(ROOT / "docs" / "tour.md"):
        done = run(line, tmp_path)
        codes.append(done.returncode)
        texts.append(" ".join(done.stdout.split()))
    assert codes == [1, 1, 1, 0, 0], texts
    off, _, search, on, _ = texts
    assert "diverge first at probe 06 optimizer step" in off
    assert "the subject's update is 3.162× the reference's" in off
    assert "side that is off: subject" in off
    assert re.search(
        r"optim\.bias_correction = False against True makes optimizer_step \(probe 06\) diverge.*"
        "with the reference's value it agrees", search,
    )  # fmt: skip
    assert "PARITY agree" in on
    page = (tmp_path / "on" / "report.html").read_text(encoding="utf-8")
    assert "Newly fixed: 1" in page


@pytest.mark.long
def test_the_steps_of_the_workflow_by_hand(tmp_path):
    for name in ("constraints.txt", "pyproject.toml"):
        (tmp_path / name).write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    done = [run(line, tmp_path) for line in lines(ROOT / "docs" / "github-actions.md")]
    assert [d.returncode for d in done] == [0, 0, 0, 0, 3, 3], [d.stderr for d in done]
    plan, _, annotate, moved, merge, _ = [d.stdout for d in done]
    assert plan.startswith('jobs=[{"name": "here-001"')
    assert [line.split("::")[1].split(",")[0] for line in annotate.splitlines()] == [
        "error title=01 tokenization%2C mlx vs mlx-lm",
        "error title=02 logits%2C mlx vs mlx-lm",
    ]
    assert "missing on tiny-gemma3, seed 0: there is no record" in annotate
    assert "There is no run before this one" in moved
    assert "2 missing" in merge
    assert "2 missing" in (tmp_path / "merged" / "report.md").read_text(encoding="utf-8")
