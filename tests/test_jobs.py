"""`--jobs`: how many processes compute at once, on this machine and on others."""

from __future__ import annotations

import threading
from importlib.metadata import PackageNotFoundError

import pytest

from parity.capture import capacity
from parity.capture.capacity import Capacity, Jobs, jobs
from parity.capture.pool import Pool
from parity.paths.registry import resolve
from parity.recipe import Recipe

GB = 10**9
MLX, BOTH = frozenset({"mlx"}), frozenset({"mlx", "torch"})


@pytest.mark.parametrize(
    ("machine", "wanted", "weights", "busy", "alive"),
    [
        pytest.param(Capacity(2, 16 * GB), 0, 0, 2, 5, id="two cores"),
        pytest.param(Capacity(8, 32 * GB), 0, 0, 8, 9, id="eight cores"),
        pytest.param(Capacity(64, 256 * GB), 0, 0, 32, 33, id="64 cores: one process compares"),
        pytest.param(Capacity(3, 3 * GB, MLX), 0, 0, 3, 4, id="hosted Mac"),
        pytest.param(Capacity(3, GB, MLX), 0, 0, 1, 1, id="hosted Mac, hardly any memory left"),
        pytest.param(Capacity(64, 100 * GB), 0, 28 * GB, 1, 1, id="7 B parameters"),
        pytest.param(Capacity(8, 20 * GB), 0, GB, 4, 4, id="250 M parameters, in float64 as well"),
        pytest.param(Capacity(2, GB), 6, 0, 6, 6, id="who names a number gets it"),
    ],
)
def test_auto_fits_cores_and_memory(machine, wanted, weights, busy, alive):
    assert jobs(machine, wanted, weights)[:2] == (busy, alive)


@pytest.mark.parametrize(
    ("machine", "wanted", "weights", "on_gpu"),
    [
        pytest.param(
            Capacity(16, 128 * GB, MLX, 140 * GB), 0, 0, 16, id="a large GPU, a tiny model"
        ),
        pytest.param(Capacity(16, 128 * GB, MLX, 140 * GB), 0, 28 * GB, 1, id="7 B parameters"),
        pytest.param(Capacity(8, 16 * GB, MLX, 8 * GB), 0, 0, 4, id="half of a Mac's memory"),
        pytest.param(Capacity(3, 3 * GB, MLX, GB), 0, 0, 1, id="hosted Mac"),
        pytest.param(Capacity(3, 3 * GB, MLX, GB), 2, 0, 2, id="who names a number gets it"),
    ],
)
def test_auto_fits_the_memory_of_a_gpu(machine, wanted, weights, on_gpu):
    assert jobs(machine, wanted, weights).on_gpu == on_gpu


def test_it_is_said_in_words():
    assert str(Jobs(1, 1)) == "1 process at once"
    assert str(Jobs(3, 5, BOTH)) == "3 processes at once, 1 on the GPU (mlx, torch)"


def test_this_machine_is_measured():
    found = capacity.here()
    assert found.cores >= 1
    assert found.memory > 0
    assert capacity.of_recipe(Recipe()).busy <= found.cores


def test_a_container_has_what_its_group_allows(tmp_path, monkeypatch):
    monkeypatch.setattr(capacity, "GROUPS", tmp_path)
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    (tmp_path / "memory.max").write_text("2000000000\n")
    assert capacity.cores() == 1
    assert capacity.here().memory <= 2 * GB
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert capacity.cores() >= 1


def test_the_size_of_a_model_counts():
    tiny = capacity.weights("tiny-gemma3")
    assert 2_000_000 < tiny < 20_000_000
    assert capacity.weights("nobody/nothing") == 0


def test_a_gpu_is_known_without_a_framework(monkeypatch):
    def installed(name):
        if name != "mlx-cuda-13":
            raise PackageNotFoundError(name)
        return name

    monkeypatch.setattr(capacity.sys, "platform", "linux")
    monkeypatch.setattr(capacity, "distribution", installed)
    assert set(capacity._on_gpu()) == {"mlx"}
    monkeypatch.setenv("PARITY_TORCH_DEVICE", "cuda")
    assert set(capacity._on_gpu()) == BOTH


FAULTY = "tests.faulty_paths:Faulty"
"""It runs on NumPy, so that its process starts quickly."""


def lent_beside_another(folder, allowed, patience):
    """Whether a second worker is lent before the first one is given back, within so many seconds."""
    pool = Pool(folder, folder / "logs", lambda *_: False, print, allowed)
    kind, python, second = resolve(FAULTY), capacity.sys.executable, threading.Event()

    def take():
        with pool.worker(FAULTY, kind, python):
            second.set()

    thread = threading.Thread(target=take)
    try:
        with pool.worker(FAULTY, kind, python):
            thread.start()
            beside = second.wait(patience)
        thread.join(60)
        assert second.is_set()
        return beside
    finally:
        pool.close()


def test_no_more_processes_compute_at_once_than_was_said(tmp_path):
    numpy = frozenset({"numpy"})
    assert not lent_beside_another(tmp_path, Jobs(1, 5), 0.5)
    assert not lent_beside_another(tmp_path, Jobs(2, 5, numpy), 0.5)
    assert lent_beside_another(tmp_path, Jobs(2, 5, BOTH), 60)
    assert lent_beside_another(tmp_path, Jobs(2, 5, numpy, 2), 60)
