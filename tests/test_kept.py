"""Finished records are used again where all that they were made of is the same, and only there."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from parity.capture.engine import Engine
from parity.capture.loaded import Check
from parity.cells import kept
from parity.cells.cell import Cell
from parity.cells.kept import run_kept
from parity.recipe import Recipe
from parity.record import Verdict
from parity.stages import find


@pytest.fixture
def cell():
    return Cell(find("01"), "mlx", "mlx-lm", Recipe())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A cache that holds the record of a cell, and its captures."""
    cache = tmp_path_factory.mktemp("made")
    with Engine(cache=cache, timeout=900) as engine:
        record = run_kept(engine, Cell(find("01"), "mlx", "mlx-lm", Recipe()))
    assert record.verdict is Verdict.IDENTICAL
    return cache


@pytest.fixture
def cache(made, tmp_path):
    return shutil.copytree(made, tmp_path / "cache", copy_function=shutil.copy2)


@pytest.fixture
def compared(monkeypatch):
    """Cells that were compared, and not read."""
    cells = []
    plain = kept.run_cell
    monkeypatch.setattr(kept, "run_cell", lambda e, c, *rest: cells.append(c) or plain(e, c, *rest))
    return cells


def test_it_is_not_compared_again_and_is_the_same_record(cache, cell, compared, monkeypatch):
    def never(*_):
        raise AssertionError("a worker is asked")

    with Engine(cache=cache) as engine:
        monkeypatch.setattr(engine, "_run", never)
        first = run_kept(engine, cell)
        assert not compared
        assert engine.current(engine.loaded)  # what it was made of counts as used
        again = kept.run_cell(engine, cell)
    passing = {"seconds": 0.0, "git": ""}
    assert first.model_copy(update=passing) == again.model_copy(update=passing)


def another_code(cache, monkeypatch):
    monkeypatch.setattr(kept, "_code", lambda: "another")


def other_libraries(cache, monkeypatch):
    monkeypatch.setattr(Check, "holds", lambda *_: False)


def a_capture_gone(cache, monkeypatch):
    next((cache / "captures").rglob("*.safetensors")).unlink()


def cut_short(cache, monkeypatch):
    [file] = (cache / "records").rglob("*.json")
    file.write_bytes(file.read_bytes()[:-9])


def without_captures(cache, monkeypatch):
    [file] = (cache / "records").rglob("*.json")
    _, _, text = file.read_bytes().partition(b"\n")
    file.write_bytes(b'{"environments": {}, "files": {}}\n' + text)


def another_environment(cache, monkeypatch):
    plain = Engine.__init__

    def changed(self, *args, **kwargs):
        plain(self, *args, **kwargs)
        self._present["mlx-lm"] = {"device": "another"}

    monkeypatch.setattr(Engine, "__init__", changed)


@pytest.mark.parametrize(
    "change",
    [
        another_code, other_libraries, a_capture_gone, cut_short, without_captures,
        another_environment,
    ],
)  # fmt: skip
def test_it_is_compared_again_where_anything_is_another(change, cache, cell, compared, monkeypatch):
    change(cache, monkeypatch)
    with Engine(cache=cache, timeout=900) as engine:
        run_kept(engine, cell)
    assert compared == [cell]


@pytest.mark.parametrize(
    ("changes", "sides"),
    [
        ({"model.source": "tiny-llama"}, {}),
        ({}, {"subject": {"optim.lr": 0.5}}),
        ({"seed.value": 1}, {}),
    ],
)
def test_another_cell_has_a_record_of_its_own(changes, sides, cache, cell, compared):
    other = Cell(cell.stage, cell.subject, cell.reference, cell.recipe.override(changes), sides)
    with Engine(cache=cache, timeout=900) as engine:
        run_kept(engine, other)
        assert compared == [other]
        run_kept(engine, other)
        run_kept(engine, cell)
    assert compared == [other]


OTHER_MODEL = {side: {"model.source": "tiny-llama"} for side in ("subject", "reference")}


@pytest.mark.parametrize("sides", [{}, OTHER_MODEL], ids=["of both sides", "of the inputs alone"])
def test_a_model_that_was_edited_is_another(sides, cache, cell, compared, random_model):
    source = Path(random_model("llama"))
    here = cell.recipe.override({"model.source": str(source)})
    own = Cell(cell.stage, cell.subject, cell.reference, here, sides)
    with Engine(cache=cache, timeout=900) as engine:
        for _ in range(2):
            run_kept(engine, own)
        assert compared == [own]
        os.utime(next(source.glob("*.safetensors")), ns=(1, 1))
        run_kept(engine, own)
    assert compared == [own, own]


@pytest.mark.parametrize(
    ("subject", "probe", "verdict"),
    [
        ("tests.third_party:NumpyAdamW", "02", Verdict.SKIP),
        ("tests.faulty_paths:Faulty", "02", Verdict.ERROR),
    ],
)
def test_what_failed_is_asked_again(subject, probe, verdict, cache, cell, compared):
    failing = Cell(find(probe), subject, "mlx-lm", cell.recipe)
    with Engine(cache=cache, timeout=900) as engine:
        for _ in range(2):
            assert run_kept(engine, failing).verdict is verdict
    assert compared == [failing, failing]
