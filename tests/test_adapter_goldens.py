"""Adapters that older releases saved are read today as these releases read them."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from parity import resources
from parity.adapters import check as adapters
from parity.adapters import loading
from parity.adapters.base import read_base
from parity.judge.compare import compare
from parity.judge.noise import EPS, Noise
from parity.recipe import Recipe
from parity.record import Verdict
from parity.trace import Trace

MODEL = "tiny-gemma3"
GOLDENS = sorted(f.parent.name for f in (resources.fixtures() / "adapters").glob("*/golden.json"))


@pytest.fixture
def golden(tmp_path):
    """A copy of one golden that names the base where it is here."""

    def copied(name):
        folder = shutil.copytree(resources.fixtures() / "adapters" / name, tmp_path / name)
        file = folder / "adapter_config.json"
        settings = json.loads(file.read_text())
        for key in ("base_model_name_or_path", "model"):
            if key in settings:
                settings[key] = resources.model_dir(MODEL)
        file.write_text(json.dumps(settings))
        return folder

    return copied


def logits(engine, folder):
    """Today's logits with the adapter, those that its release gave, and how far the base's are off.

    The base's logits are computed without the adapter: what differs in them is the machine's or the
    release's rounding, and that is what may differ with the adapter.
    """
    kept = load_file(folder / "golden.safetensors")
    path = loading.loader_of(adapters.read(folder), read_base(MODEL))
    recipe = Recipe().override({"model.source": MODEL})
    inputs = Trace({"ids.0": kept["ids"]}, {"modules": False})
    base = engine.capture(path, "logits", recipe, inputs).arrays["logits.0"]
    scalars = {"folder": str(folder), "content": loading.content(folder)}
    found = engine.capture(path, "load_adapter", recipe, Trace({"ids": kept["ids"]}, scalars))
    moved = np.abs(base.astype(np.float64) - kept["base"])
    effect = np.abs(kept["adapted"].astype(np.float64) - kept["base"]).max()
    # A base that is computed otherwise, as mlx-lm 0.28 computes Gemma 3, would hide everything.
    assert moved.max() < 1e-3 * effect, "the base itself is computed otherwise than by the release"
    sources = {
        "the base's logits": moved,
        "one ulp of the size": np.array(EPS["float32"] * np.abs(kept["adapted"]).max()),
    }
    noise = Noise(False, given={"logits": sources})
    return compare("logits", found.arrays["loaded"], kept["adapted"], noise)


def test_there_are_goldens_of_each_stack():
    stacks = {name.rpartition("-0")[0] or name.rpartition("-2")[0] for name in GOLDENS}
    assert stacks >= {"mlx-lm", "peft", "unsloth-zoo"}
    size = sum(
        f.stat().st_size for f in (resources.fixtures() / "adapters").rglob("*") if f.is_file()
    )
    assert size < 400_000


FAULTY = ("unsloth-zoo-2026.5.3",)


@pytest.mark.parametrize("name", GOLDENS)
def test_a_golden_is_read_as_its_release_read_it(name, golden, engine):
    if name.startswith("unsloth") and importlib.util.find_spec("unsloth_zoo") is None:
        pytest.skip("needs unsloth-zoo")
    folder = golden(name)
    result = adapters.check(folder, MODEL, None, None, lambda: contextlib.nullcontext(engine))
    assert result.verdict == ("findings" if name in FAULTY else "clean"), result
    metric = logits(engine, folder)
    assert metric.verdict.green, metric


def test_settings_that_a_release_wrote_wrong_are_named(golden, engine):
    """unsloth-zoo 2026.5.3 loads it itself; mlx-lm, which reads the settings, adapts other layers."""
    folder = golden("unsloth-zoo-2026.5.3")
    result = adapters.check(folder, MODEL, None, "mlx", lambda: contextlib.nullcontext(engine))
    found = {finding.check: finding.text for finding in result.findings}
    assert "18 counts from the last layer and means layers 0 to 17 of 18" in found["layers"]
    assert "4 modules of the base should be adapted and have no tensors" in found["modules"]
    assert "adapted after loading: layers 0 to 17; handed over: layer 17" in found["loading"]
    assert found["loading"].endswith("those it has beside do nothing, B is zero")


@pytest.mark.long
def test_another_release_loads_what_todays_refuses(uv, golden, engine):
    """mlx-lm dropped tensors that no module takes in silence (mlx-lm#1725)."""
    folder = golden("mlx-lm-0.29.1")
    file = folder / "adapters.safetensors"
    tensors = load_file(file)
    save_file({k.replace("q_proj", "query"): v for k, v in tensors.items()}, file)
    texts = []
    for loader in ("mlx", "mlx@0.29.1"):
        result = adapters.check(folder, MODEL, None, loader, lambda: contextlib.nullcontext(engine))
        texts += [f.text for f in result.findings if f.check == "loading"]
    assert "layers.17.self_attn.query.lora_a: not an adapter parameter" in texts[0]
    assert "1 have none after loading (layers.17.self_attn.query)" in texts[1]


@pytest.mark.parametrize("name", ["mlx-lm-0.29.1", "peft-0.18.1"])
def test_a_golden_that_is_read_otherwise_is_found(name, golden, engine):
    folder = golden(name)
    file = folder / "adapter_config.json"
    settings = json.loads(file.read_text())
    lora = settings.get("lora_parameters", settings)
    for key in ("scale", "lora_alpha"):
        if key in lora:
            lora[key] *= 1.001
    file.write_text(json.dumps(settings))
    assert logits(engine, folder).verdict is Verdict.DIVERGE
