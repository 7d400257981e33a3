"""A quantized base: the subject on packed weights, reference and referee on what they are worth."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from parity.cells.cell import Cell
from parity.cells.run import run_cell
from parity.errors import Unsupported, UsageError
from parity.judge.noise import REFEREE
from parity.paths import quantized
from parity.recipe import Recipe, load
from parity.report.text import describe
from parity.stages import find
from parity.trace import Trace
from tests.cost import long

PACKED = {
    "model.source": "tiny-llama", "model.quantization": "affine", "train.steps": 3,
    "train.compile": False,
}  # fmt: skip

PACK = """
import sys, json
import mlx.core as mx, numpy as np
found = {}
for bits in (2, 3, 4, 5, 6, 8):
    for size in (32, 64, 128):
        mx.random.seed(bits * size)
        w = mx.random.normal((2, 6, 384))
        packed, scales, biases = mx.quantize(w, size, bits)
        back = mx.dequantize(packed, scales, biases, size, bits)
        for name, value in (("w", packed), ("s", scales), ("b", biases), ("d", back)):
            found[f"{bits}-{size}-{name}"] = np.array(value)
for mode, size, bits in (("mxfp4", 32, 4), ("mxfp8", 32, 8), ("nvfp4", 16, 4)):
    # Each scale there is, each with every code of an element.
    count = max(size, 2 ** bits)
    codes = np.arange(count, dtype=np.uint64) % 2 ** bits
    row = np.zeros(count * bits // 32, np.uint32)
    for at, code in enumerate(codes):
        row[at * bits // 32] |= np.uint32(int(code) << (at * bits % 32))
    words = mx.array(np.tile(row, (256, 1)))
    scales = mx.array(np.repeat(np.arange(256, dtype=np.uint8)[:, None], count // size, 1))
    back = mx.dequantize(words, scales, group_size=size, bits=bits, mode=mode, dtype=mx.float32)
    for name, value in (("w", words), ("s", scales), ("d", back)):
        found[f"{mode}-{name}"] = np.array(value)
np.savez(sys.argv[1], **found)
"""


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Weights that MLX packed and unpacked, by bits, group size and what they are."""
    file = tmp_path_factory.mktemp("packed") / "packed.npz"
    subprocess.run([sys.executable, "-c", PACK, str(file)], check=True)
    return dict(np.load(file))


@pytest.fixture(scope="module")
def cell(engine):
    def run(probe, subject, reference, **changes):
        changes = {**PACKED, **{name.replace("__", "."): v for name, v in changes.items()}}
        recipe = Recipe().override(changes)
        return run_cell(engine, Cell(find(probe), subject, reference, recipe))

    return run


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_packed_weights_are_worth_what_mlx_makes_of_them(bits, packed):
    for size in (32, 64, 128):
        w, s, b, d = (packed[f"{bits}-{size}-{name}"] for name in "wsbd")
        ours = quantized.dequantized(w, s, b, bits, size)
        scale = np.abs(s).max() * 2**bits
        assert np.abs(ours - d).max() <= 2.0**-23 * scale  # MLX rounds to float32


@pytest.mark.parametrize(("mode", "size"), [("mxfp4", 32), ("mxfp8", 32), ("nvfp4", 16)])
def test_each_small_float_with_each_scale_is_worth_what_mlx_makes_of_it(mode, size, packed):
    w, s, d = (packed[f"{mode}-{name}"] for name in "wsd")
    with np.errstate(over="ignore"):
        ours = quantized.dequantized_floats(w, s, mode, size).astype(np.float32)
    if mode != "nvfp4":  # the last power of two is no number by the format; MLX makes it infinite
        assert np.isnan(ours[-1]).all()
        assert not np.isfinite(d[-1]).any()
        ours, d = ours[:-1], d[:-1]
    np.testing.assert_array_equal(ours, d)


@pytest.mark.parametrize("mode", [long("mxfp4"), long("mxfp8"), long("nvfp4")])
def test_the_modes_of_small_floats_agree_with_torch(mode, cell):
    bits, size = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}[mode]
    changes = {"model__quantization": mode, "model__bits": bits, "model__group_size": size}
    for probe in ("02", "05"):
        record = cell(probe, "mlx", "hf", **changes)
        assert record.verdict.green, describe(record)
        assert any(isinstance(metric.sources.get(REFEREE), float) for metric in record.metrics)


@pytest.mark.parametrize("probe", [long("02"), "05", long("00"), long("07")])
def test_the_quantized_product_agrees_with_dequantized_weights(probe, cell):
    record = cell(probe, "mlx", "hf")
    assert record.verdict.green, describe(record)
    for metric in (m for m in record.metrics if m.floor):
        assert isinstance(metric.sources[REFEREE], float), metric.sources


@pytest.mark.parametrize(("bits", "size"), [long(8, 32), long(3, 32), long(6, 64)])
def test_other_widths_agree_as_well(bits, size, cell):
    record = cell("05", "mlx", "hf", model__bits=bits, model__group_size=size)
    assert record.verdict.green, describe(record)


@pytest.mark.parametrize("probe", [long("02"), "07", long("05"), long("08"), long("11")])
def test_a_quantized_base_is_bit_identical_with_the_command_line(probe, cell):
    record = cell(probe, "mlx", "mlx-lm")
    assert record.verdict == "identical", describe(record)


@pytest.mark.long
def test_another_group_size_is_another_model(engine):
    """Wrong groups in the subject: found at the logits, and named by the configuration."""
    recipe = Recipe().override(PACKED)
    wrong = {"subject": {"model.group_size": 32}}
    logits = run_cell(engine, Cell(find("02"), "mlx", "hf", recipe, wrong))
    assert logits.verdict == "diverge", describe(logits)
    assert "first bad module: embed_tokens" in "; ".join(logits.findings)
    config = run_cell(engine, Cell(find("00"), "mlx", "mlx-lm", recipe, wrong))
    assert config.verdict == "diverge"
    assert "affine, 4 bits, groups of 32" in config.reason


@pytest.mark.long
def test_a_checkpoint_in_another_dtype_keeps_its_packed_weights(engine):
    """Scales and biases change their dtype, the packed words do not."""
    changes = {**PACKED, "model.dtype": "bfloat16"}
    recipe = Recipe().override(changes)
    record = run_cell(engine, Cell(find("02"), "mlx", "mlx-lm", recipe))
    assert record.verdict == "identical", describe(record)


def test_what_cannot_be_unpacked_is_refused_by_name():
    stored = {
        "mlp.weight": np.zeros((1, 4), np.uint32),
        "mlp.scales": np.zeros((1, 2), np.uint8),
        "mlp.global_scale": np.ones(1, np.float32),
    }
    packed = {"mode": "nvfp4", "bits": 4, "group_size": 16}
    with pytest.raises(Unsupported, match="mlp has a scale of the whole tensor"):
        list(quantized.weights(stored, packed))
    del stored["mlp.global_scale"]
    with pytest.raises(Unsupported, match="mode 'other'"):
        list(quantized.weights(stored, packed | {"mode": "other"}))


def test_a_mode_with_groups_that_it_does_not_have_is_an_error():
    with pytest.raises(UsageError, match=r"'mxfp4' has model\.bits=4 and model\.group_size=32"):
        load("default", ["model.quantization=mxfp4"])


def test_quantized_weights_are_not_trained(engine):
    """mlx-lm makes packed words trainable, of which MLX then has no gradient."""
    recipe = Recipe().override({**PACKED, "lora.kind": "full", "lora.num_layers": 1})
    for path in ("mlx", "mlx-lm", "hf"):
        with pytest.raises(Unsupported, match=r"packed weights have no gradient.*lora\.kind=full"):
            engine.source(path)("lora_init", recipe, Trace())


@pytest.mark.long
@pytest.mark.parametrize("probe", ["02", "05"])
def test_a_packed_hybrid_whose_norms_have_one_added_agrees_with_torch(probe, engine):
    """mlx-lm's checkpoint holds 1 + weight, of which torch is to take the 1 off."""
    recipe = Recipe().override({**PACKED, "model.source": "tiny-qwen3-5"})
    folder = quantized.made(recipe, engine.cache)
    changes = {"model.source": str(folder), "lora.target_modules": ["in_proj_qkv", "q_proj"]}
    record = run_cell(engine, Cell(find(probe), "mlx", "hf", Recipe().override(changes)))
    assert record.verdict.green, describe(record)
