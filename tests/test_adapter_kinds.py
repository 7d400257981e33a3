"""What is trained: LoRA, DoRA or the weights themselves, on linear layers, embeddings and experts."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from parity.cells.cell import Cell
from parity.cells.run import run_cell
from parity.errors import Unsupported
from parity.report.text import describe
from parity.stages import find
from parity.trace import Trace
from tests.cost import long

LAST = {"lora.num_layers": 2, "train.steps": 3}


@pytest.fixture(scope="module")
def cell(engine, small):
    """The record of a probe on two paths, of a recipe with some changes."""

    def run(probe, subject, reference, **changes):
        recipe = small.override({**LAST, **{k.replace("__", "."): v for k, v in changes.items()}})
        return run_cell(engine, Cell(find(probe), subject, reference, recipe))

    return run


@pytest.fixture(scope="module")
def init(engine, small):
    """The adapter of a path before training."""

    def capture(path, **changes):
        recipe = small.override({**LAST, **{k.replace("__", "."): v for k, v in changes.items()}})
        return engine.source(path)("lora_init", recipe, Trace())

    return capture


@pytest.mark.parametrize("kind", ["dora", "full"])
@pytest.mark.parametrize("probe", ["04", "05", long("00"), long("07"), long("11")])
def test_a_kind_of_training_agrees_across_frameworks(probe, kind, cell):
    record = cell(probe, "mlx", "hf", lora__kind=kind)
    assert record.verdict.green, describe(record)


@pytest.mark.parametrize("kind", ["dora", "full"])
@pytest.mark.parametrize("probe", ["04", "07", long("05"), long("08"), long("11")])
def test_a_kind_of_training_is_bit_identical_with_the_command_line(probe, kind, cell):
    record = cell(probe, "mlx", "mlx-lm", lora__kind=kind)
    assert record.verdict == "identical", describe(record)


@pytest.mark.parametrize("path", ["mlx", "mlx-lm", "hf"])
@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_the_kind_is_read_from_what_is_trainable(kind, path, init):
    trace = init(path, lora__kind=kind)
    assert trace.scalars["kind"] == kind
    assert trace.scalars["layers"] == [16, 17]


@pytest.mark.parametrize("path", ["trl", "unsloth"])
def test_a_trainer_trains_magnitudes(path, init):
    trace = init(path, lora__kind="dora")
    assert trace.scalars["kind"] == "dora"
    assert "layers.17.self_attn.q_proj.m" in trace.scalars["trainable"]


def test_magnitudes_start_at_the_norms_of_the_real_weights(init, engine, small):
    trace = init("mlx", lora__kind="dora", lora__target_modules=["o_proj"])
    weights = init("mlx", lora__kind="full").group("adapter")
    for name in ("layers.16.self_attn.o_proj", "layers.17.self_attn.o_proj"):
        norms = np.linalg.norm(weights[f"{name}.weight"].astype(np.float64), axis=1)
        np.testing.assert_allclose(trace.arrays[f"adapter/{name}.m"], norms, rtol=1e-6)


@pytest.mark.parametrize("path", ["trl", "unsloth"])
def test_what_a_trainer_cannot_train_is_refused_with_the_reason(path, init):
    with pytest.raises(Unsupported, match=r"lora\.kind=full"):
        init(path, lora__kind="full")


# Experts, embeddings, the head -------------------------------------------------------------------


def test_the_rank_of_experts_is_no_width(init, experts):
    trace = init(
        "mlx", model__source=str(experts), lora__target_modules=["down_proj"], lora__rank=3
    )
    assert trace.scalars["rank"] == 3


@pytest.mark.parametrize("path", ["mlx", "mlx-lm"])
def test_a_model_is_used_again_after_experts_and_embeddings_were_adapted(path, init, experts):
    """Each of them leaves the model as it was loaded, for the next."""
    for targets in (["up_proj", "embed_tokens"], ["q_proj"], ["lm_head", "down_proj"]):
        trace = init(path, model__source=str(experts), lora__target_modules=targets)
        assert trace.scalars["modules"] == sorted(targets)


UNWRAP = """
import sys
import mlx_lm
from mlx_lm.tuner.utils import linear_to_lora_layers
from parity.paths.mlx.pristine import without_adapter
model = mlx_lm.load(sys.argv[1])[0]
before = [(name, id(module)) for name, module in model.named_modules()]
keys = ["self_attn.q_proj", "mlp.switch_mlp.up_proj", "model.embed_tokens", "lm_head"]
parameters = {"rank": 2, "scale": 1.0, "dropout": 0.5, "keys": keys}
linear_to_lora_layers(model, -1, parameters)
assert [(name, id(module)) for name, module in model.named_modules()] != before
assert sorted((n, id(m)) for n, m in without_adapter(model).named_modules()) == sorted(before)
"""


def test_an_adapter_of_any_kind_is_taken_out_of_a_model_that_came_with_it(experts):
    subprocess.run([sys.executable, "-c", UNWRAP, str(experts)], check=True)


def test_the_weights_are_those_of_the_checkpoint_after_they_were_trained(engine, small):
    for path in ("mlx", "hf"):
        source = engine.source(path)
        full = small.override({**LAST, "lora.kind": "full"})
        before = source("lora_init", full, Trace())
        source("train", full, Trace())
        after = source("lora_init", full.override({"seed.value": 8}), Trace())
        for name, value in before.group("adapter").items():
            np.testing.assert_array_equal(value, after.arrays[f"adapter/{name}"])


@pytest.mark.parametrize("probe", ["04", long("05"), long("07"), long("11")])
def test_experts_are_adapted_as_by_peft(probe, cell, experts):
    targets = ["q_proj", "down_proj"]
    record = cell(probe, "mlx", "hf", model__source=str(experts), lora__target_modules=targets)
    assert record.verdict.green, describe(record)


def test_the_head_is_adapted_as_by_peft(cell, experts):
    changes = {"model__source": str(experts), "lora__target_modules": ["lm_head", "q_proj"]}
    record = cell("05", "mlx", "hf", **changes, lora__num_layers=-1)
    assert record.verdict.green, describe(record)


@pytest.mark.parametrize(
    ("path", "target", "reason"),
    [
        (
            "mlx",
            "nothing_such",
            r"no modules \['nothing_such'\].*down_proj, embed_tokens, .*q_proj",
        ),
        ("mlx-lm", "nothing_such", r"no modules \['nothing_such'\].*it has .*q_proj"),
        ("hf", "nothing_such", r"no modules \['nothing_such'\].*it has .*q_proj"),
        ("hf", "gate_proj", "one adapter of gate_up_proj"),
        ("hf", "lm_head", "nothing outside of the layers"),
    ],
)
def test_a_target_that_cannot_be_adapted_is_named_with_the_reason(
    path, target, reason, init, experts
):
    with pytest.raises(Unsupported, match=reason):
        init(path, model__source=str(experts), lora__target_modules=[target])


def test_experts_of_every_layer_are_trained_by_the_command_line_as_well(cell, experts):
    record = cell(
        "07", "mlx", "mlx-lm",
        model__source=str(experts), lora__target_modules=["gate_proj", "up_proj", "down_proj"],
    )  # fmt: skip
    assert record.verdict == "identical", describe(record)
