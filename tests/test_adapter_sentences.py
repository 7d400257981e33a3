"""Sentences of `parity adapter check` that need another base, other words or two faults at once."""

from __future__ import annotations

import contextlib
import json
import shutil

import numpy as np
import pytest

from parity import resources
from parity.adapters import check as adapters
from parity.adapters.loading import _moved
from tests.adapter_checks import assert_found, check, findings, loaded, needs
from tests.adapter_faults import (
    Q16,
    added,
    both,
    copied,
    dropped,
    each,
    lora,
    settings,
    tensors,
    the_base,
    top,
    without,
)
from tests.adapter_writers import written

UP17 = "model.layers.17.mlp.up_proj"


@pytest.fixture(scope="module")
def saved():
    return written()


def nested(**values):
    """Keys that `lora_parameters` has as well, at the top of the file."""
    return settings(lambda found: found.update(values))


def emptied(pattern):
    return each(lambda _, v: v[..., :0], pattern)


FAULTS = {
    "two ranks": ("unsloth", nested(rank=4), "rank", "rank: 8 in lora_parameters.rank, 4 in rank"),
    "dropout over one": ("mlx-lm", lora(dropout=1.5), "settings", "lora_parameters.dropout: 1.5 is no probability under 1"),
    "no keys at all": ("mlx-lm", lora(keys=[]), "modules", "lora_parameters.keys: is an empty list: nothing is adapted"),
    "a bias of another kind": ("peft", top(bias="some"), "bias", "bias: 'some' is not none, all or lora_only: PEFT does not load it"),
    "alpha of a pattern": ("peft-patterns", top(alpha_pattern={"v_proj": 0}), "scale", "alpha_pattern.v_proj: 0 is no positive number"),
    "targets lost": ("peft", without("target_modules"), "modules", "target_modules: missing: PEFT chooses modules by the type of the model"),
    "a bias of B too many": ("peft", added("base_model.model.model.layers.17.mlp.up_proj.lora_B.bias", (128,)), "bias", "1 modules have a bias of B, lora_bias is not true"),
    "a magnitude of another width": ("mlx-lm-dora", each(lambda _, v: v[:-1], rf"{Q16}\.m$"), "shapes", "the magnitude has shape (63,), it should be (64,)"),
    "DoRA without A·B": ("mlx-lm-dora", each(lambda _, v: v * 0, "lora_b"), "effect", "A·B is zero in all 28 modules (layers.14.mlp.down_proj"),
    "no values": ("mlx-lm", emptied(f"{Q16}.lora_b"), "values", f"model.{Q16}.lora_b: has shape (8, 0): no values"),
    "a weight that the base has not": ("mlx-lm-full", added(f"{UP17}.extra", (2, 2)), "keys", f"{UP17}.extra: the base has no such tensor: 1 of 53"),
    "a weight of another shape": ("mlx-lm-full", each(lambda _, v: v[:-1], f"{UP17}.weight"), "shapes", f"{UP17}.weight: has shape (127, 64), the base's has (128, 64)"),
    "no tensor at all": ("mlx-lm", tensors(lambda _: {}), "kind", "fine_tune_type: LoRA, but the file has no tensors of LoRA: no tensor at all"),
    "a fused model in half precision": ("fused", each(lambda _, v: v.astype(np.float16)), "dtype", "float16, the base's is float32; 236 of 236 differ"),
    "a fuse that only rounded": ("fused", both(the_base, each(lambda _, v: v.astype(np.float16))), "effect", "all 236 tensors are those of the base, rounded: the fuse changed nothing"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_and_named(fault, saved, tmp_path):
    writer, damage, name, words = FAULTS[fault]
    needs(writer)
    folder = copied(saved, writer, tmp_path)
    damage(folder)
    assert_found(folder, name, words)


def test_settings_of_a_fused_model_are_those_of_the_base(saved, tmp_path):
    """transformers 5 writes RoPE's settings where mlx-lm does not read them (mlx-lm#953)."""
    _, result = check(saved / "merged")
    left = {o["check"]: o["unchecked"] for o in result["checks"] if o["unchecked"]}
    assert (
        "config.json lacks rope_local_base_freq = 20000.0, rope_theta = 200000.0"
        in left["settings"]
    )
    folder = copied(saved, "fused", tmp_path)
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "rope_theta": 10000.0}))
    _, result = check(folder)
    [found] = [f for f in findings(result) if f["check"] == "settings"]
    assert (found["where"], found["text"]) == ("rope_theta", "10000.0, the base has 200000.0")


def test_fewer_layers_than_tensors_are_told_without_a_base(saved, tmp_path):
    folder = copied(saved, "mlx-lm", tmp_path)
    top(num_layers=2)(folder)
    _, result = check(folder, base=None)
    [found] = [f for f in findings(result) if f["check"] == "layers"]
    assert found["text"] == "2, but there are tensors for layers 14 to 17"


def test_a_base_of_another_kind_is_named(saved, tmp_path):
    folder = copied(saved, "mlx-lm", tmp_path)
    top(model=resources.model_dir("tiny-llama"))(folder)
    _, result = check(folder)
    [found] = [f for f in findings(result) if f["check"] == "trained_on"]
    assert found["text"].endswith("tiny-llama, a llama, but --base is a gemma3_text")


def test_biases_of_the_base_that_were_trained_and_not_saved(saved, tmp_path):
    base = shutil.copytree(resources.model_dir("tiny-gemma3"), tmp_path / "base")
    added(f"{UP17}.bias", (128,))(base)
    folder = copied(saved, "peft", tmp_path)
    top(bias="all")(folder)
    _, result = check(folder, base=str(base))
    [found] = [f for f in findings(result) if f["check"] == "bias"]
    assert found["text"].startswith("all, but no bias is in the file; 1 of ")
    _, result = check(folder, base=None)
    left = {o["check"]: o["unchecked"] for o in result["checks"]}
    assert left["bias"].endswith("whether the model has any needs --base")


def without_pairs(found):
    return {k: v for k, v in found.items() if k.endswith("lora_a")}


AGAINST = {
    "another kind": ("mlx-lm-dora", both(top(fine_tune_type="lora"), dropped(r"\.m$")), "kind: LoRA, the other is DoRA"),
    "tensors on one side": ("mlx-lm-dora", dropped(rf"{Q16}\.m$"), f"{Q16} (magnitude): is in the other alone, and 0 more tensors"),
    "other layers": ("mlx-lm", dropped(r"layers\.14\."), "adapted: layers 15 to 17; in the other: layers 14 to 17"),
    "no pair": ("mlx-lm", tensors(without_pairs), "no module has A and B in both"),
}  # fmt: skip


@pytest.mark.parametrize("fault", AGAINST)
def test_what_differs_from_another_artefact_is_named(fault, saved, tmp_path):
    writer, damage, words = AGAINST[fault]
    folder = copied(saved, writer, tmp_path)
    damage(folder)
    _, result = check(folder, "--against", saved / writer)
    lines = [f"{f['where']}: {f['text']}" for f in findings(result) if f["check"] == "against"]
    assert any(words in line for line in lines), lines


def test_an_update_of_another_shape_than_the_weight(saved, tmp_path):
    adapter = copied(saved, "mlx-lm", tmp_path)
    each(lambda _, v: v[:, :-1], f"{UP17}.lora_b")(adapter)
    _, result = check(saved / "fused", "--against", adapter)
    lines = [f"{f['where']}: {f['text']}" for f in findings(result)]
    words = "layers.17.mlp.up_proj: the weight has shape (128, 64), the adapter's update (127, 64)"
    assert any(words in line for line in lines), lines


@pytest.mark.parametrize(
    ("ours", "theirs", "base", "words"),
    [
        ("fused", "mlx-lm", None, "a model and an adapter can only be compared with --base"),
        ("fused", "mlx-lm-dora", "tiny-gemma3", "a DoRA adapter is not compared with a model"),
    ],
)
def test_what_cannot_be_compared_is_said(ours, theirs, base, words, saved):
    _, result = check(saved / ours, "--against", saved / theirs, base=base)
    left = {o["check"]: o["unchecked"] for o in result["checks"]}
    assert left["against"] == words


# With a real loader -----------------------------------------------------------------------------


def test_a_loader_that_leaves_magnitudes_out_is_named(saved, engine):
    loader = "tests.round_trip_paths:MagnitudesLost"
    found = findings(loaded(engine, saved / "mlx-lm-dora", loader))
    words = f"the loader of {loader} has not the magnitudes of the files: all 28 modules"
    assert any(words in f["text"] for f in found if f["check"] == "loading"), found


def test_a_loader_with_another_scale_is_named(saved, engine):
    loader = "tests.round_trip_paths:DefaultScale"
    found = findings(loaded(engine, saved / "unsloth", loader))
    words = f"the loader of {loader} gives another scale · A · B than the files hold"
    assert any(words in f["text"] for f in found if f["check"] == "loading"), found


def test_a_model_that_gives_nan_is_named(saved, tmp_path, engine):
    folder = copied(saved, "fused", tmp_path)
    each(lambda _, v: v * np.float32(1e38), "up_proj")(folder)
    result = adapters.check(
        folder, "tiny-gemma3", None, None, lambda: contextlib.nullcontext(engine)
    )
    [text] = [f.text for f in result.findings if f.check == "logits"]
    assert text.endswith("logits are NaN or infinite")


def test_logits_of_another_vocabulary_are_named():
    """A fused model whose head was resized."""
    outcome = _moved("mlx", "fused", np.zeros((1, 2, 512)), np.zeros((1, 2, 513)))
    [found] = outcome.findings
    assert found.text == "the logits have shape (1, 2, 513), those of the base (1, 2, 512)"
