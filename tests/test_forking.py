"""A forked worker is what a started one is, and whatever happens to its parent it is known how it ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from parity.capture import forking
from parity.capture.engine import Engine
from parity.capture.forking import OWNER, VARIABLE, forked
from parity.capture.pool import Group
from parity.errors import CaptureError
from parity.recipe import Recipe
from parity.trace import Trace

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux alone")
NUMPY = Group(sys.executable, "numpy", (), ())
PID = "tests.faulty_paths:Faulty"


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Parents of this test alone, which end with it."""
    folder = tmp_path / "parents"
    folder.mkdir()
    owner = subprocess.Popen(["sleep", "600"])
    (folder / OWNER).write_text(str(owner.pid))
    monkeypatch.setenv(VARIABLE, str(folder))
    yield folder
    owner.kill()
    owner.wait()


@pytest.fixture
def log(tmp_path):
    with (tmp_path / "log").open("ab") as stream:
        yield stream


def request(worker, **fields):
    worker.stdin.write(json.dumps(fields).encode() + b"\n")
    worker.stdin.flush()
    return json.loads(worker.stdout.readline())


def ask(worker, tmp_path):
    """What a worker says of itself: the environment of a capture."""
    Trace().save(tmp_path / "inputs")
    recipe = Recipe().with_knobs(()).model_dump(mode="json")
    answer = request(
        worker, path=PID, method="defaults", recipe=recipe, inputs=str(tmp_path / "inputs"),
        output=str(tmp_path / "output"),
    )  # fmt: skip
    assert answer["status"] == "ok", answer
    return Trace.load(tmp_path / "output").environment


def ended(worker):
    worker.stdin.close()
    code = worker.wait(timeout=60)
    worker.stdout.close()
    return code


def parents_of(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.glob("*.socket"))


def parent(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("PPid:")[2].split()[0])


def wait_until(happened):
    for _ in range(600):
        if happened():
            return
        time.sleep(0.1)
    pytest.fail("it never happened")


def test_workers_of_one_kind_have_one_parent_and_each_its_own_variables(own, log, tmp_path):
    workers = [
        forked(NUMPY, tmp_path, log, {**os.environ, "TMPDIR": str(tmp_path / name)})
        for name in ("a", "b")
    ]
    try:
        assert len(parents_of(own)) == 1
        assert len({parent(worker.pid) for worker in workers}) == 1
        for worker in workers:
            assert ask(worker, tmp_path)["pid"] == worker.pid
            assert worker.poll() is None
    finally:
        codes = [ended(worker) for worker in workers]
    assert codes == [0, 0]
    other = forked(NUMPY, tmp_path, log, {**os.environ, "HF_HOME": str(tmp_path)})
    assert len(parents_of(own)) == 2  # a library reads it while it is imported
    assert ended(other) == 0


def test_what_is_killed_says_so(own, log, tmp_path):
    worker = forked(NUMPY, tmp_path, log, dict(os.environ))
    assert worker.pid
    worker.kill()
    assert worker.wait(timeout=60) == -signal.SIGKILL
    assert ended(worker) == -signal.SIGKILL


def test_what_is_killed_before_it_is_forked_never_works(own, log, tmp_path):
    worker = forked(NUMPY, tmp_path, log, dict(os.environ))
    worker.kill()  # the parent still imports
    assert worker.poll() == -signal.SIGKILL
    worker.stdout.read()  # the end of a process that found its input closed
    worker.stdout.close()


def test_a_worker_whose_parent_is_gone_works_on(own, log, tmp_path):
    worker = forked(NUMPY, tmp_path, log, dict(os.environ))
    first = parent(worker.pid)
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: worker.poll() is not None)
    next_one = forked(NUMPY, tmp_path, log, dict(os.environ))
    assert parent(next_one.pid) != first
    assert ended(next_one) == 0
    # How it ends nobody can tell any more.
    assert ended(worker) == forking._LOST


def test_an_edited_library_gets_a_fresh_process(own, log, tmp_path, monkeypatch):
    """Of a parent that has the old code nothing is forked."""
    library = tmp_path / "path" / "sitecustomize.py"  # imported by every process
    library.parent.mkdir()
    library.write_text("STATE = 'old'\n")
    env = {**os.environ, "PYTHONPATH": f"{library.parent}:{Path.cwd()}"}
    first = forked(NUMPY, tmp_path, log, env)
    old = parent(first.pid)
    assert ended(first) == 0
    library.write_text("STATE = 'newer'\n")
    second = forked(NUMPY, tmp_path, log, env)
    assert parent(second.pid) == old
    assert ask(second, tmp_path)["pid"] == second.pid
    command = Path(f"/proc/{second.pid}/cmdline").read_bytes().split(b"\0")
    assert b"parity.capture.serving" in command  # not the parent's own
    assert ended(second) == 0


def test_parents_end_with_their_owner(tmp_path):
    script = (
        "import os, sys\n"
        "from parity.capture import forking\n"
        "from parity.capture.pool import Group\n"
        "log = open(os.devnull, 'ab')\n"
        "group = Group(sys.executable, 'numpy', (), ())\n"
        "worker = forking.forked(group, __import__('pathlib').Path(sys.argv[1]), log, dict(os.environ))\n"
        "print(os.environ[forking.VARIABLE], worker.pid, flush=True)\n"
        "sys.stdin.read()\n"
    )
    env = {name: value for name, value in os.environ.items() if name != VARIABLE}
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], env=env, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as owner:  # fmt: skip
        folder, pid = owner.stdout.readline().split()
        number = parent(int(pid))
        owner.kill()
    wait_until(lambda: not Path(folder).exists() and not Path(f"/proc/{number}").exists())


def test_nothing_is_forked_where_it_is_switched_off(tmp_path, monkeypatch, log):
    monkeypatch.setenv(VARIABLE, "")
    assert forked(NUMPY, tmp_path, log, dict(os.environ)) is None
    with Engine(cache=tmp_path, timeout=60) as engine:
        assert engine.capture(PID, "defaults", Recipe(), Trace()).scalars["pid"]
        [worker] = engine._pool._idle
        assert isinstance(worker._process, subprocess.Popen)


def test_a_folder_with_code_of_its_own_has_its_own_parent(own, log, tmp_path, monkeypatch):
    """What lies in the working directory comes before what is installed."""
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    (tmp_path / "second" / "numpy.py").write_text("raise RuntimeError('in the way')\n")
    env = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    monkeypatch.chdir(tmp_path / "first")
    plain = forked(NUMPY, tmp_path, log, env)
    monkeypatch.chdir(tmp_path / "second")
    shadowed = forked(NUMPY, tmp_path, log, env)
    assert len(parents_of(own)) == 2
    assert plain.pid
    assert ended(plain) == 0
    assert ended(shadowed) != 0  # as a process that is started there


def test_many_at_once_share_the_one_that_is_started_first(own, log, tmp_path):
    found = []

    def start():
        found.append(forked(NUMPY, tmp_path, log, dict(os.environ)))

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({parent(worker.pid) for worker in found}) == 1
    assert [ended(worker) for worker in found] == [0] * 4


@pytest.mark.parametrize("started", ["forked", "by itself"])
@pytest.mark.parametrize(
    ("method", "words"),
    [("lora_init", "To run it install something-else"), ("defaults", "it has no defaults")],
)
def test_what_ends_its_process_has_the_last_word(method, words, started, tmp_path, monkeypatch):
    if started == "by itself":
        monkeypatch.setenv(VARIABLE, "")
    with Engine(tmp_path / "cache") as engine, pytest.raises(CaptureError) as caught:
        engine.capture("tests.faulty_paths:Leaving", method, Recipe(), Trace())
    assert "died (exit code 1)" in str(caught.value)
    assert caught.value.detail.rstrip().endswith(words), caught.value.detail
