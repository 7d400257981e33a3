"""Which BLAS MLX workers preload on Linux."""

from __future__ import annotations

import sys

import pytest
from click.testing import CliRunner

from parity.capture import keys
from parity.capture.engine import Engine
from parity.capture.worker import OPENBLAS, environment, openblas
from parity.cli import main
from parity.recipe import Recipe
from parity.trace import Trace

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="on macOS MLX uses Accelerate")


@pytest.fixture
def fresh_keys():
    keys.of_path.cache_clear()
    yield
    keys.of_path.cache_clear()


def test_an_empty_variable_preloads_none(monkeypatch, empty_cache, fresh_keys):
    """The suite passes so as well: `make test PARITY_OPENBLAS=`."""
    monkeypatch.delenv(OPENBLAS, raising=False)
    with_default = keys.of_path("mlx")
    monkeypatch.setenv(OPENBLAS, "")
    assert openblas() is None
    keys.of_path.cache_clear()
    assert (keys.of_path("mlx") == with_default) is (_default(monkeypatch) is None)
    monkeypatch.setenv(OPENBLAS, "")
    with Engine(empty_cache) as engine:
        found = engine.capture("mlx", "defaults", Recipe(), Trace()).environment
    assert not [name for name in found["blas"] if name.startswith("libopenblas")]


def _default(monkeypatch):
    monkeypatch.delenv(OPENBLAS, raising=False)
    return openblas()


def test_a_file_is_preloaded(monkeypatch, tmp_path):
    library = tmp_path / "libmine.so"
    library.touch()
    monkeypatch.setenv(OPENBLAS, str(library))
    assert environment("mlx", tmp_path)["LD_PRELOAD"].split()[0] == str(library)
    assert "LD_PRELOAD" not in environment("torch", tmp_path)


def test_a_file_that_is_not_there_is_wrong_use(monkeypatch):
    monkeypatch.setenv(OPENBLAS, "/nowhere/libopenblas.so")
    done = CliRunner().invoke(main, ["run", "--probes", "01", "--reference", "hf"])
    assert done.exit_code == 2
    [line] = done.output.strip().splitlines()
    assert "PARITY_OPENBLAS '/nowhere/libopenblas.so' is no file" in line
