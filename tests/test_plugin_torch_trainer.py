"""A whole trainer on torch as a path: watched from outside, without changing what it does."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from parity import resources
from parity.capture.worker import environment
from parity.cells.cell import Cell
from parity.cells.run import run_cell
from parity.errors import Unsupported
from parity.names import canonical
from parity.paths.measured import known
from parity.record import Verdict
from parity.report.text import describe
from parity.stages import find
from parity.trace import Trace
from tests.cost import long

HERE = "tests.torch_trainers"
EXAMPLES = Path(__file__).parents[1] / "examples"
BARE = (
    "import json, sys; from tests import torch_trainers as t; t.by_hand(**json.loads(sys.argv[1]))"
)


@pytest.fixture(autouse=True)
def examples(monkeypatch):
    """The examples as they lie where somebody works on them."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setenv("PYTHONPATH", f"{EXAMPLES}:{EXAMPLES.parent}")


def run(engine, stage, subject, recipe, reference="hf"):
    return run_cell(engine, Cell(find(stage), subject, reference, recipe))


def test_a_script_ends_in_the_bytes_of_its_bare_run(engine, small, tmp_path):
    lines = resources.data_dir(small.data.source).joinpath("train.jsonl").read_text().splitlines()
    given = {
        "path": resources.model_dir(small.model.source), "rows": [json.loads(x) for x in lines],
        "out": str(tmp_path), "steps": 6, "lr": small.optim.lr, "rank": 8, "scale": 2.0,
        "batch_size": small.train.batch_size, "seed": small.seed.value,
    }  # fmt: skip
    code = f"from parity.paths.registry import prepare; prepare('torch'); {BARE}"
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(given)],
        env=environment("torch", engine.cache), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    left = load_file(tmp_path / "adapter_model.safetensors")
    adapter = engine.capture(f"{HERE}:ByHand", "train", small, Trace()).group("adapter")
    assert len(left) == len(adapter) == 252
    for name, value in left.items():
        live = canonical(name.replace(".weight", ".default.weight"))
        assert np.array_equal(adapter[live], value.T), name
    assert any(value.any() for name, value in left.items() if "lora_B" in name)


@pytest.mark.parametrize(
    "stage", ["00", long("03"), long("05"), long("06"), long("07"), long("09")]
)
def test_a_right_trainer_agrees(stage, engine, small):
    # Its collator pads to the longest row, and supervises nothing behind it.
    asked = {"mask.end_shift": 0, "data.pad_extra": 0, "data.pad_multiple": 1}
    record = run(engine, stage, f"{HERE}:ByHand", small.override(asked))
    if stage == "00":
        known_facts = engine.capture(f"{HERE}:ByHand", "config", small, Trace()).scalars
        assert known_facts["loss.denominator"] == "supervised tokens"
        assert (known_facts["seed.value"], known_facts["seed.placement"]) == (3407, "before_lora")
        assert (known_facts["clip.mode"], known_facts["accumulation.steps"]) == ("none", 1)
        assert not [k for k, v in known_facts.items() if not known(v)]
        return
    assert record.verdict.green, describe(record)


@pytest.mark.long
def test_it_can_be_the_reference_of_a_path_on_mlx(engine, small):
    record = run(engine, "05", "mlx", small, f"{HERE}:ByHand")
    assert record.verdict is Verdict.AGREE, describe(record)
    assert "training rows are handed over as the subject tokenizes them" in record.findings


@pytest.mark.long
def test_what_is_wrong_with_one_is_named(engine, small):
    record = run(engine, "03", f"{HERE}:Averaging", small)
    assert record.verdict is Verdict.DIVERGE
    assert "the subject averages over padding" in describe(record)


@pytest.mark.long
def test_clip_and_accumulation_are_found_by_what_it_does(engine, small):
    recipe = small.override({"train.accumulation": 2, "train.batch_size": 3})
    found = engine.capture(f"{HERE}:Averaging", "config", recipe, Trace()).scalars
    assert (found["clip.mode"], found["clip.value"]) == ("norm", 0.25)
    assert (found["accumulation.steps"], found["accumulation.weighting"])[1] == "each in full"
    assert found["optim.class"] == "SGD"
    assert found["loss.denominator"] == "all positions"


@pytest.mark.parametrize(
    ("name", "method", "says"),
    [
        long("Without", "train", "no training was seen: it must call `backward`"),
        long("Tired", "train", "made 2 updates where train.steps=6"),
        ("ByHand", "tokenization", "is run as a whole: its rows are seen in its batches"),
    ],
)
def test_what_cannot_be_watched_is_one_clear_reason(name, method, says, engine, small):
    with pytest.raises(Unsupported, match=says):
        inputs = {"texts": [], "conversations": []} if method == "tokenization" else {}
        engine.capture(f"{HERE}:{name}", method, small, Trace(scalars=inputs))


@pytest.mark.long
@pytest.mark.parametrize("stage", ["04", "05", "07"])
def test_sft_trainer_watched_from_outside_is_the_built_in_path(stage, engine, small):
    """The public surface proven on a real trainer: the bits are those of path `trl`."""
    if not find_spec("trl"):
        pytest.skip("trl is not installed")
    assert len((EXAMPLES / "sft_trainer_path.py").read_text().splitlines()) <= 40
    record = run(engine, stage, "sft_trainer_path:Sft", small, "trl")
    assert record.verdict is Verdict.IDENTICAL, describe(record)
