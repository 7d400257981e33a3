"""The probe files explain themselves: where a newcomer starts to read."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from parity.stages import BY_NUMBER, find

ROOT = Path(__file__).parents[1]
PROBES = sorted((ROOT / "probes").glob("probe_*.py"))


def test_every_stage_has_one_probe():
    found = {int(file.name.split("_")[1]): file for file in PROBES}
    assert list(found) == [stage.number for stage in BY_NUMBER]
    for number, file in found.items():
        stage = re.search(r'^STAGE = "(\w+)"$', file.read_text(), re.MULTILINE)
        assert stage and find(stage[1]).number == number


@pytest.mark.parametrize("file", PROBES, ids=lambda file: file.stem)
def test_a_probe_says_what_it_compares_and_what_a_divergence_cannot_mean(file: Path):
    text = ast.get_docstring(ast.parse(file.read_text()))
    assert text and 10 <= len(text.splitlines()) <= 25
    number = int(file.name.split("_")[1])
    assert re.match(rf"Probe {number:02d}, [\w ]+: .+\?", " ".join(text.split()))
    for words in ("Both sides are handed", "Compared", "divergence", "It cannot"):
        assert words in text, words
    line = text.splitlines()[-1].strip()
    assert shlex.split(line)[:2] == ["pytest", f"probes/{file.name}"]


def test_the_command_of_a_probe_runs_one_cell():
    text = ast.get_docstring(ast.parse(PROBES[6].read_text()))
    words = shlex.split(text.splitlines()[-1])[1:]
    command = [sys.executable, "-m", "pytest", *words, "--collect-only", "-q"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("::") == 1
