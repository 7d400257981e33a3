"""Each fingerprint is known again when its fault is planted, and nothing is said of clean cells."""

from __future__ import annotations

import json
import shutil

import pytest

from parity import resources
from parity.cells.cell import Cell
from parity.cells.run import run_cell
from parity.judge.hints import LARGE, RULES, hints
from parity.record import Verdict
from parity.report.text import describe
from parity.stages import STAGES, find
from tests.cost import long
from tests.made_records import diverging

MLX_CPU = {"versions": {"mlx": "0.32"}, "device": "Device(cpu, 0)"}


# Real cells with one factor changed

PLANTED = [
    ("bias-correction", "06", {"optim.bias_correction": False}, "mlx/issues/1640"),
    ("betas-of-its-own", "06", {"optim.bias_correction": False, "optim.betas": [0.8, 0.99]}, ""),
    ("decay", "06", {"optim.weight_decay": 0.01}, "AdamW"),
    ("clip-by-value", "06", {"optim.clip": "value", "optim.clip_value": 1.0},
     "a clip by value at 1 in the subject"),
    ("clip-by-norm", "06", {"optim.clip": "norm", "optim.clip_value": 1.0},
     "a clip by norm at 1 in the subject: computed again with it"),
    ("end-of-row", "03", {"mask.end_shift": 0}, "mlx-lm/issues/1697"),
    ("start-of-row", "03", {"mask.start_shift": 1}, "mlx-lm/issues/584"),
    ("scale", "04", {"lora.scale": 4.0}, "mlx-examples/issues/1186"),
    ("scale-by-gradient", "05", {"lora.scale": 4.0}, "mlx-examples/issues/1186"),
    ("last-16-layers", "04", {"lora.num_layers": 16}, "unsloth-zoo/issues/669"),
    ("cast", "02", {"model.dtype": "float16"}, "unsloth-zoo/issues/670"),
]  # fmt: skip


@pytest.mark.parametrize("reference", ["mlx-lm", long("hf")])
@pytest.mark.parametrize(
    ("probe", "changes", "link"),
    [
        # Kernels for half precision are compiled for this one; a gradient is the dearest of stages.
        (long if name in ("cast", "scale-by-gradient", "end-of-row") else pytest.param)(
            *case, id=name
        )
        for name, *case in PLANTED
    ],
)
def test_one_changed_factor_gives_one_hint(probe, changes, link, reference, engine, small):
    found = run_cell(engine, Cell(find(probe), "mlx", reference, small, {"subject": changes}))
    assert found.verdict is Verdict.DIVERGE, describe(found)
    said = found.hints
    if "optim.betas" in changes:  # the reference corrects, with betas of its own: no constant ratio
        assert "2× the other's" in said[0], said
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


@pytest.mark.parametrize("seed", [0, long(1), long(2)])
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


@pytest.mark.parametrize("reference", ["mlx-lm", long("hf")])
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
        ({"facts": {"gradient bound, B = 0": 1.0}}, "of the subject's gradient exceeds 1"),
        ({"facts": {"gradient bound, B = 0": -1.0}}, "of the reference's gradient exceeds 1"),
        (
            {"facts": {"positions per row at the start": 2, "left, at the start": 0}},
            "2 more at the start",
        ),
        (
            {"facts": {"rows that fill their batch": -3}},
            "the reference supervises no position behind the longest row",
        ),
        (
            {
                "facts": {
                    "rows whose prompt is supervised": 3,
                    "left, whose prompt is supervised": 0,
                }
            },
            "the subject learns the prompts",
        ),
        (
            {"facts": {"positions per row at the last token": 1, "left, at the last token": 0}},
            "the reference does not learn",
        ),
        (
            {
                "facts": {
                    **{
                        f"{what} ratio, B {b} 0": 0.578125
                        for what in ("gradient", "loss")
                        for b in "=≠"
                    },
                    "share of positions supervised": 0.578125,
                }
            },
            "does its mean count padding as well?",
        ),
        (
            {
                "facts": {
                    f"{what} ratio, B {b} 0": 0.5 for what in ("gradient", "loss") for b in "=≠"
                }
            },
            "is its loss divided by another count?",
        ),
        (
            {
                "facts": {
                    **{f"gradient ratio, B {b} 0": 0.5 for b in "=≠"},
                    **{f"norm subject, B {b} 0": 1.0 for b in "=≠"},
                    **{f"norm reference, B {b} 0": 2.0 for b in "=≠"},
                }
            },
            "both gradients of the subject have norm 1: a clip by norm",
        ),
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
    (said,) = hints(diverging("any", **fields))
    assert says in said


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"findings": [f"{side}: BOS (id 2) stands twice" for side in ("subject", "reference")]},
        {"facts": {"first update ratio": 2.0}},
        {"facts": {"first update ratio": 1.0}},
        {"facts": {"positions per row past the end": 2}},
        {"facts": {"subject cache: turn": 2, "subject cache: position": 13,
                   "subject cache: start of the turn": 11, "subject cache: window": 64}},
        {"facts": {"LoRA scale ratio": 1.0}},
        {"facts": {"positions per row at the last token": -1, "left, at the last token": 6}},
        {"facts": {"positions per row at the start": 1, "left, at the start": 2}},
        {"facts": {"positions per row past the end": 1, "left, past the end": 1}},
        {"facts": {"positions per row at the last token": -1}},
        {"facts": {"rows whose prompt is supervised": 3, "left, whose prompt is supervised": 4}},
        {"facts": {"left, reference": 0.0, "reference corrects bias": 1.0}},
        {"facts": {"gradient ratio, B = 0": 8.0, "loss ratio, B = 0": 1.2}},
        # a factor that does not follow the norm
        {"facts": {"gradient ratio, B = 0": 0.5, "gradient ratio, B ≠ 0": 0.5}},
        {
            "findings": ["first bad module: layers.5.self_attn.o_proj, 1; the error grows with the position"],
            "facts": {"first position off": 1},
        },
        {"findings": ["first bad module: layers.0.mlp.gate_proj, 1; the error grows with the position"]},
        {
            "findings": ["first bad module: layers.0.self_attn.o_proj, 1; the error grows with the position"],
            "facts": {"first position off": 32},
        },
    ],
)  # fmt: skip
def test_what_resembles_nothing_known_gives_no_hint(fields):
    assert hints(diverging("any", **fields)) == []


def test_no_hint_unless_it_diverges():
    said = {"facts": {"LoRA scale ratio": 2.0}}
    assert hints(diverging("any", **said))
    for verdict in Verdict:
        if verdict is not Verdict.DIVERGE:
            assert hints(diverging("any", verdict=str(verdict), **said)) == []


def test_accuracy_over_the_vocabulary_is_called_accuracy():
    facts = {"vocabulary": 49_152, "distance of gradient, B = 0": 3e-5}
    for name in ("reduced loss", "loss, B = 0", "gradient, B = 0"):
        (said,) = hints(diverging(name, environment=MLX_CPU, facts=facts))
        assert "numerical accuracy and not logic" in said
    silent = [
        diverging("reduced loss", environment=MLX_CPU, facts={"vocabulary": LARGE - 1}),
        diverging("reduced loss", environment={**MLX_CPU, "device": "Device(gpu, 0)"}, facts=facts),
        diverging("reduced loss", environment={"versions": {"torch": "2"}, "device": "cpu"}, facts=facts),
        diverging("supervised positions", environment=MLX_CPU, facts=facts),
        diverging("gradient, B = 0", environment=MLX_CPU,
               facts={**facts, "distance of gradient, B = 0": 0.1}),
    ]  # fmt: skip
    assert [hints(r) for r in silent] == [[]] * len(silent)


def test_every_rule_links_somewhere():
    assert all(rule.__doc__ for rule in RULES)
