"""What the search says of a place in the forward pass is proven; faults between modules have a name."""

from __future__ import annotations

import numpy as np
import pytest

from parity.bisect.activation import formula
from parity.bisect.locate_earlier import made_earlier
from parity.bisect.locate_forward import ForwardComparison, forward
from parity.bisect.pattern import shape_of, tensors
from parity.cells.cell import Cell
from parity.cells.run import context_of
from parity.stages import find
from parity.stages.logits import Logits
from parity.trace import Trace
from tests.cost import long


def place(engine, planted, reference, recipe):
    context = context_of(engine, Cell(find("02"), f"tests.{planted}", reference, recipe))
    return forward(context)


@pytest.mark.parametrize("path", ["mlx", long("mlx-lm"), "hf"])
def test_a_recorded_output_is_what_the_module_gave(path, engine, small):
    """Gemma goes on with `h *= scale`: what was recorded must not change with it."""
    context = context_of(engine, Cell(find("02"), "mlx", "hf", small))
    rows = Trace(Logits().inputs(context).arrays, {"modules": True, "inputs": True})
    trace = engine.capture(path, "logits", small, rows)
    outputs, inputs = trace.group("module.0"), trace.group("input.0")
    if path != "hf":  # its embedding multiplies inside
        assert np.allclose(inputs["layers.0"], 8 * outputs["embed_tokens"], rtol=1e-6)
    for layer in range(17):
        assert np.array_equal(outputs[f"layers.{layer}"], inputs[f"layers.{layer + 1}"])
        residual = inputs[f"layers.{layer}"] + outputs[f"layers.{layer}.post_attention_layernorm"]
        follows = inputs[f"layers.{layer}.pre_feedforward_layernorm"]
        assert np.allclose(follows, residual, rtol=1e-5, atol=1e-5)
    assert trace.scalars["events"].index(["in", "layers.3"]) < trace.scalars["events"].index(
        ["out", "layers.3"]
    )
    assert "layers.3.mlp.up_proj" in trace.scalars["called"]


@pytest.mark.parametrize("reference", [long("mlx-lm"), "hf"])
@pytest.mark.parametrize(
    ("planted", "name", "says"),
    [
        long(
            "EmbeddingScale", "layers.0",
            ["the input of layers.0 (differs)", "the subject's is 0.5 times the reference's"],
        ),
        (
            "SkippedNorm", "layers.7",
            [
                "between the output of layers.7.self_attn (agrees) and the input of "
                "layers.7.pre_feedforward_layernorm (differs) in layers.7",
                "the subject does not call layers.7.post_attention_layernorm, the reference does",
            ],
        ),
        long(
            "AttentionProduct", "layers.5.self_attn",
            ["(agrees) and the input of layers.5.self_attn.o_proj (differs)", "position 0 agrees"],
        ),
    ],
)  # fmt: skip
def test_what_is_between_two_modules_has_a_name(planted, name, says, reference, engine, small):
    found = place(engine, f"search_faults:{planted}", reference, small)
    assert found.name == name
    for words in [*says, "confirmed, with the reference's"]:
        assert words in found.sentence
    assert "first bad module" not in found.sentence


@pytest.mark.parametrize("reference", [long("mlx-lm"), "hf"])
def test_the_greater_of_two_places_is_not_all(reference, engine, small):
    found = place(engine, "search_faults:TwoProducts", reference, small)
    assert found.name == "layers.5.self_attn"
    assert "most of it, with the reference's" in found.sentence
    assert "in 2 of 18 layers (5, 12)" in found.sentence


def test_a_small_difference_does_not_hide_what_stands_behind_it(engine, small):
    """Each layer begins with a norm that is off, and no logit shows it."""
    found = place(engine, "search_faults:SmallBeforeLarge", "hf", small)
    assert found.name == "layers.0.self_attn"
    # Of each layer the first alone is listed, and said to be that.
    firsts = found.sentence.partition("first off in it: ")[2].partition(";")[0]
    assert "norm in" in firsts and "o_proj" not in firsts, firsts
    # Which norms stand out beside the first depends on the rounding of the machine.
    given, _, behind = found.sentence.partition("; with the reference's values at ")[2].partition(
        " of each layer, "
    )
    assert all(name.endswith("norm") for name in given.split(", ")), given
    assert behind.startswith("between ")
    assert "(agrees) and the input of layers.0.self_attn.o_proj (differs)" in behind
    assert "not the only one, with the reference's input of layers.0.self_attn.o_proj" in behind


def test_a_module_that_passes_on_what_it_got_is_not_the_first_bad_one(engine, small):
    """Asked of a place further on than the attention of layer 5, which alone is wrong."""
    cell = Cell(find("02"), "tests.search_faults:AttentionProduct", "hf", small)
    context = context_of(engine, cell)
    scalars = {"modules": True, "inputs": True}
    rows = Trace({"ids.0": Logits().inputs(context).arrays["ids.0"]}, scalars)
    pair = context.pair("logits", rows)
    seen = ForwardComparison(pair, pair.subject)
    assert made_earlier(context, rows, seen, ("in", "layers.5.self_attn.o_proj")) is None
    for event in (("out", "layers.9.mlp"), ("out", "layers.5.mlp.up_proj")):
        words, name = made_earlier(context, rows, seen, event)
        assert name == "layers.5"
        assert "with the reference's values before it in its place it agrees" in words
        assert "it stays with the reference's input of layers.5" in words


@pytest.mark.parametrize("reference", [long("mlx-lm"), "hf"])
def test_a_module_that_does_not_reach_the_logits_is_not_named(reference, engine, small):
    found = place(engine, "search_faults:Harmless", reference, small)
    assert found.name == "layers.9.mlp.up_proj"
    assert (
        "the logits do not move with the reference's values at the output of layers.3.mlp.up_proj"
        in found.sentence
    )
    assert "only at channel 3 of 128" in found.sentence


@pytest.mark.parametrize(
    ("planted", "says"),
    [
        (
            "OtherActivation",
            "the subject's is silu of gate_proj times up_proj, the reference's gelu",
        ),
        long("ShortWindow", "positions 0 to 7 agree, off from position 8 on"),
        long(
            "ShortWindow",
            "the reference with sliding_window = 8 for 64 in its configuration agrees",
        ),
        long(
            "DefaultTheta",
            "the reference with rope theta = 10000 in all layers in its configuration",
        ),
    ],
)
def test_a_formula_or_setting_is_computed_again(planted, says, engine, small):
    found = place(engine, f"search_faults:{planted}", "hf", small)
    assert says in found.sentence


@pytest.mark.long
@pytest.mark.parametrize("reference", [long("mlx-lm"), "hf"])
def test_one_layer_s_theta_is_no_setting(reference, engine, small):
    found = place(engine, "planted_paths:BadRope", reference, small)
    assert "configuration" not in found.sentence
    assert "confirmed" in found.sentence


def test_equal_models_have_no_place(engine, small):
    found = place(engine, "search_faults:LateLoss", "hf", small)
    assert (found.name, found.walk) == ("", [])


def test_the_shape_of_a_difference():
    rng = np.random.default_rng(0)
    reference = rng.normal(size=(2, 10, 30))

    def said(**changes):
        subject = reference.copy()
        for where, factor in changes.values():
            subject[where] *= factor
        return shape_of(subject, reference, 1e-6)

    whole = slice(None)
    assert said(all=((whole,), 1.5)) == "the subject's is 1.5 times the reference's everywhere"
    assert (
        said(late=((whole, slice(4, None)), 2)) == "positions 0 to 3 agree, off from position 4 on"
    )
    assert said(one=((whole, whole, 7), 2)) == "only at channel 7 of 30"
    assert said(row=((1,), 2)) == "only at row 1 of 2"
    assert said(row=((0, 9, 3), 2)).endswith("only at channel 3 of 30")
    assert shape_of(rng.normal(size=(2, 10, 30)), reference, 1e-6) == ""


def test_which_tensors_differ():
    every = [
        f"layers.{n}.{m}.lora_{p}" for n in range(3) for m in ("q_proj", "up_proj") for p in "ab"
    ]
    only_a = [name for name in every if name.endswith("a")]
    assert tensors(only_a, every) == "6 of 12 tensors, only lora_a"
    assert tensors(every[4:8], every) == "4 of 12 tensors, only layer 1"
    assert tensors(every[:1], every) == "1 of 12 tensors, only lora_a, only layer 0, only q_proj"
    assert tensors(every, every) == "12 of 12 tensors"


def test_an_activation_is_named_only_where_it_fits():
    rng = np.random.default_rng(0)
    factors = {name: rng.normal(size=(2, 3, 8)) for name in ("gate", "up")}
    silu = factors["gate"] / (1 + np.exp(-factors["gate"]))
    assert formula(silu * factors["up"], factors, 1e-6)[0] == "silu of gate times up"
    assert formula(1.01 * silu * factors["up"], factors, 1e-6)[0] == ""
