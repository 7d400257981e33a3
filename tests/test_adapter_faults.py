"""Each fault that is put into a saved adapter is found by `parity adapter check` and named."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file

from parity import resources
from parity.cli import main
from tests.adapter_checks import assert_found, check, findings, loaded, needs
from tests.adapter_faults import (
    Q16,
    added,
    as_peft_without_prefix,
    both,
    copied,
    dropped,
    each,
    lora,
    moved,
    renamed,
    spoiled,
    tensors,
    the_base,
    top,
    without,
)
from tests.adapter_writers import MODEL, written


@pytest.fixture(scope="module")
def saved():
    return written()


FAULTS = {
    # The scale (mlx-examples#622)
    "scale lost": ("mlx-lm", without("scale"), "scale", "lora_parameters.scale: missing: mlx-lm's loader stops"),
    "alpha in its place": ("mlx-lm", both(lora(alpha=16), without("scale")), "scale", "alpha is 16, which mlx-lm does not read (alpha / rank would be 2)"),
    "alpha is the scale": ("mlx-lm", lora(alpha=16, scale=16.0), "scale", "16, but alpha / rank is 16 / 8 = 2, it is alpha itself"),
    "scale zero": ("mlx-lm", lora(scale=0.0), "scale", "0 is no positive number"),
    "scale not a number": ("mlx-lm", lora(scale=float("nan")), "scale", "nan is no positive number"),
    "alpha lost": ("peft", without("lora_alpha"), "scale", "lora_alpha: missing: the scale is lost"),
    "alpha zero": ("peft", top(lora_alpha=0), "scale", "lora_alpha: 0 is no positive number"),
    "two scales": ("unsloth", top(scale=1.0), "scale", "2 in lora_parameters.scale, 1 in scale"),
    # The rank (unsloth-zoo#679, #692)
    "rank of mlx-lm": ("mlx-lm", lora(rank=16), "rank", "lora_parameters.rank: all 28 modules"),
    "rank of PEFT": ("peft", top(r=16), "rank", "16, but the tensors have 8"),
    "rank in a pattern": ("peft-patterns", top(rank_pattern={"q_proj": 2}), "rank", "rank_pattern.q_proj: 4 of 28 modules"),
    "rank lost": ("mlx-lm", without("rank"), "rank", "lora_parameters.rank: missing"),
    "default rank": ("peft-patterns", both(without("r"), top(rank_pattern={})), "rank", "r: missing: PEFT takes its default, 8"),
    # Layers (unsloth-zoo#669)
    "fewer layers counted": ("mlx-lm", top(num_layers=2), "layers", "2 counts from the last layer and means layers 16 to 17 of 18, but there are tensors for layers 14 to 17"),
    "first layers": ("mlx-lm", moved(-14), "layers", "there are tensors for layers 0 to 3: they were counted from the wrong end"),
    "more than there are": ("mlx-lm", top(num_layers=40), "layers", "40, but the base has 18 layers"),
    "layers lost": ("mlx-lm", without("num_layers"), "layers", "num_layers: missing"),
    "first layers of PEFT": ("peft", top(layers_to_transform=[0, 1, 2, 3]), "layers", "layers 0 to 3, but there are tensors for layers 14 to 17: they were counted from the wrong end"),
    "no such layer": ("peft", top(layers_to_transform=[17, 18]), "layers", "layer 18 is named, the base has 18 layers"),
    # Modules
    "auto": ("mlx-lm", lora(keys=["auto"]), "modules", "lora_parameters.keys: auto: matches no tensor"),
    "target without tensors": ("peft", top(target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "router"]), "modules", "target_modules: router: matches no tensor"),
    "tensors without target": ("peft", top(target_modules=["q_proj"]), "modules", "names no module like 24 of 28 modules"),
    "one module not adapted": ("peft", dropped(Q16), "modules", f"{Q16}: 1 module of the base should be adapted"),
    "one of all not adapted": ("mlx-lm", dropped(Q16), "modules", f"{Q16}: 1 module of the base should be adapted"),
    "layers not transformed": ("peft", without("layers_to_transform"), "modules", "98 modules of the base should be adapted"),
    "head not saved": ("peft-head", dropped("lm_head"), "modules", "modules_to_save lm_head: no tensor of it"),
    # Names
    "names of another model": ("mlx-lm", renamed("q_proj", "query"), "keys", "the base has no such module: 4 of 28 modules"),
    "no prefix of PEFT": ("peft", as_peft_without_prefix, "keys", "PEFT takes only names that start with base_model.model."),
    "B lost": ("mlx-lm", dropped(f"{Q16}.lora_b"), "keys", f"{Q16}: has no B beside model.{Q16}.lora_a"),
    "a tensor too many": ("mlx-lm", added("model.layers.17.mlp.up_proj.lora_c", (2, 2)), "keys", "model.layers.17.mlp.up_proj.lora_c: is no tensor of an adapter"),
    # Shapes and orientation
    "orientation of PEFT in mlx-lm": ("mlx-lm", each(lambda _, v: v.T), "shapes", "stored the other way round: mlx-lm stores A as (in, r)"),
    "orientation of mlx-lm in PEFT": ("peft", each(lambda _, v: v.T), "shapes", "stored the other way round: PEFT stores A as (r, in)"),
    "A turned alone": ("mlx-lm", each(lambda _, v: v.T, "lora_a"), "shapes", "cannot be multiplied"),
    "width": ("mlx-lm", each(lambda _, v: v[:-1], f"{Q16}.lora_a"), "shapes", "are 63 → 64, the module of the base is 64 → 64"),
    "three dimensions": ("peft", each(lambda _, v: v[None], f"{Q16}.lora_A"), "shapes", "are no matrices of an adapter"),
    # Values (mlx-lm#1725)
    "integers": ("mlx-lm", each(lambda _, v: v.astype(np.int32), f"{Q16}.lora_b"), "dtype", "1 of 56 tensors are I32"),
    "two dtypes": ("mlx-lm", each(lambda _, v: v.astype(np.float16), f"{Q16}.lora_b"), "dtype", "1 tensors are float16, 55 are float32"),
    "NaN": ("mlx-lm", each(spoiled(np.nan), f"{Q16}.lora_a"), "values", f"model.{Q16}.lora_a: 1 of 512 values are NaN or infinite"),
    "infinity": ("peft", each(spoiled(np.inf)), "values", "1 of 128 values are NaN or infinite, and 7 more"),
    # No effect
    "B zero": ("mlx-lm", each(lambda _, v: v * 0, "lora_b"), "effect", "A·B is zero in all 28 modules: the adapter has no effect"),
    "one B zero": ("peft", each(lambda _, v: v * 0, f"{Q16}.lora_B"), "effect", f"A·B is zero in 1 of 28 modules ({Q16})"),
    # The fine-tune type (unsloth-zoo#954)
    "DoRA that is called LoRA": ("mlx-lm-dora", top(fine_tune_type="lora"), "kind", "LoRA, but all 28 modules"),
    "LoRA that is called DoRA": ("peft", top(use_dora=True), "kind", "DoRA, but all 28 modules"),
    "one magnitude lost": ("mlx-lm-dora", dropped(f"{Q16}.m$"), "kind", "DoRA, but 1 of 28 modules"),
    "LoRA that is called full": ("mlx-lm", top(fine_tune_type="full"), "kind", "full, but 28 modules have tensors of LoRA"),
    "full that is called LoRA": ("mlx-lm-full", top(fine_tune_type="lora"), "kind", "LoRA, but the file has no tensors of LoRA"),
    "an unknown type": ("mlx-lm", top(fine_tune_type="qlora"), "kind", "'qlora' is not lora, dora or full"),
    # Biases
    "a bias that is not declared": ("peft", added("base_model.model.model.layers.17.mlp.up_proj.bias", (128,)), "bias", "1 biases are in the file, bias is none"),
    "a bias of B that is missing": ("peft", top(lora_bias=True), "bias", "lora_bias: true, but 28 of 28 modules have no bias of B"),
    # Settings
    "dropout lost": ("mlx-lm", without("dropout"), "settings", "lora_parameters.dropout: missing"),
    # Fused models (mlx-examples#396, mlx-lm#1172, #1564)
    "a fuse that changed nothing": ("fused", the_base, "effect", "all 236 tensors are those of the base, bit for bit: the fuse changed nothing"),
    "an adapter left in a fused model": ("fused", added("model.layers.17.mlp.up_proj.lora_a", (64, 8)), "keys", "more of an adapter are in a model that should have it fused"),
    "a fused model lacks a tensor": ("fused", dropped("layers.17.mlp.up_proj"), "keys", "layers.17.mlp.up_proj.weight: stands in the base alone"),
    "a fused model with NaN": ("fused", each(spoiled(np.nan), "layers.17.mlp.up_proj"), "values", "1 of 8192 values are NaN"),
    "a fused model of other widths": ("fused", each(lambda _, v: v[1:], "layers.17.mlp.up_proj"), "shapes", "has shape (127, 64), the base's has (128, 64)"),
    "a full fine-tuning that changed nothing": ("mlx-lm-full", tensors(lambda found: {k: load_file(f"{resources.model_dir(MODEL)}/model.safetensors")[k] for k in found}), "effect", "training changed nothing"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_and_named(fault, saved, tmp_path):
    writer, damage, name, words = FAULTS[fault]
    needs(writer)
    folder = copied(saved, writer, tmp_path)
    assert findings(check(folder)[1]) == []
    damage(folder)
    assert_found(folder, name, words)


AGAINST = {
    "another scale": ("mlx-lm", lora(scale=2.0), "A and B are the same, scale 2 in the place of 20"),
    "alpha for the scale": ("unsloth", both(lora(scale=16.0), top(scale=16.0)), "scale 16 in the place of 2, times the rank, 8"),
    "rslora switched off": ("peft-rslora", top(use_rslora=False), "all 28 modules: A and B are the same, scale 2 in the place of 5.65"),
    "half precision": ("mlx-lm", each(lambda _, v: v.astype(np.float16)), "A and B are rounded to float16"),
    "the next layer": ("mlx-lm", renamed(r"layers\.(\d+)", lambda m: f"layers.{14 + (int(m[1]) - 15) % 4}"), "A and B are those of the layer +1 away"),
    "a module": ("peft", dropped(Q16), f"modules that only one of the two adapts: 1 in the other ({Q16})"),
    "magnitudes": ("mlx-lm-dora", each(lambda _, v: 2 * v, r"\.m$"), "(magnitude): differs, as 27 others of 28"),
    "the head": ("peft-head", each(lambda _, v: 2 * v, "lm_head"), "lm_head.weight: differs"),
}  # fmt: skip


@pytest.mark.parametrize("fault", AGAINST)
def test_what_differs_from_another_artefact_is_named(fault, saved, tmp_path):
    writer, damage, words = AGAINST[fault]
    needs(writer)
    folder = copied(saved, writer, tmp_path)
    damage(folder)
    code, result = check(folder, "--against", saved / writer)
    lines = [f"{f['where']}: {f['text']}" for f in findings(result) if f["check"] == "against"]
    assert code == 1
    assert any(words in line for line in lines), lines


FUSES = {
    "a module not fused": (lambda k, v, b: b[k] if Q16 in k else v, "1 of 28 modules that the adapter changes have the base's weight"),
    "twice the scale": (lambda k, v, b: b[k] + 2 * (v - b[k]), "they have 2 times that"),
    "without the scale": (lambda k, v, b: b[k] + (v - b[k]) / 20, "they have 0.05 times that"),
    "more than the adapter": (lambda k, v, b: v + 1 if "layers.3.mlp.up_proj" in k else v, "1 weights differ from the base's that the adapter does not change"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FUSES)
def test_a_fuse_is_held_against_the_adapter_kept_apart(fault, saved, tmp_path):
    change, words = FUSES[fault]
    folder, base = (
        copied(saved, "fused", tmp_path),
        load_file(f"{resources.model_dir(MODEL)}/model.safetensors"),
    )
    each(lambda k, v: change(k, v, base).astype(np.float32))(folder)
    code, result = check(folder, "--against", saved / "mlx-lm")
    assert code == 1
    assert any(words in f["text"] for f in findings(result)), findings(result)


LOADED = {
    "B too small to be seen": ("mlx-lm", each(lambda _, v: v * np.float32(1e-25), "lora_b"), "logits", "the logits are those of the base, bit for bit (loaded by mlx)"),
    "a name that mlx-lm refuses": ("mlx-lm", renamed("layers.16.self_attn.q_proj", "layers.16.self_attn.query"), "loading", "the loader of mlx does not take it"),
    "a fuse that changed nothing": ("fused", the_base, "logits", "the logits are those of the base"),
    "names that PEFT does not read": ("peft", as_peft_without_prefix, "logits", "the logits are those of the base"),
    "layers that PEFT does not read": ("peft", top(layers_to_transform=[0, 1, 2, 3]), "loading", "adapted after loading: layers 0 to 3; handed over: layers 14 to 17"),
}  # fmt: skip


@pytest.mark.parametrize("fault", LOADED)
def test_a_real_loader_shows_what_it_makes_of_the_files(fault, saved, tmp_path, engine):
    writer, damage, name, words = LOADED[fault]
    folder = copied(saved, writer, tmp_path)
    damage(folder)
    result = loaded(engine, folder)
    assert any(words in f["text"] for f in findings(result) if f["check"] == name), findings(result)


def test_a_loader_of_another_stack_is_used_on_demand(saved, engine):
    needs("unsloth")
    result = loaded(engine, saved / "unsloth", "mlx")
    assert result["verdict"] == "clean", result
    assert "(loaded by mlx)" in json.dumps(result)


def test_a_loader_that_cannot_run_is_not_green(saved):
    words = ["--loader", "tests.faulty_paths:Absent"]
    code, result = check(saved / "mlx-lm", *words, files_only=False)
    assert (code, result["verdict"]) == (3, "incomplete")


# Files -------------------------------------------------------------------------------------------


def test_junit_has_a_case_for_each_check(saved, tmp_path):
    folder, file = copied(saved, "mlx-lm", tmp_path), tmp_path / "result.xml"
    without("scale")(folder)
    code, result = check(folder, "--junit", file)
    suite = ElementTree.parse(file).getroot()[0]
    assert code == 1
    assert [case.get("name") for case in suite] == [o["check"] for o in result["checks"]]
    assert suite.get("failures") == "1"
    failure = suite.find("testcase[@name='scale']/failure")
    assert "lora_parameters.scale: missing" in failure.get("message")
    assert suite.find("testcase[@name='logits']/skipped").get("message").startswith("--files-only")


def test_the_text_says_what_the_json_says(saved, tmp_path):
    folder = copied(saved, "mlx-lm", tmp_path)
    lora(rank=16)(folder)
    done = CliRunner().invoke(main, ["adapter", "check", str(folder)])
    assert done.exit_code == 1
    for words in (
        "scale          20, from lora_parameters.scale",
        "findings",
        "1 finding",
        "needs --base",
    ):
        assert words in done.stdout
