"""What an adapter loses between saving and loading turns probe 11, which says what it is."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import numpy as np
import pytest

from parity.capture.worker import environment
from parity.cells.cell import Cell
from parity.cells.run import context_of, run_cell
from parity.errors import UsageError
from parity.judge.noise import EPS
from parity.judge.updates import Updates
from parity.paths.registry import resolve
from parity.recipe import Recipe
from parity.recipe import load as load_recipe
from parity.record import Verdict
from parity.report.text import describe
from parity.resources import model_dir
from parity.stages import find
from tests.cost import long

STAGE = find("11")
MODULES, UPDATE, LOGITS, EFFECT = (
    f"{what}, subject"
    for what in (
        "modules with an adapter",
        "scale · A · B after loading",
        "logits after loading",
        "effect of the adapter",
    )
)
ALL = "all 126 modules"
Q3 = "1 of 126 modules (layers.3.self_attn.q_proj)"

FAULTS = [
    ("NoScale", UPDATE, [ALL, "A and B are the same, scale 20 in the place of 2, times 10"]),
    long(
        "AlphaAsScale",
        UPDATE,
        [ALL, "A and B are the same, scale 16 in the place of 2, times the rank"],
    ),
    long("ZeroB", UPDATE, [ALL, "B is zero"]),
    long("LostB", UPDATE, [Q3, "B is zero"]),
    long("LostA", UPDATE, [Q3, "A differs"]),
    long("SavedInBfloat16", UPDATE, [ALL, "A and B are rounded to bfloat16"]),
    long("NextLayer", UPDATE, ["those of the layer +1 away", "of the layer -17 away"]),
    long("NotLoaded", MODULES, ["none has an adapter after loading, 126 were handed over"]),
    long("OtherForwardUnsaid", LOGITS, ["off from the live model's"]),
]


def run(engine, recipe, subject, reference="mlx-lm", changes=None):
    name = f"tests.round_trip_paths:{subject}" if subject[0].isupper() else subject
    return run_cell(engine, Cell(STAGE, name, reference, recipe, changes or {}))


def subject_metrics(record):
    return {metric.name: metric for metric in record.metrics if ", subject" in metric.name}


@pytest.mark.parametrize(("path", "metric", "words"), FAULTS)
def test_what_is_lost_is_named(path, metric, words, engine, small):
    record = run(engine, small, path)
    assert record.verdict is Verdict.DIVERGE, describe(record)
    assert record.first_divergence["metric"] == metric
    for word in words:
        assert word in record.reason, describe(record)
    # The other side's own way through its files is in order.
    assert not any(m.name.endswith(", reference") for m in record.metrics if not m.verdict.green)


@pytest.mark.long
def test_layers_from_the_wrong_end_are_named(engine, small):
    recipe = small.override({"lora.num_layers": 4})
    record = run(engine, recipe, "FirstLayers")
    assert record.verdict is Verdict.DIVERGE, describe(record)
    assert record.first_divergence["metric"] == MODULES
    assert "adapted after loading: layers 0 to 3; handed over: layers 14 to 17" in record.reason


def test_a_file_that_the_loader_refuses_is_an_error_that_names_the_tensor(engine, small):
    record = run(engine, small, "StrangeName")
    assert record.verdict is Verdict.ERROR, describe(record)
    assert "layers.3.self_attn.query.lora_a: not an adapter parameter" in record.reason


@pytest.mark.long
def test_alpha_that_peft_divides_again_is_named(engine, small):
    record = run(engine, small, "AlphaDivided", "hf")
    assert record.first_divergence["metric"] == UPDATE
    assert "scale 0.25 in the place of 2, divided by the rank" in record.reason


@pytest.mark.long
def test_an_adapter_that_takes_no_part_is_not_green(engine, small):
    record = run(engine, small, "SwitchedOff", "hf")
    found = subject_metrics(record)
    # Its files are right and the two models are alike: both do without it.
    assert found[UPDATE].verdict is found[LOGITS].verdict is Verdict.IDENTICAL
    assert record.first_divergence["metric"] == EFFECT
    assert "without an adapter" in record.reason


def test_other_operations_that_are_declared_are_held_to_the_floor(engine, small):
    record = run(engine, small, "OtherForward")
    assert record.verdict is Verdict.AGREE, describe(record)
    metric = subject_metrics(record)[LOGITS]
    assert 0 < metric.value <= metric.tolerance
    assert metric.why_floor == "the live model has A and B in one product"
    assert any(metric.why_floor in text for text in record.findings)


CLEAN = [
    ("mlx", "mlx-lm", Verdict.IDENTICAL),
    ("mlx", "hf", Verdict.AGREE),
    long("trl", "hf", Verdict.IDENTICAL),
    long("unsloth", "mlx-lm", Verdict.IDENTICAL),
]
PATHS = ["mlx", "mlx-lm", "hf", "trl", "unsloth"]


def needs(path):
    if path == "unsloth" and importlib.util.find_spec("unsloth_zoo") is None:
        pytest.skip("needs unsloth-zoo")


@pytest.mark.parametrize(
    ("subject", "reference", "verdict"),
    CLEAN,
    ids=["mlx-mlx-lm", "mlx-hf", "trl-hf", "unsloth-mlx-lm"],
)
def test_a_clean_round_trip_is_green(subject, reference, verdict, engine, small):
    needs(subject)
    record = run(engine, small, subject, reference)
    assert record.verdict is verdict, describe(record)
    for side in ("subject", "reference"):
        metrics = {m.name: m for m in record.metrics if m.name.endswith(side)}
        assert [m.verdict for m in metrics.values()] == [Verdict.IDENTICAL] * 4
        found = metrics[f"modules with an adapter, {side}"]
        assert found.total == 126
        assert "adapter_config.json" in found.note


@pytest.mark.long
@pytest.mark.parametrize("model", ["tiny-llama", "tiny-qwen3"])
@pytest.mark.parametrize(
    ("subject", "reference"), [("mlx", "mlx-lm"), ("unsloth", "mlx-lm"), ("trl", "hf")]
)
def test_a_clean_round_trip_is_green_on_other_models(subject, reference, model, engine, small):
    needs(subject)
    record = run(engine, small.override({"model.source": model}), subject, reference)
    assert record.verdict is Verdict.IDENTICAL, describe(record)


@pytest.mark.long
@pytest.mark.parametrize("stage", ["round_trip", "fuse"])
def test_an_adapter_of_real_weights_is_what_was_trained(stage, engine):
    """SmolLM2 between the command line of mlx-lm and PEFT."""
    recipe = load_recipe("smollm2")
    try:
        model_dir(recipe.model.source)
    except UsageError as error:
        pytest.skip(f"SmolLM2-135M is not here (make smollm2): {error}")
    record = run_cell(engine, Cell(find(stage), "mlx-lm", "hf", recipe))
    assert record.verdict is Verdict.AGREE, describe(record)


TRAINED = "trained for 2 steps"


@pytest.mark.parametrize(
    ("subject", "reference"), [("mlx", "mlx-lm"), long("unsloth", "hf"), long("trl", "hf")]
)
def test_what_a_trainer_leaves_is_what_it_trained(subject, reference, engine, small):
    needs(subject)
    record = run(engine, small, subject, reference)
    found = {m.name: m for m in record.metrics if m.name.endswith(TRAINED)}
    assert [m.verdict for m in found.values()] == [Verdict.IDENTICAL] * 8, describe(record)
    assert (
        "of 252 tensors changed" in found[f"training changes the adapter, subject, {TRAINED}"].note
    )
    assert found[f"logits after loading, subject, {TRAINED}"].tolerance == 0


@pytest.mark.parametrize(
    ("subject", "metric", "words"),
    [
        long("SavedTooEarly", "scale · A · B after loading", ["all 126 modules", "B is zero"]),
        ("NotTrained", "training changes the adapter", ["0 of 252 tensors changed"]),
    ],
)
def test_a_trainer_that_leaves_something_else_is_found(subject, metric, words, engine, small):
    record = run(engine, small, subject)
    assert record.verdict is Verdict.DIVERGE, describe(record)
    assert record.first_divergence["metric"] == f"{metric}, subject, {TRAINED}"
    for word in words:
        assert word in record.reason, describe(record)


def test_each_side_is_held_to_its_own_recipe(engine, small):
    record = run(engine, small, "mlx", changes={"subject": {"lora.scale": 4.0}})
    assert {m.verdict for m in subject_metrics(record).values()} == {Verdict.IDENTICAL}
    assert record.first_divergence["metric"] == "logits after loading, both"
    assert "the logits before saving differ as well" in record.findings[0]


LOAD = """
import sys
from pathlib import Path
import numpy as np
from parity.paths.registry import resolve
from parity.errors import UsageError
from parity.recipe import Recipe
from parity.recipe import load as load_recipe
from parity.trace import Trace

action, name, cache, inputs, folder, output = sys.argv[1:]
path, inputs, folder = resolve(name)(Path(cache)), Trace.load(Path(inputs)), Path(folder)
recipe = Recipe()
if action == "save":
    import shutil
    with path.saved(recipe, inputs.group("adapter"), lambda model: None) as saved:
        shutil.copytree(saved, folder)
else:
    np.save(output, path.forward(path.reloaded(recipe, folder), inputs.arrays["ids"]).values)
"""


@pytest.mark.long
@pytest.mark.parametrize(
    "name",
    [path if path == "mlx-lm" else long(path) for path in PATHS],
)
def test_a_fresh_process_loads_the_same(name, engine, tmp_path):
    """The stage loads in the process that saved: here another one loads what one has left."""
    needs(name)
    cell = Cell(STAGE, name, "mlx-lm", Recipe())
    context = context_of(engine, cell)
    inputs = STAGE.inputs(context)
    here = context.capture("subject", "round_trip", cell.recipe, inputs).arrays["loaded"]
    inputs.save(tmp_path / "inputs")
    words = [
        name,
        tmp_path / "cache",
        tmp_path / "inputs",
        tmp_path / "adapter",
        tmp_path / "out.npy",
    ]
    for action in ("save", "load"):
        subprocess.run(
            [sys.executable, "-c", LOAD, action, *map(str, words)],
            check=True, env=environment(resolve(name).framework, engine.cache), capture_output=True,
        )  # fmt: skip
    assert np.array_equal(np.load(tmp_path / "out.npy"), here)


def test_the_update_of_a_module_is_scale_times_a_times_b():
    rng = np.random.default_rng(0)
    plain = {"m.lora_a": rng.normal(size=(5, 2)), "m.lora_b": rng.normal(size=(2, 3))}
    experts = {"m.lora_a": rng.normal(size=(4, 2, 5)), "m.lora_b": rng.normal(size=(4, 3, 2))}
    for adapter, formula in ((plain, "ir,ro->oi"), (experts, "eri,eor->eoi")):
        updates = Updates({k: v.astype(np.float32) for k, v in adapter.items()}, 3.0)
        factors = [factor.astype(np.float64) for factor in updates.factors("m")]
        other = 3.0 * np.einsum(formula, *factors)
        assert updates["m"].shape == other.shape
        [bound] = updates.rounding("m").values()
        assert np.abs(updates["m"] - other).max() <= 2 * bound < 50 * EPS["float64"]


def test_a_module_without_a_scale_has_no_update():
    adapter = {"m.lora_a": np.ones((5, 2)), "m.lora_b": np.ones((2, 3))}
    assert np.isnan(Updates(adapter, {})["m"]).all()
