"""Rotary embeddings are compared as the models use them, on tiny random models made here."""

from __future__ import annotations

import json
import shutil

import pytest

from parity import resources
from parity.cells.cell import Cell
from parity.cells.run import run_cell
from parity.record import Verdict
from parity.report.text import describe
from parity.stages import find
from tests.cost import long

PROBE = find("00")
TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 5,
}
LLAMA = {**TINY, "model_type": "llama", "head_dim": 16, "tie_word_embeddings": True}
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 500_000.0},
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10_000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
    },
}
HYBRID = {
    **TINY,
    "model_type": "lfm2",
    "num_hidden_layers": 3,
    "layer_types": ["conv", "full_attention", "conv"],
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    "block_ff_dim": 128,
    "block_auto_adjust_ff_dim": False,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Makes a model from settings; `readable` adds keys to its configuration, which mlx-lm reads."""

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    def make(name, settings, readable):
        folder = tmp_path_factory.mktemp(name) / name
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
        model.save_pretrained(folder)
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | readable))
        for part in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(f"{resources.model_dir('tiny-llama')}/{part}", folder / part)
        return str(folder)

    return make


def llama(made, name, rope, **readable):
    top = {"rope_theta": rope["rope_theta"]}
    if rope["rope_type"] != "default":
        top["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
    return made(name, {**LLAMA, "rope_parameters": rope}, top | readable)


@pytest.mark.parametrize("kind", [long("default"), long("linear"), long("llama3"), "yarn"])
def test_equal_models_have_equal_frequencies(kind, made, engine, small):
    recipe = small.override({"model.source": llama(made, kind, ROPES[kind])})
    record = run_cell(engine, Cell(PROBE, "mlx", "hf", recipe))
    assert record.verdict is Verdict.IDENTICAL, describe(record)


FAULTS = [
    long("default", {"rope_theta": 10_000.0}, "rope.frequencies", "rope_theta 10000"),
    long("linear", {"rope_scaling": None}, "rope.frequencies", "(4 times)"),
    long("llama3", {"rope_scaling": None}, "rope.frequencies", "rope_theta 500000"),
    long(
        "yarn", {"rope_scaling": None}, "rope.attention_scaling", "[1, 1] in the subject, [1.13863"
    ),
]


@pytest.mark.parametrize(("kind", "readable", "setting", "words"), FAULTS)
def test_other_frequencies_are_named_with_the_configuration(
    kind, readable, setting, words, made, engine, small
):
    model = llama(made, f"other-{kind}", ROPES[kind], **readable)
    record = run_cell(engine, Cell(PROBE, "mlx", "hf", small.override({"model.source": model})))
    found = {m.name: m.note for m in record.metrics if m.verdict is Verdict.DIVERGE}
    assert words in found[setting], describe(record)
    assert "radians a position in the subject" in found["rope.frequencies"]
    assert "the reference's configuration: rope_parameters" in found["rope.frequencies"]
    assert record.reason == found["rope.frequencies"]


@pytest.mark.long
def test_layers_without_a_rotary_embedding_have_none(made, engine, small):
    model = made("hybrid", HYBRID, {"rope_theta": 1_000_000.0, "block_dim": 64})
    changes = {"model.source": model, "lora.target_modules": ["q_proj", "v_proj"]}
    recipe = small.override(changes)
    record = run_cell(engine, Cell(PROBE, "mlx", "hf", recipe))
    assert record.verdict is Verdict.IDENTICAL, describe(record)
    scalars = engine.capture("mlx", "config", recipe, _nothing()).scalars
    assert scalars["rope.width"] == [0, 16, 0]
    assert scalars["rope.kind"] == ["none", "fixed", "none"]


def _nothing():
    from parity.trace import Trace

    return Trace()


@pytest.mark.long
def test_a_rope_of_one_layer_is_named(engine, small):
    record = run_cell(engine, Cell(PROBE, "tests.planted_paths:BadRope", "hf", small))
    assert record.verdict is Verdict.DIVERGE
    assert "differ in 1 of 18 layers; in layer 5 number 8 of 8" in record.reason, describe(record)
