"""A mixture of experts: its float64 run exists, so that its floors have their main source."""

from __future__ import annotations

import pytest

from parity.cells.cell import Cell
from parity.cells.run import run_cell
from parity.judge.noise import REFEREE
from parity.report.text import describe
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
