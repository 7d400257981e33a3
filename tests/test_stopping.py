"""Ctrl-C: a run ends at once, with what is finished reported and the line that goes on."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time

import pytest

from parity.capture import forking

COMMAND = [sys.executable, "-m", "parity.cli"]
LEFT_ALONE = 60.0  # seconds, far less than what is stopped would still take


def wait_for(condition, process, what):
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline, what
        assert process.poll() is None, f"it ended before it could be stopped: {what}"
        time.sleep(0.05)


def stopped(words, ready, send=os.kill):
    """What a command leaves that gets Ctrl-C as soon as it is ready."""
    with subprocess.Popen(
        [*COMMAND, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
        # A shell ignores it for what it runs in the background, as these tests may be.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        # Of forked workers the parent is in another group, where nobody would see them.
        env={**os.environ, forking.VARIABLE: ""},
    ) as process:  # fmt: skip
        try:
            wait_for(ready, process, "it never became ready")
            send(process.pid, signal.SIGINT)
            out, err = process.communicate(timeout=LEFT_ALONE)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, out, err, stays(process.pid)


def stays(group):
    """Whether a process of a group lives on; one that was killed takes a moment to give its memory back."""
    for _ in range(50):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return False
        time.sleep(0.1)
    return True


@pytest.mark.parametrize("send", [os.kill, os.killpg], ids=["the process", "its terminal"])
def test_a_run_is_stopped(send, tmp_path, engine):
    folder = tmp_path / "a b"
    words = ["run", "--subject", "tests.slow_path:Slow", "--reference", "mlx-lm"]
    words += ["--seeds", "1", "--probes", "04,03", "--out", str(folder)]
    logs = folder / "logs"

    def ready():
        finished = [*(folder / "records").glob("04*.json")]
        return finished and [*logs.glob("*")] and time.time() - finished[0].stat().st_mtime > 1

    code, out, err, left = stopped(words, ready, send)
    assert code == 130, err
    assert "Traceback" not in err
    assert not left, "a worker is still there"
    assert "1 missing" in out
    assert (folder / "report.html").is_file()
    assert not [*(folder / "records").glob("03*.json")], "what was stopped is no result"
    line = err.splitlines()[-1]
    assert line.startswith("stopped: 1 of 2 cells are finished; to go on: ")
    assert shlex.split(line.partition("to go on: ")[2]) == ["parity", *words]


def test_a_search_is_stopped(tmp_path, engine):
    logs = tmp_path / "out" / "logs"
    words = ["bisect", "--subject", "tests.slow_path:Slow", "--out", str(tmp_path / "out")]
    code, _, err, left = stopped(words, lambda: [*logs.glob("*")])
    assert code == 130, err
    assert "Traceback" not in err
    assert "run the same command again" in err
    assert not left


@pytest.mark.long
def test_an_audit_is_stopped(tmp_path, engine):
    logs = engine.cache / "logs"
    before = {*logs.glob("*")}
    words = ["check-path", "tests.slow_path:Slow"]
    begun = time.monotonic()

    def ready():
        return {*logs.glob("*")} - before and time.monotonic() - begun > 8

    code, _, err, left = stopped(words, ready)
    assert code == 130, err
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith("stopped; to start again: parity check-path")
    assert not left


@pytest.mark.long
def test_a_sweep_is_stopped(tmp_path, engine, empty_cache, monkeypatch):
    monkeypatch.setenv("PARITY_CACHE", str(empty_cache))
    folder = tmp_path / "out"
    words = ["sweep", "--only", "qwen3,starcoder2", "--jobs", "1", "--out", str(folder)]
    words += ["--question", "logits", "--configuration", "plain"]

    def ready():
        return [*(empty_cache / "sweep" / "cells").glob("*.json")]

    code, _, err, left = stopped(words, ready)
    assert code == 130, err
    assert "Traceback" not in err
    assert not left, "a worker is still there"
    assert "Not finished" in (folder / "architectures.html").read_text()
    line = err.splitlines()[-1]
    assert line.startswith("stopped: 1 of 2 cells are finished; to go on: ")
    assert shlex.split(line.partition("to go on: ")[2]) == ["parity", *words]
