"""--device: who is asked, what is refused, and what it changes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from parity.capture import devices
from parity.capture import keys as content
from parity.capture.worker import environment
from parity.cells.cell import Cell, reproduce
from parity.errors import UsageError
from parity.stages import find


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    # First set, so that whatever a test leaves behind is taken away again.
    monkeypatch.setenv(devices.VARIABLE, "cpu")
    monkeypatch.delenv(devices.VARIABLE)
    monkeypatch.setattr(devices, "_without_cuda", lambda: "")
    yield
    content.of_path.cache_clear()


def test_the_default_is_the_cpu_and_naming_it_changes_no_key():
    key = content.of_path("hf")
    devices.choose(None)
    assert devices.current() == "cpu"
    devices.choose("cpu")
    assert devices.VARIABLE not in os.environ
    assert content.of_path("hf") == key


def test_cuda_reaches_the_workers_the_keys_and_the_line_that_reproduces(small, tmp_path):
    cell = Cell(find("logits"), "trl", "hf", small)
    keys = {spec: content.of_path(spec) for spec in ("hf", "trl")}
    assert "--device" not in reproduce(cell)
    devices.choose("cuda")
    assert environment("torch", tmp_path)[devices.VARIABLE] == "cuda"
    assert all(content.of_path(spec) != key for spec, key in keys.items())
    assert "--device cuda" in reproduce(cell)
    devices.choose(None)
    assert devices.current() == "cuda", "what the environment says stays"
    devices.choose("cpu")
    assert devices.current() == "cpu"


@pytest.mark.parametrize("name", ["mps", "gpu", "cuda:1"])
def test_another_device_is_refused(name, monkeypatch):
    with pytest.raises(UsageError, match=f"--device {name}: torch paths run on cpu or cuda"):
        devices.choose(name)
    monkeypatch.setenv(devices.VARIABLE, name)
    with pytest.raises(UsageError, match=f"{devices.VARIABLE}={name}"):
        devices.choose(None)


def test_cuda_without_cuda_is_one_line_that_says_what_to_do(monkeypatch):
    monkeypatch.setattr(devices, "_without_cuda", lambda: "torch is built without CUDA: get it")
    with pytest.raises(
        UsageError, match=r"--device cuda: torch is built without CUDA.*--device cpu"
    ):
        devices.choose("cuda")
    assert devices.VARIABLE not in os.environ


def test_an_interpreter_without_torch_is_no_crash(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(devices, "_QUESTION", "import no_such_module")
    assert "No module named 'no_such_module'" in devices._without_cuda()


@pytest.mark.parametrize("command", ["run", "bisect", "capture hf --out x.bundle"])
def test_every_command_that_starts_workers_takes_the_option(command):
    from click.testing import CliRunner

    from parity.cli import main

    done = CliRunner().invoke(main, [*command.split(), "--device", "mps"])
    assert done.exit_code == 2
    assert done.stderr.strip() == "parity: --device mps: torch paths run on cpu or cuda"


def test_pytest_takes_the_option(tmp_path):
    words = [sys.executable, "-m", "pytest", "--device", "mps", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "--device mps: torch paths run on cpu or cuda" in done.stderr
