"""Short convolutions, state spaces and gated delta networks: small random models of these kinds.

mlx-lm has backward passes of its own for several of them.
"""

from __future__ import annotations

import pytest

from fixtures.random_models import ARCHITECTURES, architecture
from parity.bisect.locate_forward import forward
from parity.cells.cell import Cell
from parity.cells.run import context_of, run_cell
from parity.recipe import Recipe
from parity.report.text import describe
from parity.stages import find
from tests.cost import long

ALIKE = ["lfm2", "mamba", "mamba2", "falcon_h1", "olmo_hybrid"]


@pytest.fixture(scope="module")
def cell(engine, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")

    def run(probe, name, reference="hf"):
        changes = {
            "model.source": architecture(name, folder / name),
            "lora.target_modules": list(ARCHITECTURES[name].targets),
            "lora.num_layers": -1,
            "train.steps": 2,
        }
        made = Cell(find(probe), "mlx", reference, Recipe().override(changes))
        return made, run_cell(engine, made)

    return run


@pytest.mark.parametrize("name", ["lfm2", *map(long, ALIKE[1:])])
def test_logits_and_gradient_agree_with_torch(name, cell):
    for probe in ("02", "05"):
        _, record = cell(probe, name)
        assert record.verdict.green, describe(record)


@pytest.mark.parametrize("name", ["lfm2", *map(long, ["falcon_h1", "olmo_hybrid"])])
def test_a_cache_of_states_agrees_with_torch(name, cell):
    _, record = cell("10", name)
    assert record.verdict.green, describe(record)


@pytest.mark.long
@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_a_cache_of_nothing_but_states_goes_wrong_in_transformers(name, cell):
    """Its `generate` feeds the whole conversation again to a cache that has seen the start of it."""
    _, record = cell("10", name)
    off = [metric for metric in record.metrics if metric.gate and metric.verdict == "diverge"]
    assert any(metric.name == "replies token by token, reference" for metric in off)
    assert not any(metric.name.endswith(", subject") for metric in off), describe(record)
    # The float64 run goes wrong in the same way: which side is off is told by it without a cache.
    both = [metric for metric in off if metric.name.endswith("both through their caches")]
    assert both
    assert all(metric.off == "reference" for metric in both), describe(record)


@pytest.mark.long
@pytest.mark.parametrize("name", ALIKE)
def test_they_are_bit_identical_with_the_command_line(name, cell):
    for probe in ("02", "05"):
        _, record = cell(probe, name, "mlx-lm")
        assert record.verdict == "identical", describe(record)


@pytest.mark.long
def test_mlx_lm_normalises_groups_of_mamba_2_as_one(cell, engine):
    """transformers takes the norm of each group of channels, mlx-lm that of all."""
    made, record = cell("02", "mamba2-two-groups")
    assert record.verdict == "diverge", describe(record)
    place = forward(context_of(engine, made))
    assert place.name == "layers.0.mixer.norm", place.sentence
