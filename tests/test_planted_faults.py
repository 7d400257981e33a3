"""Each change to the subject turns the right probe to `diverge`, and no earlier one."""

from __future__ import annotations

import pytest

from parity.cells.cell import Cell
from parity.cells.run import run_cell
from parity.record import Verdict
from parity.report.text import describe
from parity.stages import STAGES, find
from tests.cost import long

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"]

FAULTS = [
    ("float16-cast", {"model.dtype": "float16"}, "logits"),
    ("one-label-too-few", {"mask.end_shift": 0}, "supervised_positions"),
    ("mask-off-by-one", {"mask.start_shift": 1}, "supervised_positions"),
    ("last-16-layers", {"lora.num_layers": 16}, "lora_init"),
    ("seed-before-load", {"seed.placement": "before_load"}, "lora_init"),
    ("scale-doubled", {"lora.scale": 4.0}, "lora_init"),
    ("one-module-missing", {"lora.target_modules": MODULES}, "lora_init"),
    ("value-clip", {"optim.clip": "value", "optim.clip_value": 1.0}, "optimizer_step"),
    ("bias-correction-off", {"optim.bias_correction": False}, "optimizer_step"),
    ("weight-decay-on", {"optim.weight_decay": 0.01}, "optimizer_step"),
]
SEEN_IN_WORDS = ("mask-off-by-one", "one-module-missing")
LONG = ("float16-cast", "mask-off-by-one", "scale-doubled", "one-module-missing", "weight-decay-on")
"""Others diverge at the same probe for a like reason."""


@pytest.mark.parametrize("reference", ["mlx-lm", long("hf")])
@pytest.mark.parametrize(
    ("changes", "expected"),
    [long(*f[1:], id=f[0]) if f[0] in LONG else pytest.param(*f[1:], id=f[0]) for f in FAULTS],
)
def test_the_earliest_right_probe_diverges(changes, expected, reference, engine, small):
    if "seed.placement" in changes and reference == "hf":
        # Across frameworks generators differ: an init is judged by its distribution alone.
        expected = None
    for stage in STAGES[1 : STAGES.index(find("loss_curve"))]:
        record = run_cell(engine, Cell(stage, "mlx", reference, small, {"subject": changes}))
        if stage.name == expected:
            assert record.verdict is Verdict.DIVERGE, describe(record)
            assert record.first_divergence is not None
            assert record.reason
            return
        assert record.verdict.green, describe(record)
    assert expected is None


@pytest.mark.parametrize(
    "changes",
    [
        # What else a path does otherwise than its recipe says: `test_settings_truth.py`.
        pytest.param(changes, id=name) if name in SEEN_IN_WORDS else long(changes, id=name)
        for name, changes, _ in FAULTS
    ],
)
def test_the_effective_config_says_it_in_words(changes, engine, small):
    record = run_cell(engine, Cell(STAGES[0], "mlx", "mlx-lm", small, {"subject": changes}))
    if list(changes) == ["mask.start_shift"]:
        assert "1 position fewer per row" in record.reason
    assert record.verdict is Verdict.DIVERGE, describe(record)
