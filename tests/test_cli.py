"""The command as a person uses it: in a process of its own."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner

from parity.cli import main

COMMAND = [sys.executable, "-m", "parity.cli"]


def parity(*words, **options):
    return subprocess.run(
        [*COMMAND, *words], capture_output=True, text=True, check=False, timeout=900, **options
    )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["run", "--subject", "nope"], "unknown path 'nope'"),
        (["run", "--subject", "no.such.module:Class"], "cannot import path 'no.such.module:Class'"),
        (["run", "--seeds", "x"], "--seeds 'x'"),
        (["run", "--seeds", "3,3"], "a seed stands twice"),
        (["run", "--seeds", "-1"], "--seeds '-1'"),
        (["run", "--probes", "99"], "unknown probe '99'"),
        (["run", "--set", "lora.num_layers=1.7"], "got 1.7"),
        (["run", "--set", "lora.numlayers=1"], "did you mean lora.num_layers"),
        (["run", "--set-subject", "optim.lr=fast"], "got 'fast'"),
        (["run", "--set", "model.source=nowhere"], "no model 'nowhere'"),
        (["run", "--set", "data.source=nowhere"], "no data 'nowhere'"),
        (["run", "--recipe", "nowhere.toml"], "no recipe at 'nowhere.toml'"),
        (["capture", "nope", "--out", "x.bundle"], "unknown path 'nope'"),
        (["capture", "mlx", "--out", "x"], "a bundle's name ends in .bundle, as x.bundle"),
        (["run", "--reference", "x.bundle"], "no bundle at 'x.bundle'"),
        (["report", "tests"], "no records"),
    ],
)
def test_wrong_use_is_one_line_with_exit_code_2(words, says):
    """In this process: `main` ends with exit code 2, and an exception that it lets through with 1."""
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 2, done.output
    assert isinstance(done.exception, SystemExit)
    assert says in done.stderr
    assert not done.stdout


def test_a_process_ends_as_main_does():
    done = parity("run", "--subject", "nope")
    assert done.returncode == 2, done.stderr
    assert "unknown path 'nope'" in done.stderr
    assert "Traceback" not in done.stderr
    assert not done.stdout


def test_a_path_that_fails_before_a_search_ends_with_the_line_that_reproduces_it(tmp_path):
    words = ["bisect", "--shipped", "--out", str(tmp_path / "a b"), "--subject"]
    failed = parity(*words, "tests.faulty_paths:NoSettings")
    assert failed.returncode == 3
    assert "RuntimeError in defaults: no settings" in failed.stderr.splitlines()[0]
    line = failed.stderr.splitlines()[-1]
    assert shlex.split(line) == ["reproduce:", "parity", *words, "tests.faulty_paths:NoSettings"]
    refused = parity(*words, "tests.faulty_paths:Absent")
    assert (refused.returncode, refused.stderr) == (2, "parity: not on this machine\n")


def test_every_command_has_examples_in_its_help():
    for name, command in main.commands.items():
        help_text = CliRunner().invoke(command, ["--help"]).output
        assert f"parity {name}" in help_text, name
    listed = CliRunner().invoke(main, ["--help"]).output
    assert listed.count("...") == 1, "a first line is too long for the list of commands"


def test_help_answers_at_once_and_imports_nothing_heavy():
    script = "import sys, parity.cli; print([m for m in ('numpy','pandas','torch','mlx','pydantic','rich') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
    done = parity("run", "--help")
    assert "--set-subject" in done.stdout


def test_list_names_what_there_is():
    shown = parity("list").stdout
    for word in ("mlx-lm", "07 loss_curve", "tiny-qwen3", "smollm2-135m", "mixed"):
        assert word in shown


def test_a_run_writes_what_it_says_and_its_folder_reports_again(tmp_path, engine):
    folder = tmp_path / "run"
    words = ["--reference", "mlx-lm", "--seeds", "2", "--probes", "1,2", "--out", str(folder)]
    done = parity("run", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list((folder / "records").glob("*.json"))) == 4
    assert (folder / "report.html").exists()
    assert (folder / "report.md").exists()
    assert parity("report", str(folder)).returncode == 0
    next((folder / "records").glob("02*.json")).unlink()
    again = parity("report", str(folder))
    assert again.returncode == 3
    assert "missing" in again.stdout


def test_a_divergence_ends_with_the_line_that_reproduces_it(tmp_path, engine):
    words = [
        "--reference",
        "mlx-lm",
        "--seeds",
        "1",
        "--probes",
        "04",
        "--out",
        str(tmp_path / "a"),
    ]
    done = parity("run", *words, "--set-subject", "lora.scale=4.0")
    assert done.returncode == 1
    record = json.loads(next((tmp_path / "a" / "records").glob("*.json")).read_text())
    assert record["verdict"] == "diverge"
    assert "LoRA scale" in record["reason"]
    assert record["subject"]["environment"]["versions"]["mlx"]
    again = shlex.split(record["reproduce"])[1:]
    assert parity(*again, "--out", str(tmp_path / "b")).returncode == 1


def test_kill_9_half_way_and_start_again(tmp_path, empty_cache):
    """What was finished before the kill is found, not run again."""
    env = {**os.environ, "PARITY_CACHE": str(empty_cache)}
    words = ["--reference", "mlx-lm", "--seeds", "2", "--probes", "01,02,03,04", "--out"]
    with subprocess.Popen(
        [*COMMAND, "run", *words, str(tmp_path / "a")],
        env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    ) as first:  # fmt: skip
        records = tmp_path / "a" / "records"
        deadline = time.monotonic() + 300
        while len(list(records.glob("*.json"))) < 3:
            assert time.monotonic() < deadline, "the run wrote no records"
            assert first.poll() is None, "the run ended before it could be killed"
            time.sleep(0.02)
        os.killpg(first.pid, signal.SIGKILL)
    captures = empty_cache / "captures"
    finished = {file: file.stat().st_mtime_ns for file in captures.rglob("*.safetensors")}
    assert finished
    assert parity("run", *words, str(tmp_path / "b"), env=env).returncode == 0
    later = {file: file.stat().st_mtime_ns for file in captures.rglob("*.safetensors")}
    assert {file: later[file] for file in finished} == finished, "a finished capture was run again"
    assert len(later) > len(finished), "the kill came too late to prove anything"
