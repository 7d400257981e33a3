"""Fused models against the adapter that is kept apart: by mlx-lm's fuse and by PEFT's merge."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from parity import resources
from parity.adapters.loading import content
from parity.capture.worker import environment
from parity.cells.cell import Cell
from parity.cells.run import run_cell
from parity.recipe import Recipe
from parity.record import Verdict
from parity.report.text import describe
from parity.stages import find
from parity.trace import Trace
from tests.adapter_writers import MODEL, written
from tests.cost import long

STAGE = find("fuse")


def run(engine, recipe, subject, reference="mlx-lm"):
    name = f"tests.fuse_paths:{subject}" if subject[0].isupper() else subject
    return run_cell(engine, Cell(STAGE, name, reference, recipe))


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """A recipe of four layers on a base of 4 bits."""
    folder = tmp_path_factory.mktemp("models") / "tiny-4bit"
    words = ["--hf-path", resources.model_dir(MODEL), "--mlx-path", str(folder), "-q"]
    subprocess.run(
        [sys.executable, "-m", "mlx_lm", "convert", *words, "--q-bits", "4"],
        check=True, capture_output=True, env=environment("mlx", resources.cache()),
    )  # fmt: skip
    return Recipe().override({"model.source": str(folder), "lora.num_layers": 4})


@pytest.mark.parametrize(
    ("subject", "reference"),
    [
        ("mlx", "mlx-lm"),
        long("hf", "mlx-lm"),
        long("trl", "hf"),
        long("unsloth", "mlx-lm"),
        long("mlx+fuse=unsloth", "mlx-lm"),
        long("mlx-lm+fuse=mlx", "mlx"),
    ],
)
def test_a_clean_fuse_is_green(subject, reference, engine, small):
    needs(subject)
    record = run(engine, small, subject, reference)
    assert record.verdict is Verdict.AGREE, describe(record)
    metrics = {metric.name: metric for metric in record.metrics}
    for side in ("subject", "reference"):
        metric = metrics[f"logits after fusing, {side}"]
        assert 0 < metric.value <= metric.tolerance
        assert metric.why_floor == "fused weights are rounded once more"
        assert metrics[f"the adapter is in the weights, {side}"].verdict is Verdict.IDENTICAL


def needs(path):
    if "unsloth" in path and importlib.util.find_spec("unsloth_zoo") is None:
        pytest.skip("needs unsloth-zoo")


def as_two_frameworks_read(engine, folder):
    recipe = Recipe().override({"model.source": str(folder)})
    return run_cell(engine, Cell(find("logits"), "mlx", "hf", recipe))


def test_a_fused_model_of_mlx_lm_is_the_same_model_to_transformers(engine):
    record = as_two_frameworks_read(engine, written() / "fused")
    assert record.verdict is Verdict.AGREE, describe(record)


@pytest.mark.long
def test_a_model_that_peft_merged_needs_its_rope_settings_where_mlx_lm_reads_them(engine, tmp_path):
    """transformers 5 writes `rope_parameters` alone (mlx-lm#953)."""
    folder = shutil.copytree(written() / "merged", tmp_path / "merged")
    assert as_two_frameworks_read(engine, folder).verdict is Verdict.DIVERGE
    file, base = folder / "config.json", Path(resources.model_dir(MODEL)) / "config.json"
    theirs = json.loads(base.read_text())
    added = {key: theirs[key] for key in ("rope_theta", "rope_local_base_freq")}
    file.write_text(json.dumps({**json.loads(file.read_text()), **added}))
    record = as_two_frameworks_read(engine, folder)
    assert record.verdict is Verdict.AGREE, describe(record)


def test_a_fuse_that_changes_nothing_is_found(engine, small):
    record = run(engine, small, "NothingFused")
    assert record.verdict is Verdict.DIVERGE, describe(record)
    assert record.first_divergence["metric"] == "the adapter is in the weights, subject"
    assert "0 off from the base: the adapter is lost or another one" in record.reason


def test_a_fuse_with_another_scale_is_found(engine, small):
    record = run(engine, small, "AnotherScale")
    assert record.verdict is Verdict.DIVERGE, describe(record)
    assert record.first_divergence["metric"] == "logits after fusing, subject"
    assert not any(m.name.endswith(", reference") for m in record.metrics if not m.verdict.green)


@pytest.mark.parametrize("subject", ["mlx", long("unsloth")])
def test_what_quantizing_again_costs_is_measured_and_named(subject, engine, quantized):
    needs(subject)
    record = run(engine, quantized, subject)
    assert record.verdict is Verdict.IDENTICAL, describe(record)
    for side in ("subject", "reference"):
        [text] = [t for t in record.findings if t.startswith(f"requantization loss of the {side}")]
        lost, share, left = (
            float(n) for n in re.search(r"are (\S+) off, (\S+) of .* again (\S+)$", text).groups()
        )
        assert 0 < share < 1
        assert left < 1e-3 * lost, text
    # Logits of quantized models are held to no floor.
    assert not any(m.name.startswith("logits") for m in record.metrics)


@pytest.mark.long
def test_quantizing_again_that_costs_more_than_the_adapter_gives_is_no_pass(engine, quantized):
    record = run(engine, quantized.override({"lora.num_layers": 18}), "mlx")
    assert record.verdict is Verdict.DIVERGE, describe(record)
    assert "or quantizing again costs as much" in record.reason


def test_an_adapter_that_is_lost_where_the_base_is_quantized_is_found(engine, quantized):
    record = run(engine, quantized, "LostWhereQuantized")
    assert record.verdict is Verdict.DIVERGE, describe(record)
    assert "0 off from the base: the adapter is lost or another one" in record.reason


@pytest.mark.parametrize(("writer", "alike"), [("peft", True), ("peft-embedding", False)])
def test_peft_merges_a_tied_embedding_into_another_model_than_the_one_kept_apart(
    writer, alike, engine
):
    folder = written() / writer
    ids = np.random.default_rng(0).integers(1, 512, (2, 40)).astype(np.int32)
    handed = Trace({"ids": ids}, {"folder": str(folder), "content": content(folder)})
    arrays = engine.capture("hf", "fuse", Recipe(), handed).arrays
    off, effect = (np.abs(arrays["apart"] - arrays[name]).max() for name in ("fused", "base"))
    assert (off < 1e-4 * effect) == alike
    assert alike or off > 0.1 * effect
