"""Each tensor of A is tested, and a sound adapter is called wrong as seldom as is promised."""

from __future__ import annotations

import numpy as np
import pytest

from parity.cells.cell import Cell
from parity.cells.run import run_cell
from parity.record import Verdict
from parity.report.text import describe
from parity.stages import find
from parity.stages.lora_init import ALPHA, distribution, holm
from tests.cost import long

PROBE = find("04")
FAULTS = [
    ("OneTensorOfZeros", ["layers.7.self_attn.v_proj.lora_a (all zero)"], 1),
    ("ThreeAtHalfScale", [f"layers.{n}.mlp.up_proj.lora_a (0." for n in (2, 9, 16)], 3),
]


@pytest.mark.parametrize(("path", "words", "count"), FAULTS)
def test_single_tensors_are_found_among_126(path, words, count, engine, small):
    record = run_cell(engine, Cell(PROBE, f"tests.settings_paths:{path}", "hf", small))
    assert record.verdict is Verdict.DIVERGE, describe(record)
    metric = next(m for m in record.metrics if m.name == "distribution of each A, subject")
    assert (metric.mismatched, metric.total) == (count, 126)
    for word in words:
        assert word in metric.note
    pooled = next(m for m in record.metrics if m.name == "distribution of A, subject")
    assert pooled.verdict.green, "the pool alone does not see it"


def drawn(rng, count=126, dtype=np.float32, sizes=((64, 8), (128, 8), (64, 8))):
    shapes = [sizes[i % len(sizes)] for i in range(count)]
    return {
        f"layers.{i}.lora_a": rng.uniform(-1, 1, shape).astype(dtype)
        / np.sqrt(shape[0], dtype=dtype)
        for i, shape in enumerate(shapes)
    }


@pytest.mark.parametrize("samples", [4_000, long(20_000)])
def test_false_alarms_are_as_rare_as_stated(samples):
    """p-values of sound tensors are uniform, so that the stated rate follows from Holm's proof."""
    from scipy.stats import kstest, kstwo

    from parity.stages.lora_init import _distance

    rng = np.random.default_rng(0)
    drawn = np.sort(rng.uniform(-1, 1, (samples, 256)), axis=1)
    p = np.array([kstwo.sf(d, 256) for d in map(_distance, drawn)])
    assert kstest(p, "uniform").pvalue > 1e-3
    for level in (0.1, 0.01, 0.001):
        assert abs((p < level).mean() - level) < 5 * np.sqrt(level / len(p))
    assert kstest(drawn[0], "uniform", args=(-1, 2)).statistic == pytest.approx(_distance(drawn[0]))


@pytest.mark.parametrize("adapters", [60, long(300)])
def test_no_sound_adapter_of_many_is_called_wrong(adapters):
    """Of 300 adapters of 126 tensors 0.03 false alarms are expected at the stated rate."""
    rng = np.random.default_rng(1)
    alarms = sum(
        not all(metric.verdict.green for metric in distribution("subject", drawn(rng)))
        for _ in range(adapters)
    )
    assert ALPHA == 1e-4
    assert alarms <= 1


def test_half_precision_lies_on_a_grid():
    """A quarter of a million values in bfloat16 are no proof of another distribution."""
    rng = np.random.default_rng(2)
    for _ in range(5):
        tensors = drawn(rng, count=24, sizes=((1000, 16),))
        rounded = {
            # to nearest even in the upper 16 bits
            name: (
                (v.view(np.uint32) + 0x7FFF + ((v.view(np.uint32) >> 16) & 1)) & 0xFFFF0000
            ).view(np.float32)
            for name, v in tensors.items()
        }
        metrics = distribution("subject", rounded, "bfloat16")
        assert all(metric.verdict.green for metric in metrics), [m.note for m in metrics]


def test_holm_steps_down():
    assert holm({"a": 0.01, "b": 0.03, "c": 0.02}, 0.05) == ["a", "c", "b"]
    assert holm({"a": 0.01, "b": 0.03, "c": 0.026}, 0.05) == ["a"]
    assert holm({"a": 0.02}, 0.01) == []
