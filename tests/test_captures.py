"""When a capture is used again: the code that would run now, and one environment a cell."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from parity.capture import keys, loaded
from parity.capture.engine import Engine
from parity.cells.cell import Cell
from parity.cells.run import run_cell
from parity.paths.describe import VARIABLES, describe_process
from parity.recipe import Recipe
from parity.record import Verdict
from parity.stages import find
from parity.trace import Trace

PLUGIN = """
import numpy as np
from tests.third_party import NumpyAdamW
from {helper} import rate

class Plugin(NumpyAdamW):
    name = "plugin"

    def optimizer_step(self, recipe, inputs):
        lr = recipe.optim.lr * rate()
        return super().optimizer_step(recipe.override({{"optim.lr": lr}}), inputs)

    def environment(self):
        from pathlib import Path
        return {{"driver": Path({driver!r}).read_text()}}
"""
STEP = find("optimizer_step")
REFERENCE = "tests.third_party:NumpyAdamW"


@pytest.fixture
def plugin(tmp_path, monkeypatch, request):
    """A path of a user in the working directory, with a helper module and a driver's version."""
    stem = f"plugin_{abs(hash(request.node.name))}"
    (tmp_path / f"{stem}.py").write_text(
        PLUGIN.format(helper=f"{stem}_helper", driver=str(tmp_path / "driver"))
    )
    (tmp_path / f"{stem}_helper.py").write_text("def rate():\n    return 1.0\n")
    (tmp_path / "driver").write_text("1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    root = Path(__file__).parents[1]
    monkeypatch.setenv("PYTHONPATH", f"{root}:{os.environ.get('PYTHONPATH', '')}")
    keys.of_path.cache_clear()
    return stem


def verdict(engine, plugin, seed=3407):
    recipe = Recipe().override({"seed.value": seed})
    return run_cell(engine, Cell(STEP, f"{plugin}:Plugin", REFERENCE, recipe))


def edit(plugin, text):
    file = Path(f"{plugin}_helper.py")
    file.write_text(text)


def test_an_edited_helper_of_a_plugin_changes_the_verdict(plugin, tmp_path):
    cache = tmp_path / "cache"
    with Engine(cache) as engine:
        assert verdict(engine, plugin).verdict is Verdict.IDENTICAL
    with Engine(cache) as engine:
        assert verdict(engine, plugin).verdict is Verdict.IDENTICAL
        assert engine.captured == 0
    edit(plugin, "def rate():\n    return 1.1\n")
    with Engine(cache) as engine:
        assert verdict(engine, plugin).verdict is Verdict.DIVERGE
        assert engine.captured > 0
    edit(plugin, "def rate():\n    return 1.0\n")
    with Engine(cache) as engine:
        assert verdict(engine, plugin).verdict is Verdict.IDENTICAL
        assert engine.captured == 0, "what it was is there still"


@pytest.mark.long
def test_a_file_that_lies_elsewhere_counts_as_well(plugin, tmp_path):
    """As an editable installation that is found by a hook and not on the search path."""
    far = tmp_path / "far" / "helper.py"
    far.parent.mkdir()
    far.write_text("def rate():\n    return 1.0\n")
    edit(
        plugin,
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('far_helper', {str(far)!r})\n"
        "sys.modules['far_helper'] = module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "rate = module.rate\n",
    )
    cache = tmp_path / "cache"
    with Engine(cache) as engine:
        assert verdict(engine, plugin).verdict is Verdict.IDENTICAL
    far.write_text("def rate():\n    return 1.1\n")
    with Engine(cache) as engine:
        assert verdict(engine, plugin).verdict is Verdict.DIVERGE


@pytest.mark.long
def test_a_live_worker_is_not_used_once_its_code_is_edited(plugin, tmp_path, monkeypatch):
    monkeypatch.setattr(loaded.Check, "FRESH", 0.0)
    with Engine(tmp_path / "cache") as engine:
        assert verdict(engine, plugin, 1).verdict is Verdict.IDENTICAL
        edit(plugin, "def rate():\n    return 1.1\n")
        assert verdict(engine, plugin, 2).verdict is Verdict.DIVERGE
        assert verdict(engine, plugin, 1).verdict is Verdict.DIVERGE


def test_a_module_that_hides_another_is_noticed(plugin, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    with Engine(cache) as engine:
        assert verdict(engine, plugin).verdict is Verdict.IDENTICAL
    first = tmp_path / "first"
    first.mkdir()
    (first / "numpy.py").write_text("raise ImportError('another numpy')")
    monkeypatch.setenv("PYTHONPATH", f"{first}:{os.environ['PYTHONPATH']}")
    with Engine(cache) as engine:
        assert verdict(engine, plugin).verdict is Verdict.ERROR


@pytest.fixture
def started(tmp_path):
    """An engine on an empty cache, whose worker of the reference has made a capture."""
    with Engine(tmp_path / "cache") as engine:
        engine.capture(REFERENCE, "defaults", Recipe(), Trace())
        yield engine


def test_an_edited_binary_and_this_package_itself_are_in_the_manifest(started):
    [worker] = [worker for worker in started._pool._idle if worker.spec == REFERENCE]
    manifest = loaded.json.loads((started.cache / "loaded" / f"{worker.loaded}.json").read_text())
    below = manifest["below"]
    for file in ("parity/capture/serving.py", "parity/trace.py", "tests/third_party.py"):
        assert below[file]
    assert any(name.startswith("numpy/") and name.endswith(".so") for name in below)
    assert not any("/python3" in name and "/json/" in name for name in below)


def test_a_file_that_was_not_touched_is_not_read_again(started, monkeypatch):
    check, digest = loaded.Check(started.cache), started._pool._idle[-1].loaded
    assert check.holds(digest, sys.executable)

    def read(*_):
        raise AssertionError("a file was hashed again")

    check._answers.clear()
    monkeypatch.setattr(loaded.hashlib, "file_digest", read)
    assert check.holds(digest, sys.executable)


def test_captures_of_two_environments_are_not_mixed_in_a_cell(plugin, tmp_path):
    """One capture of a cell is lost, and the driver is another when it is made again."""
    captures = tmp_path / "cache" / "captures"

    def drivers():
        found = sorted(captures.rglob("*.safetensors"), key=lambda file: file.stat().st_mtime_ns)
        environments = {file: Trace.load(file).environment for file in found}
        return {file: e["driver"] for file, e in environments.items() if "driver" in e}

    with Engine(tmp_path / "cache") as engine:
        assert verdict(engine, plugin).verdict is Verdict.IDENTICAL
    *_, last = drivers()
    last.unlink()
    (tmp_path / "driver").write_text("2")
    with Engine(tmp_path / "cache") as engine:
        record = verdict(engine, plugin)
    assert record.verdict is Verdict.IDENTICAL
    assert record.subject.environment["driver"] == "2"
    assert list(drivers().values()) == ["2", "2"]
    assert any(
        "captures of the subject came from two environments (driver: 1, then 2)" in finding
        for finding in record.findings
    )


def test_an_environment_that_never_stays_is_an_error(plugin, tmp_path):
    file = Path(f"{plugin}.py")
    file.write_text(file.read_text().replace("Path(", "str(np.random.rand()) or Path("))
    with Engine(tmp_path / "cache") as engine:
        record = verdict(engine, plugin)
        assert record.verdict is Verdict.ERROR
        assert "several environments: driver" in record.reason


def test_of_two_captures_that_hold_the_newer_one_is_used(plugin, tmp_path):
    """Else a cell whose other captures are of the newer environment would be run again each time."""
    file = Path(f"{plugin}.py")
    more = f"\n    def defaults(self, recipe, inputs):\n        import {plugin}_more\n        return super().defaults(recipe, inputs)\n"
    file.write_text(file.read_text() + more)
    Path(f"{plugin}_more.py").write_text("")
    with Engine(tmp_path / "cache") as engine:
        assert verdict(engine, plugin).subject.environment["driver"] == "1"
    (tmp_path / "driver").write_text("2")
    with Engine(tmp_path / "cache") as engine:
        engine.capture(f"{plugin}:Plugin", "defaults", Recipe(), Trace())
        assert verdict(engine, plugin).subject.environment["driver"] == "2"
    with Engine(tmp_path / "cache") as engine:
        record = verdict(engine, plugin)
        assert record.subject.environment["driver"] == "2"
        assert not engine.captured


@pytest.mark.parametrize("beginning", VARIABLES)
def test_what_an_environment_reports_belongs_to_the_key(beginning, monkeypatch):
    """Else captures of two environments would be found for one cell."""
    keys.of_path.cache_clear()
    before = keys.of_path(REFERENCE)
    monkeypatch.setenv(f"{beginning}_OF_A_TEST", "1")
    assert f"{beginning}_OF_A_TEST" in describe_process(())["variables"]
    keys.of_path.cache_clear()
    assert keys.of_path(REFERENCE) != before
