"""Faults that only one family of models can have are found at the right stage and module."""

from __future__ import annotations

import pytest

from parity.bisect.locate import locate
from parity.bisect.locate_backward import backward
from parity.bisect.locate_forward import forward
from parity.cells.cell import Cell
from parity.cells.run import context_of, run_cell
from parity.recipe import Recipe
from parity.report.text import describe
from parity.stages import find
from tests.cost import long

EXPERTS = {"model.source": "tiny-qwen2-moe", "lora.target_modules": ["q_proj", "down_proj"]}
PACKED = {"model.source": "tiny-llama", "model.quantization": "affine"}
HYBRID = {"model.source": "tiny-qwen3-5", "lora.target_modules": ["q_proj", "out_proj"]}
DORA = {"lora.kind": "dora", "lora.num_layers": 2}
SWITCH = r"layers.0.mlp.switch_mlp.down_proj.lora_"


@pytest.fixture
def cell(engine):
    def make(fault, probe, changes, reference):
        recipe = Recipe().override({"train.steps": 2, **changes})
        made = Cell(find(probe), f"tests.family_faults:{fault}", reference, recipe)
        return made, run_cell(engine, made)

    return make


FAULTS = [
    # path, family, stages that stay green, the first that does not, what its reason names
    ("FrozenExperts", EXPERTS, ["02"], "04", SWITCH),
    long("UntrainedExpert", EXPERTS, ["04"], "05", "layers.5.mlp.switch_mlp.down_proj.lora_"),
    ("RandomMagnitude", DORA, ["02"], "04", "layers.17.self_attn.o_proj.m"),
    long("WrongGroups", PACKED, [], "02", ""),
    long("HalfRouter", EXPERTS, [], "02", ""),
    long("TransposedProduct", PACKED, ["02", "04"], "05", ""),
    long("DeltaWithoutDecay", HYBRID, [], "02", ""),
]


REFERENCES = pytest.mark.parametrize(
    "reference", ["mlx-lm", pytest.param("hf", marks=pytest.mark.long)]
)


@REFERENCES
@pytest.mark.parametrize(("fault", "family", "green", "stage", "named"), FAULTS)
def test_a_fault_of_a_family_shows_first_at_its_stage(
    fault, family, green, stage, named, reference, cell
):
    for before in green:
        _, record = cell(fault, before, family, reference)
        assert record.verdict.green, describe(record)
    _, record = cell(fault, stage, family, reference)
    assert record.verdict == "diverge", describe(record)
    off = [metric.where for metric in record.metrics if metric.verdict == "diverge"]
    assert any(named in where for where in [record.reason, *off]), describe(record)


@REFERENCES
@pytest.mark.parametrize(
    ("fault", "family", "module"),
    [
        ("HalfRouter", EXPERTS, "layers.5.mlp"),
        long("WrongGroups", PACKED, "embed_tokens"),
        long("DeltaWithoutDecay", HYBRID, "layers.5.linear_attn"),
    ],
)
def test_the_module_that_computes_otherwise_is_named(
    fault, family, module, reference, engine, cell
):
    made, _ = cell(fault, "02", family, reference)
    place = forward(context_of(engine, made))
    # Where each packed module is wrong another one may make more of the error, which is named as well.
    first = f"first bad module {module}" in place.sentence
    assert first or place.name.startswith(module), place


@pytest.mark.long
@REFERENCES
def test_the_module_that_passes_a_wrong_gradient_on_is_named(reference, engine, cell):
    made, record = cell("TransposedProduct", "05", PACKED, reference)
    place = backward(context_of(engine, made), record)
    assert place.name.startswith("layers.9.self_attn.o_proj"), place
    assert "layers.9.self_attn.o_proj" in place.sentence


@REFERENCES
def test_dora_that_is_asked_for_and_left_out_is_told(reference, cell):
    """A trainer that drops `use_dora` trains LoRA, whose loss is as healthy."""
    _, record = cell("IgnoredDora", "00", DORA, reference)
    assert record.verdict == "diverge", describe(record)
    assert "subject: the recipe has lora.kind=dora, lora is in effect" in record.findings
    _, record = cell("IgnoredDora", "04", DORA, reference)
    assert record.verdict == "diverge", describe(record)
    assert any(metric.note.endswith(".m in the reference only") for metric in record.metrics)


@pytest.mark.long
@pytest.mark.parametrize(
    ("fault", "reference", "named"),
    [
        ("FloatEmbedding", "hf", "packed in the reference alone: embed_tokens"),
        pytest.param(
            "WideProjection", "mlx-lm",
            "packed otherwise: layers.5.mlp.down_proj (affine, 8 bits, groups of 64 in the subject, "
            "affine, 4 bits, groups of 64 in the reference)",
            marks=pytest.mark.long,
        ),
    ],
)  # fmt: skip
def test_a_module_that_is_packed_otherwise_is_named_and_proven(
    fault, reference, named, engine, cell
):
    """Packed as in the subject, the reference gives the subject's logits."""
    _, settings = cell(fault, "00", PACKED, reference)
    assert settings.verdict == "diverge", describe(settings)
    assert named in settings.reason, describe(settings)
    made, record = cell(fault, "02", PACKED, reference)
    place = locate(engine, made, record)
    assert named in place.sentence
    assert "confirmed: with its modules packed as the subject's are, the reference agrees" in (
        place.sentence
    )
    assert place.name in named


@pytest.mark.long
def test_another_fault_beside_another_packing_is_not_laid_on_it(engine, cell):
    made, record = cell("HalfNormAndFloatEmbedding", "02", PACKED, "mlx-lm")
    place = locate(engine, made, record)
    assert "packed in the reference alone: embed_tokens" in place.sentence
    assert "not the only cause" in place.sentence


@pytest.mark.parametrize("fault", ["SilentFloatEmbedding", "UnmatchedFloatEmbedding"])
def test_a_path_that_tells_no_settings_has_a_place_all_the_same(fault, engine, cell):
    made, record = cell(fault, "02", PACKED, "mlx-lm")
    place = locate(engine, made, record)
    assert place.name == "embed_tokens", place
