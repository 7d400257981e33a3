"""What orders a search: factors that a stage is the first to read come first."""

from __future__ import annotations

import pytest

from parity.bisect.likelihood import FIRST_READ, OTHER, READ, likelihood
from parity.recipe import factor_names


@pytest.mark.parametrize(
    ("stage", "factor", "weight"),
    [
        ("optimizer_step", "optim.eps", FIRST_READ),
        ("optimizer_step", "lora.rank", OTHER),
        ("lora_init", "lora.scale", FIRST_READ),
        ("gradient", "lora.scale", READ),
        ("loss_curve", "train.accumulation", FIRST_READ),
        ("loss_curve", "optim.eps", READ),
        ("a_stage_of_my_own", "lora.rank", OTHER),
    ],
)
def test_the_first_stage_that_reads_a_factor_suspects_it_most(stage, factor, weight):
    assert likelihood(stage, [factor]) == {factor: weight}


def test_every_factor_has_a_weight_at_every_stage():
    assert likelihood("loss_curve", factor_names()).keys() == set(factor_names())
