"""Models that are not like the fixtures: other names, no loading, another vocabulary, packed weights."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from parity import resources
from parity.cells.cell import Cell
from parity.cells.run import run_cell
from parity.paths import quantized
from parity.recipe import Recipe
from parity.report.text import describe
from parity.stages import find
from parity.trace import Trace

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 512,
    "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SMALL = np.array([[1, 2, 3]], np.int32)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Makes a folder with a random model of an architecture and the tiny Llama's tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    def make(kind, changes=None, **config):
        folder = tmp_path_factory.mktemp(kind)
        torch.manual_seed(0)
        made = AutoConfig.for_model(kind, **{**SIZES, **config})
        AutoModelForCausalLM.from_config(made).save_pretrained(folder)
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | (changes or {})))
        for file in (resources.fixtures() / "models" / "tiny-llama").glob("*token*"):
            shutil.copy(file, folder)
        return str(folder)

    return make


@pytest.fixture
def run(engine):
    def cell(probe, source, subject="mlx", reference="hf", **changes):
        changes = {name.replace("__", "."): value for name, value in changes.items()}
        recipe = Recipe().override({"model.source": source, "train.steps": 2, **changes})
        return run_cell(engine, Cell(find(probe), subject, reference, recipe))

    return cell


@pytest.fixture(scope="module")
def joined(model):
    """A Phi 3, whose projections are joined: most of the default recipe's targets do not exist."""
    return model("phi3")


def test_a_cache_is_asked_of_the_base_where_no_target_exists(joined, run):
    record = run("10", joined)
    assert record.verdict.green, describe(record)
    assert any(
        note.startswith("without an adapter: the model has no modules") for note in record.findings
    )


@pytest.mark.long
def test_settings_are_compared_where_no_target_exists(joined, run):
    record = run("00", joined)
    assert record.verdict == "inconclusive", describe(record)
    verdicts = {metric.name: metric for metric in record.metrics}
    assert "it has down_proj, embed_tokens, gate_up_proj" in verdicts["lora.rank"].note
    for name in ("rope.frequencies", "optim.class", "clip.mode", "mask.supervised"):
        assert verdicts[name].verdict == "identical", verdicts[name]


def test_a_model_that_does_not_load_has_a_tokenizer_and_a_reason(model, run):
    source = model("llama", {"rope_scaling": {"factor": 8.0, "rope_type": "unheard_of"}})
    tokens = run("01", source, "mlx-lm", "mlx")
    assert tokens.verdict.green, describe(tokens)
    record = run("02", source, "mlx", "mlx-lm")
    assert record.verdict == "error"
    assert "mlx-lm does not load the model" in record.reason
    assert "rope_scaling" in record.reason, record.reason


def test_tokens_that_the_model_has_not_are_a_skip(model, run):
    source = model("llama", vocab_size=100)
    for probe in ("02", "05", "07"):
        record = run(probe, source)
        assert record.verdict == "skip", describe(record)
        assert "the model has 100 tokens" in record.reason


def test_what_peft_refuses_is_a_skip(model, run):
    record = run("05", model("llama"), lora__target_modules=["self_attn"])
    assert record.verdict == "skip", describe(record)
    assert "PEFT: " in record.reason or "mlx-lm: " in record.reason


def test_the_dtype_of_a_quantized_checkpoint_is_that_of_its_scales(engine):
    recipe = Recipe().override({"model.source": "tiny-llama", "model.quantization": "affine"})
    engine.source("mlx-lm")("logits", recipe, Trace({"ids.0": SMALL}, {"modules": False}))
    packed = str(quantized.folder(recipe, engine.cache))
    shipped = engine.source("unsloth")(
        "defaults", Recipe().override({"model.source": packed}), Trace()
    )
    assert shipped.scalars["model.dtype"] in ("bfloat16", "float16", "float32")
