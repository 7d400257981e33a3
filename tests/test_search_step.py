"""The first part of a training step that differs is named, and only that."""

from __future__ import annotations

import pytest

from parity.bisect.locate_step import step
from parity.cells.cell import Cell
from parity.cells.run import context_of
from parity.stages import find
from tests.cost import long

FEW = {"train.steps": 4, "optim.lr": 3e-3}
BATCHES, REPORTED, GRADIENT = "the batches", "the loss that is reported", "the gradient"
LOOP, CLIP, UPDATE = "the gradient that the loop makes", "the clip", "the update"


def place(engine, recipe, planted, reference, **changes):
    recipe = recipe.override({**FEW, **changes})
    return step(context_of(engine, Cell(find("07"), f"tests.{planted}", reference, recipe)))


def equal(found):
    said = found.sentence.partition("; equal in this step: ")[2]
    return said.split(", ") if said else []


@pytest.mark.parametrize("reference", [long("mlx-lm"), "hf"])
@pytest.mark.parametrize(
    ("planted", "at", "says", "before"),
    [
        long(
            "search_faults:LateLoss", 2,
            [f"{REPORTED} differs", "it is the loss of step 1", "only the report differs"],
            [BATCHES],
        ),
        (
            "search_faults:LoopGradient", 1,
[f"{GRADIENT} differs at equal weights", "tensors"],
            [BATCHES, REPORTED],
        ),
        long(
            "search_faults:LoopDecay", 2,
            ["the adapter after it is not what the subject's own clip and optimizer make", "252 of 252"],
            [BATCHES, REPORTED, GRADIENT, LOOP, CLIP, UPDATE],
        ),
        long(
            "planted_paths:BadThirdStep", 3,
            [f"{UPDATE} differs on equal gradients"],
            [BATCHES, REPORTED, GRADIENT, LOOP, CLIP],
        ),
        long(
            "search_faults:LoopTouchesOne", 2,
            ["the adapter after it is not what the subject's own clip and optimizer make", "252 of 252"],
            [BATCHES, REPORTED, GRADIENT, LOOP, CLIP, UPDATE],
        ),
        long("planted_paths:LouderLoss", 1, ["the loss differs at equal weights"], [BATCHES, REPORTED]),
    ],
)  # fmt: skip
def test_the_first_part_that_differs_is_named(planted, at, says, before, reference, engine, small):
    found = place(engine, small, planted, reference)
    assert found.name == f"step {at}", found.sentence
    assert found.sentence.startswith(f"first divergent step {at} of 4: ")
    for words in says:
        assert words in found.sentence
    assert equal(found) == before
    assert "not compared" not in found.sentence


@pytest.mark.long
def test_a_norm_that_is_off_by_more_than_its_sum_rounds(engine, small):
    found = place(engine, small, "search_faults:NormReport", "mlx-lm", **{"train.steps": 2})
    assert found.sentence.startswith(
        "first divergent step 1 of 2: the gradient norm that is reported"
    )


@pytest.mark.long
def test_a_loop_that_trains_on_other_batches_than_it_draws(engine, small):
    found = place(engine, small, "search_faults:OtherBatches", "mlx-lm", **{"data.source": "mixed"})
    assert "it is that of the batch drawn for step 4: the loop trains on that one" in found.sentence


@pytest.mark.long
def test_a_loop_that_draws_no_batch(engine, small):
    found = place(engine, small, "planted_paths:LazyLoop", "mlx-lm", **{"train.steps": 2})
    assert "step 2 of 2: the batches differ: the subject drew no batch for step 2" in found.sentence


@pytest.mark.long
@pytest.mark.parametrize(
    ("planted", "says"),
    [
        (
            "search_faults:LoopGradient",
            f"{GRADIENT} of micro-batch 1 of 2 differs at equal weights",
        ),
        long("planted_paths:LouderLoss", "the loss of micro-batch 1 of 2 differs"),
    ],
)
def test_every_micro_batch_is_compared(planted, says, engine, small):
    changes = {"train.accumulation": 2, "train.batch_size": 2, "data.source": "mixed"}
    assert says in place(engine, small, planted, "hf", **changes).sentence


@pytest.mark.long
def test_a_micro_batch_that_is_left_out_is_named(engine, small):
    changes = {"train.accumulation": 3, "train.batch_size": 2, "data.source": "mixed"}
    name = "benchmarks.planted.training:last_micro_batch_forgotten_path"
    recipe = small.override({**FEW, **changes})
    found = step(context_of(engine, Cell(find("07"), name, "mlx-lm", recipe)))
    assert (
        "it is that of micro-batches 1, 2 of 3 alone, and so is the gradient norm" in found.sentence
    )
    assert "the loop trains on no other of this step" in found.sentence
    assert "another batch" not in found.sentence


@pytest.mark.long
def test_a_clip_of_each_micro_batch_is_no_matter_of_the_report(engine, small):
    """The norm that a watched loop shows is that of what was clipped: that alone proves nothing."""
    changes = {"train.accumulation": 2, "train.batch_size": 2, "data.source": "mixed"}
    clip = {"optim.clip": "norm", "optim.clip_value": 0.3}
    name = "benchmarks.planted.plugins:clipped_before_averaging_path"
    recipe = small.override({**FEW, **changes, **clip, "train.steps": 2})
    found = step(context_of(engine, Cell(find("07"), name, "hf", recipe)))
    assert "the clip inside the loop differs at equal weights" in found.sentence, found.sentence
    assert "only the report differs" not in found.sentence


@pytest.mark.long
def test_what_could_not_be_compared_is_said(engine, small):
    """With dropout no gradient can be taken again, so that only the batches are known to agree."""
    once = {"lora.dropout": 0.1, "train.steps": 2}
    found = place(engine, small, "search_faults:LoopGradient", "mlx-lm", **once)
    assert "not compared: " in found.sentence
    assert "dropout draws another mask in each run" in found.sentence
    assert f"{GRADIENT} differs" not in found.sentence


@pytest.mark.parametrize("reference", [long("mlx-lm"), long("hf")])
def test_no_part_of_an_equal_step_is_named(reference, engine, small):
    found = place(engine, small, "search_faults:NoSeed", reference, **{"train.steps": 2})
    assert found.name == ""
    assert "could not be found" in found.sentence
