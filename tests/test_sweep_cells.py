"""Tiny models and cells of a sweep: what is drawn, kept and asked again."""

from __future__ import annotations

import sys

import pytest

from parity.errors import DiskFull
from parity.sweep.answers import Cell
from parity.sweep.bench import Column
from parity.sweep.columns import Columns
from parity.sweep.examine import Examiner
from parity.sweep.models import Architecture
from parity.sweep.run import Sweep, _code
from parity.sweep.shrink import shrunk
from parity.sweep.sources import Sources, of_python
from parity.sweep.traps import Configurations
from tests.toy_sweep import Folders


def test_a_tiny_model_draws_nothing_at_random():
    keys = ("attention_dropout", "residual_dropout", "resid_pdrop", "attn_pdrop", "layerdrop", "router_jitter_noise")  # fmt: skip
    tiny = shrunk({**dict.fromkeys(keys, 0.1), "text_config": {"hidden_dropout_prob": 0.1}})
    assert {**tiny.pop("text_config"), **tiny} == dict.fromkeys([*keys, "hidden_dropout_prob"], 0.0)


def test_an_architecture_that_is_saved_under_another_type_says_whose_file_ran():
    column = Column("1", "mlx", None, of_python(sys.executable))
    cell = Cell("llama4", "1", file="llama4.py")
    examiner = Examiner(Architecture("llama4", "Llama4ForCausalLM"), column, Folders())
    model = Folders().model("", {"model_type": "llama4_text"})
    assert examiner._saved(cell, model) == "llama4_text"
    assert "models/llama4.py was not asked" in cell.remark and cell.file == "llama4_text.py"
    cell, unserved = Cell("llama4", "1", file="llama4.py"), Folders().model("", {"model_type": "x"})
    assert examiner._saved(cell, unserved) == "" and not cell.remark


def test_sentences_of_other_code_are_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("parity.__file__", str(tmp_path / "__init__.py"))
    names = [f"sweep/{name}.py" for name in ("unloaded", "filling", "explain", "wording", "rest")]
    for name in (*names, "paths/mlx/loading.py", "report/page.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    for name in (*names, "paths/mlx/loading.py"):
        before = _code()
        (tmp_path / name).write_text("2")
        assert _code() != before, name
    before = _code()
    (tmp_path / "report/page.py").write_text("2")
    assert _code() == before


@pytest.mark.parametrize("error", [ValueError("a bug"), DiskFull("the disk is full")])
def test_a_cell_that_broke_is_asked_again(error, tmp_path, monkeypatch):
    def fail(self):
        raise error

    monkeypatch.setattr(Examiner, "examine", fail)
    monkeypatch.setattr(Sweep, "_store", lambda self: None)
    (tmp_path / "models").mkdir()
    column = Column("1", "mlx", None, Sources(tmp_path))
    sweep = Sweep(Columns([]), tmp_path / "cache", 1)
    architecture = Architecture("toy", "Toy", Configurations([], [], {}))
    if isinstance(error, ValueError):
        cell = sweep.cell(architecture, column)
        assert "the search itself failed: ValueError: a bug" in cell.answers[0].causes[0].sentence
    else:
        with pytest.raises(DiskFull):
            sweep.cell(architecture, column)
    assert not [*(tmp_path / "cache").rglob("*.json")]
