"""Each fingerprint is known again when its fault is planted, and nothing is said of clean cells."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from parity import resources
from parity.cells.cell import Cell
from parity.cells.run import run_cell
from parity.judge.hints import LARGE, RULES, hints
from parity.record import Metric, Record, Side, Verdict
from parity.report.text import describe
from parity.stages import STAGES, find
from parity.stages.cross_entropy import mask_facts
from parity.stages.gradient import scale_facts

ADAMW = {"optim.name": "adamw", "optim.betas": [0.9, 0.999], "optim.lr": 1e-3}
MLX_CPU = {"versions": {"mlx": "0.32"}, "device": "Device(cpu, 0)"}


def record(*metrics: str, verdict: str = "diverge", environment: dict | None = None, **fields):
    """A record in which the metrics named diverge."""
    side = Side(path="mlx", recipe=ADAMW, digest="0", environment=environment or {})
    found = [
        Metric(name=name, verdict=Verdict.DIVERGE, value=1, tolerance=0,
               minimum_required_tolerance=1, off="subject", relative=1e-5)
        for name in metrics
    ]  # fmt: skip
    return Record(
        tool="0", probe=3, stage="cross_entropy", model="tiny", seed=0, subject=side,
        reference=side, verdict=Verdict(verdict), reason="", metrics=found, **fields,
    )  # fmt: skip


# Real cells with one factor changed

PLANTED = [
    ("bias-correction", "06", {"optim.bias_correction": False}, "mlx/issues/1640"),
    ("betas-of-its-own", "06", {"optim.bias_correction": False, "optim.betas": [0.8, 0.99]}, ""),
    ("decay", "06", {"optim.weight_decay": 0.01}, "AdamW"),
    ("clip-by-value", "06", {"optim.clip": "value", "optim.clip_value": 1.0},
     "a clip by value (https://github.com/unslothai/unsloth-zoo/issues/662)"),
    ("clip-by-norm", "06", {"optim.clip": "norm", "optim.clip_value": 1.0},
     "a clip by norm, or another beta (https://github.com/unslothai/unsloth-zoo/issues/662)"),
    ("end-of-row", "03", {"mask.end_shift": 0}, "mlx-lm/issues/1697"),
    ("start-of-row", "03", {"mask.start_shift": 1}, "mlx-lm/issues/584"),
    ("scale", "04", {"lora.scale": 4.0}, "mlx-examples/issues/1186"),
    ("scale-by-gradient", "05", {"lora.scale": 4.0}, "mlx-examples/issues/1186"),
    ("last-16-layers", "04", {"lora.num_layers": 16}, "unsloth-zoo/issues/669"),
    ("cast", "02", {"model.dtype": "float16"}, "unsloth-zoo/issues/670"),
]  # fmt: skip


@pytest.mark.parametrize("reference", ["mlx-lm", "hf"])
@pytest.mark.parametrize(
    ("probe", "changes", "link"), [case[1:] for case in PLANTED], ids=[case[0] for case in PLANTED]
)
def test_one_changed_factor_gives_one_hint(probe, changes, link, reference, engine, small):
    found = run_cell(engine, Cell(find(probe), "mlx", reference, small, {"subject": changes}))
    assert found.verdict is Verdict.DIVERGE, describe(found)
    said = found.hints
    if "optim.betas" in changes:  # the reference corrects, with betas of its own: no constant ratio
        assert "2× the other's" in said[0]
        link = "mlx/issues/1640"
    assert len(said) == 1, describe(found)
    assert link in said[0]
    assert f"hint: {said[0]}" in describe(found)


def test_the_side_that_has_it_is_named(engine, small):
    changes = {"optim.bias_correction": False}
    for side, name in (("subject", "the subject's"), ("reference", "the reference's")):
        cell = Cell(find("06"), "mlx", "mlx-lm", small, {side: changes})
        (said,) = run_cell(engine, cell).hints
        assert said.startswith(f"{name} first update is 3.16×")


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_clip_by_norm_is_told_from_another_eps(seed, engine, small):
    """Where a gradient is as small as eps both move single elements at the first step."""
    recipe = small.override({"seed.value": seed})
    for change, said in (({"optim.clip": "norm"}, ["a clip by norm"]), ({"optim.eps": 1e-5}, [])):
        found = run_cell(engine, Cell(find("06"), "mlx", "mlx-lm", recipe, {"subject": change}))
        assert found.verdict is Verdict.DIVERGE
        assert len(found.hints) == len(said), describe(found)
        assert all(word in hint for word, hint in zip(said, found.hints, strict=True))


def test_a_seed_set_elsewhere_is_told_from_other_settings(engine, small):
    changes = {"subject": {"seed.placement": "before_load"}}
    (said,) = run_cell(engine, Cell(find("04"), "mlx", "mlx-lm", small, changes)).hints
    assert "unsloth-zoo/issues/674" in said


def test_rope_is_known_by_its_growth_with_the_position(tmp_path, engine, small):
    """The subject reads the same weights with the theta of a config that was not understood."""
    folder = tmp_path / "llama"
    shutil.copytree(resources.model_dir("tiny-llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    for settings in (config, config.get("rope_parameters") or {}):
        if "rope_theta" in settings:
            settings["rope_theta"] *= 7
    (folder / "config.json").write_text(json.dumps(config))
    recipe = small.override({"model.source": "tiny-llama"})
    changes = {"subject": {"model.source": str(folder)}}
    found = run_cell(engine, Cell(find("02"), "mlx", "hf", recipe, changes))
    assert found.verdict is Verdict.DIVERGE, describe(found)
    assert ["mlx-lm/issues/953" in said for said in found.hints] == [True], describe(found)


@pytest.mark.parametrize("reference", ["mlx-lm", "hf"])
def test_clean_cells_give_no_hint(reference, engine, small):
    for stage in STAGES[: STAGES.index(find("loss_curve"))]:
        found = run_cell(engine, Cell(stage, "mlx", reference, small))
        assert found.verdict.green, describe(found)
        assert not found.hints


# Records made up


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"findings": ["subject: BOS (id 2) stands twice at the start of 6 of 6 rows"]}, "1095"),
        ({"facts": {"gradient ratio, B = 0": 8.0}}, "8× the reference's"),
        ({"facts": {"gradient ratio, B = 0": 0.5, "gradient ratio, B ≠ 0": 0.5}}, "by norm"),
        ({"facts": {"gradient bound, B = 0": 1.0}}, "of the subject's gradient exceeds 1"),
        ({"facts": {"gradient bound, B = 0": -1.0}}, "of the reference's gradient exceeds 1"),
        ({"facts": {"positions per row at the start": 2}}, "2 more at the start"),
        (
            {"facts": {"rows that fill their batch": -3}},
            "the reference pads to a width without + 1",
        ),
        ({"facts": {"rows whose prompt is supervised": 3}}, "the subject learns the prompts"),
        ({"facts": {"positions per row at the last token": 1}}, "the reference does not learn"),
        (
            {
                "facts": {
                    "reference cache: turn": 4,
                    "reference cache: position": 63,
                    "reference cache: start of the turn": 42,
                    "reference cache: window": 64,
                }
            },
            "the reference's cache is right up to position 62",
        ),
        (
            {
                "facts": {
                    "subject cache: turn": 2,
                    "subject cache: position": 11,
                    "subject cache: start of the turn": 11,
                    "subject cache: window": 0,
                }
            },
            "off from the first token of turn 2",
        ),
        ({"facts": {"first layers without LoRA": -2}}, "the reference leaves the first 2 layers"),
    ],
)
def test_made_up_fingerprints(fields, says):
    (said,) = hints(record("any", **fields))
    assert says in said


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"findings": [f"{side}: BOS (id 2) stands twice" for side in ("subject", "reference")]},
        {"facts": {"first update ratio": 2.0}},
        {"facts": {"first update ratio": 1.0}},
        {"facts": {"first gap / weight": 1e-5, "first gap / weight, cosine": 0.5}},
        {"facts": {"positions per row past the end": 2}},
        {"facts": {"subject cache: turn": 2, "subject cache: position": 13,
                   "subject cache: start of the turn": 11, "subject cache: window": 64}},
        {"facts": {"least gradient off": 1.0, "share below it": 0.5, "share off above it": 0.1}},
        {"facts": {"least gradient off": 1.0, "share below it": 0.0, "share off above it": 1.0}},
        {"facts": {"LoRA scale ratio": 1.0}},
        {"findings": ["first bad module: layers.0.mlp.gate_proj, 1; the error grows with the position"]},
        {
            "findings": ["first bad module: layers.0.self_attn.o_proj, 1; the error grows with the position"],
            "facts": {"first position off": 32},
        },
    ],
)  # fmt: skip
def test_what_resembles_nothing_known_gives_no_hint(fields):
    assert hints(record("any", **fields)) == []


def test_no_hint_unless_it_diverges():
    said = {"facts": {"LoRA scale ratio": 2.0}}
    assert hints(record("any", **said))
    for verdict in Verdict:
        if verdict is not Verdict.DIVERGE:
            assert hints(record("any", verdict=str(verdict), **said)) == []


def test_accuracy_over_the_vocabulary_is_called_accuracy():
    facts = {"vocabulary": 49_152, "distance of gradient, B = 0": 3e-5}
    for name in ("reduced loss", "loss, B = 0", "gradient, B = 0"):
        (said,) = hints(record(name, environment=MLX_CPU, facts=facts))
        assert "numerical accuracy and not logic" in said
    silent = [
        record("reduced loss", environment=MLX_CPU, facts={"vocabulary": LARGE - 1}),
        record("reduced loss", environment={**MLX_CPU, "device": "Device(gpu, 0)"}, facts=facts),
        record("reduced loss", environment={"versions": {"torch": "2"}, "device": "cpu"}, facts=facts),
        record("supervised positions", environment=MLX_CPU, facts=facts),
        record("gradient, B = 0", environment=MLX_CPU,
               facts={**facts, "distance of gradient, B = 0": 0.1}),
    ]  # fmt: skip
    assert [hints(r) for r in silent] == [[]] * len(silent)


def test_every_rule_links_somewhere():
    assert all(rule.__doc__ for rule in RULES)


# Numbers that stages put into records


def test_positions_are_counted_where_all_rows_agree():
    reference = np.zeros((2, 8), bool)
    reference[0, 1:4] = reference[1, 1:6] = True
    subject = reference.copy()
    subject[0, 4] = subject[1, 6] = True
    subject[:, 1] = False
    start, end = "positions per row at the start", "positions per row past the end"
    assert mask_facts(subject, reference, [5, 7]) == {start: -1, end: 1}
    subject[0, 4] = False
    assert mask_facts(subject, reference, [5, 7]) == {start: -1}
    assert mask_facts(subject[:, :5], reference, [5, 7]) == {}


def test_a_clipped_gradient_shows_its_bound():
    rng = np.random.default_rng(0)
    whole = {"a": rng.normal(0, 1, 500)}
    noisy = {"a": whole["a"] * (1 + 1e-6 * rng.normal(0, 1, 500))}
    bound = "gradient bound, B"
    assert scale_facts({"a": noisy["a"].clip(-1, 1)}, whole, "B")[bound] == pytest.approx(1)
    assert scale_facts(noisy, {"a": whole["a"].clip(-1, 1)}, "B")[bound] == pytest.approx(-1)
    assert bound not in scale_facts(noisy, whole, "B")
    scaled = scale_facts({"a": 0.5 * whole["a"]}, whole, "B")
    assert scaled["gradient ratio, B"] == pytest.approx(0.5)
    assert bound not in scaled
