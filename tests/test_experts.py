"""Mixtures of experts: the float64 run, ties of a router, experts without tokens or without an adapter."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from parity.cells.cell import Cell
from parity.cells.run import run_cell
from parity.judge.noise import REFEREE
from parity.recipe import Recipe
from parity.report.text import describe
from parity.stages import experts as stage
from parity.stages import find
from tests.cost import long


@pytest.mark.parametrize("probe", ["02", long("05")])
def test_a_clean_mixture_of_experts_agrees_with_all_sources(probe, experts, engine, small):
    recipe = small.override(
        {"model.source": str(experts), "lora.target_modules": ["q_proj", "k_proj", "v_proj"]}
    )
    record = run_cell(engine, Cell(find(probe), "mlx", "hf", recipe))
    assert record.verdict.green, describe(record)
    floors = [metric for metric in record.metrics if metric.floor]
    assert floors
    for metric in floors:
        assert isinstance(metric.sources[REFEREE], float), metric.sources


SPARSE = {
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "num_hidden_layers": 3,
    "num_experts_per_tok": 2, "decoder_sparse_step": 1, "initializer_range": 0.06,
}  # fmt: skip


@pytest.fixture(scope="module")
def sparse(random_model):
    def make(change=None, experts=8):
        top = {"num_experts": experts, "rope_theta": 10000.0}
        return random_model("qwen2_moe", change, top, num_experts=experts, **SPARSE)

    return make


@pytest.fixture
def cell(engine):
    def run(probe, source, subject="mlx", reference="hf", **changes):
        recipe = Recipe().override({"model.source": source, "lora.num_layers": -1, **changes})
        return run_cell(engine, Cell(find(probe), subject, reference, recipe))

    return run


@pytest.fixture(scope="module")
def tied(sparse):
    """Two experts of one layer have equal scores at every token."""

    def equal(model):
        gate = model.model.layers[1].mlp.gate
        gate.weight[3] = gate.weight[2]

    return sparse(equal)


def test_a_tie_of_a_router_is_named_and_nothing_else_is_left_out(tied, cell):
    record = cell("02", tied)
    assert record.verdict.green, describe(record)
    ties = [note for note in record.findings if "ties of routers (layers.1.mlp.gate)" in note]
    assert ties, record.findings
    assert all("with the reference's output of these blocks the logits agree" in n for n in ties)
    notes = [metric.note for metric in record.metrics]
    assert any("the others follow a tie of a router" in note for note in notes), notes


@pytest.mark.long
def test_a_tie_excuses_nothing_else(tied, cell):
    record = cell("02", tied, subject="tests.family_faults:LoudExperts")
    assert record.verdict == "diverge", describe(record)
    assert not any("ties of routers" in note for note in record.findings), record.findings


def test_experts_that_no_token_reaches_are_named(sparse, cell):
    targets = {"lora.target_modules": ["q_proj", "down_proj"]}
    record = cell("05", sparse(experts=64), **targets)
    assert record.verdict.green, describe(record)
    idle = [note for note in record.findings if "experts have a gradient of zero on both" in note]
    assert idle
    assert "of 192 experts" in idle[0]
    assert "layers.0.mlp.switch_mlp.down_proj" in idle[0]


def test_a_module_whose_experts_all_have_no_gradient_is_not_compared():
    some, none = np.ones((4, 2, 3)), np.zeros((4, 2, 3))
    some[1] = 0
    names = {"layers.0.mlp.switch_mlp.down_proj.lora_b": some}
    other = {"layers.1.mlp.switch_mlp.down_proj.lora_b": none}
    (metric,) = stage.metrics(names, names, "B = 0")
    assert metric.verdict == "identical"
    assert metric.note == "3 of 4 experts"
    assert stage.findings(names, names, "B = 0") == [
        "B = 0: 1 of 4 experts have a gradient of zero on both sides, as where no token goes to them, so "
        "that nothing of them was compared: expert 1 of layers.0.mlp.switch_mlp.down_proj"
    ]
    (metric,) = stage.metrics(names | other, names | other, "B = 0")
    assert metric.verdict == "inconclusive"
    assert "no expert of layers.1.mlp.switch_mlp.down_proj has a gradient" in metric.note
    left = {"layers.0.mlp.switch_mlp.down_proj.lora_b": np.where(some, some, 1.0)}
    (metric,) = stage.metrics(left, names, "B = 0")
    assert metric.verdict == "diverge"
    assert metric.note.startswith(
        "expert 1 of layers.0.mlp.switch_mlp.down_proj has a gradient in the"
    )


def test_experts_without_an_adapter_are_named_though_both_sides_agree(sparse, cell):
    """A trainer that leaves experts out has a healthy loss, and equals itself."""
    paths = {
        "subject": "tests.family_faults:WithoutExperts",
        "reference": "tests.family_faults:LeftOutAsWell",
    }
    record = cell("00", sparse(), **paths, **{"lora.target_modules": ["q_proj", "down_proj"]})
    assert record.verdict == "identical", describe(record)
    words = (
        "lora.target_modules has down_proj, and mlp.switch_mlp.down_proj has no adapter in 3 layers that "
        "have one elsewhere, such as layers.0.mlp.switch_mlp.down_proj"
    )
    for side in ("subject", "reference"):
        assert f"{side}: {words}" in record.findings, describe(record)


@pytest.mark.long
@pytest.mark.parametrize("reference", ["mlx-lm", "hf"])
def test_clean_paths_leave_no_expert_out(reference, sparse, cell):
    targets = {"lora.target_modules": ["q_proj", "down_proj"]}
    record = cell("00", sparse(), reference=reference, **targets)
    assert record.verdict.green, describe(record)
    assert not any("has no adapter in" in note for note in record.findings), record.findings


@pytest.mark.long
def test_a_bundle_without_modules_tells_no_ties_and_fails_at_nothing(tied, engine, tmp_path):
    """Without the modules a tie cannot be told from a fault: a divergence, and what was not looked for."""
    command = [sys.executable, "-m", "parity.cli"]
    options = ["--probes", "02", "--seeds", "3407,", "--set", f"model.source={tied}"]
    bundle, out = str(tmp_path / "hf.bundle"), str(tmp_path / "run")
    for words in (
        ["capture", "hf", *options, "--out", bundle],
        ["run", "--subject", "mlx", "--reference", bundle, *options, "--out", out],
    ):
        done = subprocess.run([*command, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    [file] = (tmp_path / "run" / "records").glob("*.json")
    record = json.loads(file.read_text())
    assert record["verdict"] == "diverge"
    assert any("the first bad module was not looked for" in note for note in record["findings"])
