"""What the cache holds, and that pruning it never takes what a live command uses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from click.testing import CliRunner
from filelock import FileLock

from parity import resources
from parity.capture import growth as growth_module
from parity.capture import storage
from parity.capture.engine import Engine
from parity.capture.growth import Growth
from parity.cli import main
from parity.errors import UsageError
from parity.recipe import Recipe
from parity.trace import Trace

PATH = "tests.third_party:NumpyAdamW"
HOUR = 3600


def capture(cache, name, age=0.0, size=1000, manifest="m" * 16):
    """A file that was used `age` hours ago."""
    file = cache / "captures" / name[:2] / f"{name}-{manifest}.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"x" * size)
    then = time.time() - age * HOUR
    os.utime(file, (then, then))
    return file


def left(cache, name):
    file = cache / "captures" / name[:2] / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"y" * 10)
    return file


@pytest.fixture
def dead():
    """The number of a process that has ended."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5e9), ("500 MB", 5e8), ("2GiB", 2 << 30), ("1.5kb", 1500), ("7", 7), ("0", 0)],
)
def test_sizes(text, size):
    assert storage.limit(text) == size


@pytest.mark.parametrize("text", ["abc", "", "5XB", "-1GB", "5 G B", "nan", "GB"])
def test_what_is_no_size_is_named(text, monkeypatch):
    with pytest.raises(UsageError, match="is no size: give one such as 5GB"):
        storage.limit(text)
    if text:
        monkeypatch.setenv(storage.VARIABLE, text)
        with pytest.raises(UsageError, match=storage.VARIABLE):
            storage.limit()


def test_the_variable_gives_the_limit(monkeypatch):
    monkeypatch.delenv(storage.VARIABLE, raising=False)
    assert storage.limit() == 20e9
    monkeypatch.setenv(storage.VARIABLE, "3MB")
    assert storage.limit() == 3e6
    assert storage.limit("1MB") == 1e6


def test_the_captures_used_least_recently_go_first(tmp_path):
    files = [capture(tmp_path, f"{age:024d}", age) for age in (3, 1, 4, 2)]
    storage.used(files[2])  # the oldest, used again
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "model").write_bytes(b"z" * 500)
    done = storage.prune(tmp_path, 2500)
    assert [file.exists() for file in files] == [False, True, True, False]
    assert (done.count, done.size, done.kept) == (2, 2000, 2500)
    assert storage.prune(tmp_path, 0).kept == 500
    assert storage.prune(tmp_path, 0, everything=True).kept == 0
    assert not (tmp_path / "checkpoints" / "model").exists()


def test_what_killed_commands_left_goes_and_captures_stay(tmp_path, dead):
    kept = capture(tmp_path, "aa" + "0" * 22)
    gone = [left(tmp_path, "aa" + "1" * 22 + end) for end in (".inputs", ".output", ".lock")]
    torn = left(tmp_path, ".half-written.x1")
    os.utime(torn, (0, 0))
    (tmp_path / "logs").mkdir()
    logs = [tmp_path / "logs" / f"mlx-{pid}.log" for pid in (dead, os.getpid())]
    for log in logs:
        log.write_text("…")
    (tmp_path / "kernels" / "tmpabc").mkdir(parents=True)
    (tmp_path / "kernels" / "mlx").mkdir()
    (tmp_path / "kernels" / "mlx" / "kernel").write_text("k")
    (tmp_path / "mine").write_text("no part of the cache")
    found = storage.contents(tmp_path)
    assert {entry.path for entry in found.left} == {
        *gone, torn, logs[0], tmp_path / "kernels" / "tmpabc",
    }  # fmt: skip
    storage.prune(tmp_path, 1e9)
    assert kept.exists()
    assert logs[1].exists()
    assert (tmp_path / "kernels" / "mlx" / "kernel").exists()
    assert (tmp_path / "mine").exists()
    assert not any(file.exists() for file in (*gone, torn, logs[0]))
    assert not storage.contents(tmp_path).left


def test_a_capture_under_way_keeps_its_files(tmp_path):
    files = [left(tmp_path, "aa" + "1" * 22 + end) for end in (".inputs", ".output")]
    with FileLock(files[0].with_suffix(".lock")):
        storage.prune(tmp_path, 0, everything=True)
        assert all(file.exists() for file in files)
    storage.prune(tmp_path, 0)
    assert not any(file.exists() for file in files)


HOLD = """
import sys
from pathlib import Path
from parity.capture import storage
with storage.in_use(Path(sys.argv[1])):
    storage.used(Path(sys.argv[2]))
    print("ready", flush=True)
    sys.stdin.readline()
"""


def test_what_a_live_command_used_stays_until_it_ends_or_is_killed(tmp_path):
    used, unused = (capture(tmp_path, digit * 24, 5) for digit in "ab")
    (tmp_path / "environments" / "mlx-lm-1").mkdir(parents=True)
    (tmp_path / "environments" / "mlx-lm-1" / "python").write_text("p")
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path), str(used)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout.readline() == "ready\n"
        storage.prune(tmp_path, 0, everything=True)
        assert used.exists()
        assert not unused.exists()
        assert (tmp_path / "environments" / "mlx-lm-1" / "python").exists()
        process.kill()
    storage.prune(tmp_path, 0)
    assert not used.exists()
    assert not [*(tmp_path / storage.LIVE).iterdir()]


def test_manifests_go_with_the_last_capture_that_names_them(tmp_path):
    needed, lone = (tmp_path / "loaded" / f"{digit * 16}.json" for digit in "mn")
    needed.parent.mkdir()
    for file in (needed, lone, tmp_path / "loaded" / "hashes.json"):
        file.write_text("{}")
    file = capture(tmp_path, "a" * 24)
    storage.prune(tmp_path, 1e9)
    assert needed.exists()
    assert not lone.exists()
    file.unlink()
    storage.prune(tmp_path, 1e9)
    assert [f.name for f in needed.parent.iterdir()] == ["hashes.json"]


def test_an_engine_uses_its_captures_and_makes_pruned_ones_again(tmp_path):
    def answer(engine):
        return engine.capture(PATH, "defaults", Recipe(), Trace())

    with Engine(tmp_path) as engine:
        first = answer(engine)
        [file] = (tmp_path / "captures").rglob("*.safetensors")
        storage.prune(tmp_path, 0, everything=True)
        assert file.exists()
        assert answer(engine).digest() == first.digest()
        assert engine.captured == 1
    then = time.time() - 5 * HOUR
    os.utime(file, (then, then))
    with Engine(tmp_path) as engine:
        answer(engine)
        assert engine.captured == 0
        assert file.stat().st_atime > then + HOUR
        assert file.stat().st_mtime == pytest.approx(then)
    storage.prune(tmp_path, 0)
    assert not file.exists()
    with Engine(tmp_path) as engine:
        assert answer(engine).digest() == first.digest()
        assert engine.captured == 1


def test_a_run_keeps_the_cache_below_its_limit_and_says_so(tmp_path, monkeypatch):
    old = capture(tmp_path, "a" * 24, 5, size=5_000_000)
    words = ["--reference", "mlx-lm", "--probes", "01", "--seeds", "1"]
    env = {**os.environ, "PARITY_CACHE": str(tmp_path), storage.VARIABLE: "100kB"}
    command = [sys.executable, "-m", "parity.cli", "run", *words, "--out", str(tmp_path / "run")]
    first, again = (
        subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        for _ in range(2)
    )
    lines = [line for line in first.stderr.splitlines() if "from the cache" in line]
    assert len(lines) == 1, first.stderr
    assert "it may hold 100 kB (PARITY_CACHE_LIMIT)" in lines[0]
    assert not old.exists()
    assert "from the cache" not in again.stderr
    bad = subprocess.run(
        command, env={**env, storage.VARIABLE: "much"}, capture_output=True, text=True, check=False
    )
    assert (bad.returncode, bad.stderr.count("\n")) == (2, 1)
    assert "PARITY_CACHE_LIMIT 'much' is no size" in bad.stderr


def test_captures_of_other_interpreters_count_and_go_as_well(tmp_path):
    nested = tmp_path / "elsewhere" / "0123456789abcdef"
    old, new = capture(nested, "a" * 24, 5), capture(tmp_path, "b" * 24, 1, manifest="n" * 16)
    left(nested, "aa" + "1" * 22 + ".inputs")
    (tmp_path / "loaded").mkdir()
    for digit in "mn":
        (tmp_path / "loaded" / f"{digit * 16}.json").write_text("{}")
    found = storage.contents(tmp_path)
    assert [entry.path for entry in found.entries["elsewhere"]] == [old]
    assert len(found.left) == 1
    assert (
        storage.prune(tmp_path, 1e9).count == 1
    )  # what was left behind; both manifests are needed
    assert storage.prune(tmp_path, 1500).count == 2
    assert not old.exists() and new.exists()
    assert [*(tmp_path / "loaded").iterdir()] == [tmp_path / "loaded" / f"{'n' * 16}.json"]


def test_a_long_command_gives_up_what_it_used_long_ago(tmp_path, monkeypatch):
    with storage.in_use(tmp_path):
        file = capture(tmp_path, "a" * 24)
        storage.used(file)
        storage.prune(tmp_path, 0)
        assert file.exists()
        monkeypatch.setattr(storage, "KEPT", -1.0)
        storage.prune(tmp_path, 0)
        assert not file.exists()


def test_a_cache_is_measured_once_it_has_grown(tmp_path, monkeypatch):
    monkeypatch.setenv(storage.VARIABLE, "100kB")
    old = capture(tmp_path, "a" * 24, 5, size=200_000)
    for _ in range(2):  # commands, each of which adds less than counts
        growth = Growth(tmp_path)
        growth.add(300)
        growth.settle()
        assert old.exists() and not growth.said
    growth = Growth(tmp_path)
    growth.add(900)
    assert old.exists()
    growth.settle()
    assert not old.exists() and "removed" in next(iter(growth.said))


def test_every_folder_of_the_cache_is_known(engine):
    """What the tests have made so far, with the real commands."""
    engine.capture(PATH, "defaults", Recipe(), Trace())
    folders = {entry.name for entry in os.scandir(resources.cache()) if entry.is_dir()}
    assert folders - {storage.LIVE, "test-adapters"} <= storage.KINDS.keys()


def test_a_full_disk_ends_a_command_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PARITY_CACHE", str(tmp_path))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(growth_module.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    words = ["--subject", "tests.faulty_paths:Faulty", "--reference", PATH, "--probes", "06"]
    out = tmp_path / "out"
    done = CliRunner().invoke(main, ["run", *words, "--seeds", "1", "--out", str(out)])
    assert done.exit_code == 3, done.output
    last = done.stderr.splitlines()[-1]
    assert "is full (1 kB are free)" in last and "parity cache prune" in last
    assert "Traceback" not in done.output
    assert not [*out.glob("records/*.json")]  # the cell is no error: it is run again


def test_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("PARITY_CACHE", str(tmp_path))
    monkeypatch.setenv(storage.VARIABLE, "1GB")
    Trace({"a": np.zeros(1000)}).save(tmp_path / "captures" / "aa" / f"{'a' * 24}-m.safetensors")
    left(tmp_path, "aa" + "1" * 22 + ".inputs")

    def parity(*words):
        return CliRunner().invoke(main, ["cache", *words])

    shown = parity().output
    assert "of at most 1 GB" in shown
    assert "captures" in shown
    assert "left behind" in shown
    data = json.loads(parity("--json").output)
    assert data["kinds"]["captures"]["count"] == 1
    assert data["limit"] == 1e9
    assert "removed 1 files" in parity("prune").output
    assert json.loads(parity("prune", "--limit", "0", "--json").output)["kept"] == 0
    for words in (["--limit", "abc"], ["--limit", "1GB", "--all"]):
        wrong = parity("prune", *words)
        assert wrong.exit_code == 2
        assert wrong.stderr.count("\n") == 1
    assert "parity cache prune --limit 5GB" in parity("--help").output
