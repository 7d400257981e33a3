"""Gradients at modules, and the search backwards from the loss."""

from __future__ import annotations

import numpy as np
import pytest

from parity.bisect.answer import answer
from parity.bisect.causes import CauseSearch
from parity.bisect.locate import locate
from parity.bisect.locate_backward import BackwardComparison, by_adapters
from parity.cells.cell import Cell
from parity.cells.run import context_of, run_cell
from parity.errors import UsageError
from parity.names import LOGITS
from parity.recipe import load as load_recipe
from parity.resources import model_dir
from parity.stages import find
from parity.stages.gradient import Gradient
from parity.stages.pair import Pair
from parity.trace import Trace
from tests.cost import long

GRADIENT = find("05")


def search(engine, subject, reference, recipe, stage=GRADIENT):
    """Only the one stage, after the configuration."""
    stages = (find("00"), stage)
    return CauseSearch(engine, subject, reference, recipe, {}, stages=stages).search()


def placed(report):
    return next(visit.place for visit in report.path if visit.place)


def gradients(engine, path, recipe, **scalars):
    context = context_of(engine, Cell(GRADIENT, "mlx", "hf", recipe))
    _, (rows, _) = Gradient().inputs(context)  # B ≠ 0
    return rows, engine.capture(path, "gradient", recipe, Trace(rows.arrays, scalars))


@pytest.mark.parametrize("path", ["mlx", long("mlx-lm"), "hf"])
def test_watching_modules_changes_no_bit(path, engine, small):
    _, bare = gradients(engine, path, small)
    _, watched = gradients(engine, path, small, modules=True)
    for name, value in bare.arrays.items():
        assert np.array_equal(value, watched.arrays[name]), name
    order = watched.scalars["order"]
    assert order[-1] == LOGITS or order[-2] == LOGITS
    assert set(order) == watched.group("activation").keys()
    assert all(np.isfinite(v).all() for v in watched.group("activation").values())
    name = "layers.4.mlp.down_proj"
    assert watched.arrays[f"activation/{name}"].shape[-1] == 64
    assert watched.arrays[f"input/{name}"].shape[-1] == 128


def test_frameworks_name_the_same_gradients_alike(engine, small):
    """Gradients at modules of one name agree across frameworks within what rounding explains."""
    context = context_of(engine, Cell(GRADIENT, "mlx", "hf", small))
    _, (rows, _) = Gradient().inputs(context)  # B ≠ 0
    pair = context.pair("gradient", Trace(rows.arrays, {"modules": True}))
    outputs = BackwardComparison(pair, pair.subject).outputs
    assert len(outputs) > 250
    assert [name for name, metric in outputs.items() if not metric.verdict.green] == []


@pytest.mark.parametrize("path", ["mlx", long("mlx-lm"), "hf"])
def test_a_replaced_gradient_is_passed_on(path, engine, small):
    rows, watched = gradients(engine, path, small, modules=True)
    at = "layers.9.mlp.down_proj"
    doubled = rows.with_group("replace", {at: 2 * watched.arrays[f"activation/{at}"]})
    doubled.scalars["modules"] = True
    again = engine.capture(path, "gradient", small, doubled)
    # What arrives is as it was; what is passed on is doubled, and so is the module's own gradient.
    for group, name, factor in (
        ("activation", at, 1),
        ("activation", "layers.10", 1),
        ("input", at, 2),
        ("gradient", f"{at}.lora_b", 2),
        ("gradient", f"{at}.lora_a", 2),
        ("gradient", "layers.10.mlp.down_proj.lora_b", 1),
    ):
        before, after = (t.arrays[f"{group}/{name}"] for t in (watched, again))
        assert np.allclose(after, factor * before, rtol=1e-5, atol=0), (group, name)


# Against mlx-lm the search goes the same way: `test_bisect.py` has BadBackward against it as well.
@pytest.mark.parametrize("reference", [long("mlx-lm"), "hf"])
@pytest.mark.parametrize(
    ("planted", "says"),
    [
        long("BadBackward", "first bad module layers.9.mlp.down_proj: the gradient at its output"),
        long("BadAttentionBackward", "first bad module layers.9.self_attn:"),
        long("BadNormBackward", "first bad module layers.9.post_attention_layernorm:"),
        long("BadRopeBackward", "first bad module layers.9.self_attn"),
        ("BadLoraBackward", "first bad module layers.9.self_attn.v_proj: the gradient at its"),
        long("BadLossBackward", "the gradient of the loss at the logits differs already"),
    ],
)
def test_a_fault_in_one_backward_pass_is_placed(planted, says, reference, engine, small):
    report = search(engine, f"tests.planted_paths:{planted}", reference, small)
    [cause] = report.causes
    assert says in cause.sentence
    assert "the subject is off" in cause.sentence or reference == "mlx-lm"
    assert "confirmed: handed the reference's gradient at every module, only" in cause.sentence
    off = [mark.name for mark in placed(report).walk if mark.off]
    assert len(off) <= 1
    if planted == "BadAttentionBackward":
        assert "differ at q_proj" in cause.sentence
    if planted == "BadLoraBackward":
        assert "those of its own lora_b differ" in cause.sentence
        assert "1 of 252 tensors, only lora_b, only layer 9, only v_proj differ" in cause.sentence


@pytest.mark.long
def test_a_place_stands_out_from_what_is_rounded_otherwise_where_bits_decide(engine, small):
    """As on a GPU, where other operations beside a fault move the last bits of what is right."""
    report = search(engine, "tests.planted_paths:BadAmongRounding", "mlx-lm", small)
    [cause] = report.causes
    assert "first bad module layers.4.mlp" in cause.sentence
    assert "others differ by no more than rounding" in cause.sentence
    assert [mark.name for mark in placed(report).walk if mark.off] == ["layers.4.mlp"]


@pytest.mark.long
def test_rounding_at_modules_is_no_place_of_a_fault_in_the_loop(engine, small):
    """The loop hands on a gradient too large; its loss, seen outside of it, rounds otherwise."""
    cell = Cell(GRADIENT, "tests.planted_paths:LoudLoopOfRoundingLoss", "mlx-lm", small)
    place = locate(engine, cell, run_cell(engine, cell))
    assert not place.name
    assert "outside of the loop the gradients differ by no more than rounding" in place.sentence
    assert "bad module" not in place.sentence


def test_gradients_at_modules_stand_beside_those_of_the_same_pass(engine, small):
    """Inside `train` a compiler may round otherwise, and modules cannot be seen there."""
    _, inside = gradients(engine, "tests.planted_paths:RoundedInTrain", small)
    _, outside = gradients(engine, "tests.planted_paths:RoundedInTrain", small, modules=True)
    _, plain = gradients(engine, "mlx", small, modules=True)
    assert outside.group("gradient").keys() == plain.group("gradient").keys()
    for name, value in plain.group("gradient").items():
        assert np.array_equal(value, outside.group("gradient")[name]), name
    assert any(
        not np.array_equal(value, inside.group("gradient")[name])
        for name, value in plain.group("gradient").items()
    )


@pytest.mark.long
@pytest.mark.parametrize("model", ["tiny-llama", "tiny-qwen3"])
@pytest.mark.parametrize(
    ("planted", "where"), [("BadNormBackward", "post_attention_layernorm"), ("BadRopeBackward", "")]
)
def test_it_is_placed_on_the_other_models(planted, where, model, engine, small):
    recipe = small.override({"model.source": model})
    report = search(engine, f"tests.planted_paths:{planted}", "hf", recipe)
    assert f"first bad module layers.9.{where or 'self_attn'}:" in answer(report)
    assert "confirmed" in answer(report)


def a_pair(subject, reference):
    """Two traces with one ulp as the only source of noise."""
    return Pair(
        subject,
        reference,
        exact=False,
        rounded_is_reference=True,
        model_dtype="float32",
        half=False,
        main="",
        measure=lambda source: (None, "not measured here"),
        reduction=lambda: 0.0,
    )


def test_a_path_without_gradients_at_modules_is_searched_by_its_adapters():
    rng = np.random.default_rng(0)
    names = [f"layers.{n}.mlp.up_proj.lora_{p}" for n in range(3) for p in "ab"]
    theirs = {name: rng.normal(size=(4, 4)) for name in names}
    ours = {**theirs, **{n: 1.01 * theirs[n] for n in names if n.startswith("layers.1")}}
    pair = a_pair(*(Trace().with_group("gradient", side) for side in (ours, theirs)))
    order = [f"layers.{n}.mlp.up_proj" for n in range(3)]
    place = by_adapters(pair, order, "B = 0")
    assert place.name == "layers.1.mlp.up_proj"
    assert "agree down to layers.2.mlp.up_proj" in place.sentence
    assert by_adapters(a_pair(*[pair.reference] * 2), order, "B = 0") is None


def test_only_the_innermost_module_is_off():
    def trace(**bad):
        names = ["layers.0.mlp.up", "layers.0.mlp.down", "layers.0.mlp", "layers.0", LOGITS]
        made = Trace(scalars={"order": names})
        for group in ("activation", "input"):
            values = {name: np.full((2, 2), bad.get(f"{group}_{at}", 1.0))
                      for at, name in enumerate(names)}  # fmt: skip
            made = made.with_group(group, values)
        return made

    # The layer and the MLP pass on what the down-projection made of an equal gradient.
    bad = trace(input_1=2.0, activation_0=2.0, input_0=2.0, input_2=2.0, input_3=2.0)
    seen = BackwardComparison(a_pair(bad, trace()), bad)
    assert seen.off() == ["layers.0.mlp.down"]
    # Nothing inside is off, but a gradient differs between the modules.
    between = trace(activation_0=2.0)
    assert BackwardComparison(a_pair(between, trace()), between).alone() == (["layers.0.mlp"], 0)
    loss = trace(activation_4=2.0)
    assert BackwardComparison(a_pair(loss, trace()), loss).alone() == (["the loss"], 0)


@pytest.fixture
def smollm2(engine):
    """The recipe of real weights, where these are installed."""
    recipe = load_recipe("smollm2")
    try:
        model_dir(recipe.model.source)
    except UsageError as error:
        pytest.skip(f"SmolLM2-135M is not here (make smollm2): {error}")
    return recipe


@pytest.mark.long
def test_bad_modules_of_a_real_model_are_named_both_ways(engine, smollm2):
    forward = search(engine, "tests.planted_paths:BadModule", "hf", smollm2, find("02"))
    assert "first bad module layers.7.mlp.up_proj" in answer(forward)
    assert "mlp.up_proj in 1 of 30 layers (7)" in answer(forward)
    back = search(engine, "tests.planted_paths:BadBackward", "hf", smollm2)
    assert "first bad module layers.9.mlp.down_proj" in answer(back)
    assert "only mlp.down_proj in 1 of 30 layers (9) is off by itself" in answer(back)


@pytest.mark.long
def test_rounding_of_a_real_model_is_no_bad_module(engine, smollm2):
    """MLX's sum over 49,152 entries may make the gradient diverge; then no module is blamed."""
    report = search(engine, "mlx", "hf", smollm2)
    if report.causes:
        assert "no module is off by itself" in answer(report) or "the loss" in answer(report)
        assert "first bad module" not in answer(report)
