"""`parity adapter check` on adapters that real savers wrote, whole and with one fault each."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from parity import resources
from parity.adapters import check as adapters
from parity.adapters.tensors import tensors_of
from parity.capture.worker import environment
from tests.adapter_checks import check, findings, loaded, needs
from tests.adapter_writers import MODEL, STACKS, written

WRITERS = [name for names in STACKS.values() for name in names]
MODELS = ("fused", "merged")


@pytest.fixture(scope="module")
def saved():
    return written()


# What is in order -----------------------------------------------------------------------------


@pytest.mark.parametrize("writer", WRITERS)
def test_what_a_real_saver_wrote_is_clean_with_a_real_loader(writer, saved, engine):
    needs(writer)
    result = loaded(engine, saved / writer)
    assert findings(result) == []
    # Weights beside A and B are not read back from the live model, which is no evidence for them.
    unchecked = {o["check"]: o["unchecked"] for o in result["checks"] if o["unchecked"]}
    beside = {"mlx-lm-full": 52, "peft-head": 1, "peft-embedding": 1}.get(writer)
    expected = {"loading": f"beside A and B not read back: {beside}"} if beside else {}
    # transformers 5 saves RoPE settings under another key than the base has them.
    if writer == "merged":
        expected["settings"] = (
            "config.json lacks rope_local_base_freq = 20000.0, rope_theta = 200000.0 of the base: a loader "
            "that reads it there takes a default"
        )
    assert unchecked == expected
    moved = next(o for o in result["checks"] if o["check"] == "logits")
    assert re.match(r"logits move by up to \d", moved["note"])


@pytest.mark.parametrize(
    ("writer", "words"),
    [
        ("mlx-lm", {"written by": "mlx-lm's command line", "kind": "LoRA", "scale": "20, from lora_parameters.scale in adapter_config.json, mlx-lm's default", "layers": "14 to 17"}),
        ("mlx-lm-dora", {"kind": "DoRA"}),
        ("mlx-lm-full", {"kind": "full fine-tuning"}),
        ("unsloth", {"written by": "unsloth-zoo", "scale": "2, from lora_parameters.scale"}),
        ("peft", {"written by": "PEFT ", "scale": "2, from lora_alpha / r, 16 / 8", "rank": "8"}),
        ("peft-rslora", {"scale": "5.65685, from lora_alpha / sqrt(r), 16 / sqrt(8): use_rslora is true"}),
        ("peft-patterns", {"rank": "8, 4", "scale": "0.25, from alpha_pattern / r, 2 / 8"}),
        ("peft-head", {"other tensors": "1: base_model.model.lm_head.weight"}),
        ("trl", {"written by": "TRL through PEFT"}),
        ("fused", {"changed": "28 tensors"}),
    ],
)  # fmt: skip
def test_it_says_what_an_artefact_is(writer, words, saved):
    needs(writer)
    _, result = check(saved / writer)
    for name, text in words.items():
        assert text in result["described"][name]


@pytest.mark.parametrize("writer", ["mlx-lm", "peft", "fused"])
def test_without_a_base_it_lists_what_was_not_checked(writer, saved):
    code, result = check(saved / writer, base=None)
    assert (code, result["verdict"]) == (0, "incomplete")
    assert "not checked" in result["sentence"]
    unchecked = {o["check"]: o["unchecked"] for o in result["checks"] if o["unchecked"]}
    assert {"keys", "shapes", "logits"} <= unchecked.keys()
    assert all("--base" in reason for reason in unchecked.values())


def test_files_alone_are_not_all_that_was_asked(saved):
    _, result = check(saved / "peft")
    assert result["verdict"] == "incomplete"
    assert result["sentence"].endswith("not checked, or not in full: loading, logits")


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [("peft", "peft"), ("fused", "mlx-lm"), ("merged", "peft"), ("unsloth", "unsloth-as-peft"), ("peft", "merged")],
)  # fmt: skip
def test_artefacts_of_one_adapter_do_the_same(ours, theirs, saved):
    needs(ours)
    code, result = check(saved / ours, "--against", saved / theirs)
    assert (code, findings(result)) == (0, [])


def test_the_defaults_of_peft_are_those_that_stand_in_for_what_is_missing():
    from parity.adapters.peft_files import DEFAULT_ALPHA, DEFAULT_RANK

    peft = pytest.importorskip("peft").LoraConfig()
    assert (peft.r, peft.lora_alpha) == (DEFAULT_RANK, DEFAULT_ALPHA)


def test_headers_are_read_as_safetensors_reads_them(saved):
    from safetensors import safe_open

    for file in [*saved.glob("*/*.safetensors")]:
        ours = tensors_of(file)
        with safe_open(file, framework="numpy") as theirs:
            assert ours.keys() == set(theirs.keys())
            for name, tensor in ours.items():
                assert np.array_equal(tensor.read(), theirs.get_tensor(name), equal_nan=True)


# Other bases ----------------------------------------------------------------------------------


def by_mlx_lm(*words):
    words = [sys.executable, "-m", "mlx_lm", *map(str, words)]
    subprocess.run(
        words, check=True, capture_output=True, env=environment("mlx", resources.cache())
    )


@pytest.mark.long
def test_an_adapter_for_a_quantized_base(saved, tmp_path, engine):
    base = tmp_path / "quantized"
    words = ["--hf-path", resources.model_dir(MODEL), "--mlx-path", base, "-q", "--q-bits", "4"]
    by_mlx_lm("convert", *words)
    result = adapters.check(
        saved / "mlx-lm", str(base), None, None, lambda: contextlib.nullcontext(engine)
    )
    assert result.findings == []
    assert [outcome.check for outcome in result.unchecked] == ["trained_on"]  # another folder
    fused = tmp_path / "fused"
    by_mlx_lm("fuse", "--model", base, "--adapter-path", saved / "mlx-lm", "--save-path", fused)
    code, result = check(fused, base=str(base))
    assert (code, findings(result)) == (0, [])
    code, result = check(fused, "--against", saved / "mlx-lm", base=str(base))
    unchecked = {outcome["check"]: outcome["unchecked"] for outcome in result["checks"]}
    assert (code, unchecked["against"].partition(":")[0]) == (3, "the weights are quantized")
    shutil.copy(base / "model.safetensors", fused)
    code, result = check(fused, base=str(base))
    assert "the fuse changed nothing" in findings(result)[0]["text"]
    # Quantized or not, weights cannot be compared: that is said.
    _, result = check(fused)
    assert result["verdict"] == "incomplete" and "one of model and base is quantized" in json.dumps(
        result
    )


@pytest.mark.long
def test_an_adapter_for_a_mixture_of_experts(experts, tmp_path, engine):
    folder, base = tmp_path / "adapter", str(experts)
    words = ["--train", "--data", resources.data_dir("hello"), "--iters", "2", "--batch-size", "2"]
    words += ["--learning-rate", "1e-2", "--val-batches", "0", "--num-layers", "2"]
    by_mlx_lm("lora", "--model", base, *words, "--adapter-path", folder)
    file = folder / "adapter_config.json"
    settings = json.loads(file.read_text())
    assert any("switch_mlp" in tensor for tensor in tensors_of(folder / "adapters.safetensors"))
    code, result = check(folder, base=base)
    assert (code, findings(result)) == (0, []), settings
    result = adapters.check(folder, base, None, None, lambda: contextlib.nullcontext(engine))
    assert result.verdict == "clean", result


# The command -------------------------------------------------------------------------------------


def test_the_command_starts_a_real_loader(saved):
    code, result = check(saved / "mlx-lm", files_only=False)
    assert (code, result["verdict"]) == (0, "clean")
    assert result["sentence"] == "nothing is wrong by any of the checks"
