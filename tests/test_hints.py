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
from parity.judge.optimizers import adam, in_effect
from parity.recipe import Recipe
from parity.record import Metric, Record, Side, Verdict
from parity.report.text import describe
from parity.stages import STAGES, find
from parity.stages.cross_entropy import mask_facts
from parity.stages.gradient import scale_facts
from parity.stages.targets import TargetDifference, TrainingRow, patterns
from tests.cost import long

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
    (said,) = hints(record("any", **fields))
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
    assert mask_facts(subject, reference, [5, 7]) == {
        start: -1,
        end: 1,
        "left, at the start": 2,
        "left, past the end": 2,
    }
    subject[0, 4] = False
    assert mask_facts(subject, reference, [5, 7]) == {start: -1, "left, at the start": 1}
    assert mask_facts(subject[:, :5], reference, [5, 7]) == {}


ROWS = [
    TrainingRow(tuple(range(10, 10 + n)), start, "row") for n, start in ((7, 1), (9, 3), (5, 2))
]
MASKS = {
    "right": lambda row: {(i, row.ids[i]) for i in range(row.start, len(row.ids))},
    "past the end": lambda row: MASKS["right"](row) | {(len(row.ids), 0)},
    "last token": lambda row: {(i, t) for i, t in MASKS["right"](row) if i < len(row.ids) - 1},
    "start": lambda row: {(i, t) for i, t in MASKS["right"](row) if i > row.start},
    "shifted": lambda row: {(i, row.ids[i - 1]) for i in range(row.start, len(row.ids))},
    "shifted on": lambda row: {(i + 1, t) for i, t in MASKS["right"](row)},
    "one in the middle": lambda row: {(i, t) for i, t in MASKS["right"](row) if i != 4},
    "every second": lambda row: {(i, t) for i, t in MASKS["right"](row) if i % 2},
    "prompts": lambda row: {(i, row.ids[i]) for i in range(1, len(row.ids))},
}
MEANT = {
    "past the end": "one position past the end", "last token": "does not learn the last token",
    "start": "at the start of every row", "prompts": "learns the prompts",
}  # fmt: skip


@pytest.mark.parametrize("fault", [name for name in MASKS if name != "right"])
@pytest.mark.parametrize("side", ["subject", "reference"])
def test_a_mask_hint_explains_all_of_a_difference(fault, side):
    """What is only a part of another fault, as of shifted targets, sets no hint off."""
    differences = []
    for row in ROWS:
        found = {"subject": MASKS["right"](row), "reference": MASKS["right"](row)}
        found[side] = MASKS[fault](row)
        ours, theirs = found["subject"], found["reference"]
        differences.append(TargetDifference(row, ours - theirs, theirs - ours, ours & theirs))
    said = hints(record("any", facts=patterns(differences)))
    assert len(said) == (fault in MEANT), said
    assert all(MEANT[fault] in text for text in said)


def test_hints_are_about_one_optimizer():
    """Of formulas that give the weights of both sides only what differs between them is said."""
    same = {"corrects bias": 1.0, "weight decay": 0.0, "clip by norm": 0.0, "clip by value": 0.0}
    both = {
        f"{side} {what}": value for side in ("subject", "reference") for what, value in same.items()
    }
    fits = {"left, subject": 1e-4, "left, reference": 1e-4}
    assert hints(record("any", facts=both | fits)) == []
    for what, value in (("corrects bias", 0.0), ("weight decay", 0.01), ("clip by norm", 1.0)):
        facts = both | fits | {f"subject {what}": value}
        assert len(hints(record("any", facts=facts))) == 1
        assert (
            hints(record("any", facts={k: v for k, v in facts.items() if k != "left, subject"}))
            == []
        )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"optim.clip": "value", "optim.clip_value": 0.5}, {"subject clip by value": 0.5}),
        ({"optim.clip": "norm"}, {"subject clip by norm": 1.0}),
        # Both gradients are so long that any limit gives the same weights.
        (
            {"optim.clip": "norm", "optim.clip_value": 0.7},
            {"subject clip by norm": 1.0, "subject clip at any limit": 1.0},
        ),
        ({"optim.clip": "value", "optim.clip_value": 0.98}, None),
        ({"optim.bias_correction": False}, {"subject corrects bias": 0.0}),
        ({"optim.weight_decay": 0.02}, {"subject weight decay": 0.02}),
        ({"optim.betas": [0.5, 0.6]}, None),
        ({"optim.eps": 0.1}, None),
    ],
)
def test_a_formula_that_the_recipe_does_not_name_is_found(changes, expected):
    """The recipe says one thing, the weights another: the formula is found from these alone."""
    rng = np.random.default_rng(0)
    weights = {"a": rng.normal(0, 0.1, (8, 64)), "b": rng.normal(0, 0.1, (64, 8))}
    fed = [{n: rng.normal(0, 1, v.shape) * 10 ** rng.uniform(-2, 1) for n, v in weights.items()}
           for _ in range(2)]  # fmt: skip
    factors = Recipe().factors()
    sides = {
        "subject": (adam(weights, fed, {**factors, **changes}), factors),
        "reference": (adam(weights, fed, factors), factors),
    }
    facts = in_effect(weights, fed, sides, 0.02, 1e-7)
    assert facts["left, reference"] == 0
    if expected is None:
        assert "left, subject" not in facts
    else:
        assert facts["left, subject"] < 1e-3
        assert expected.items() <= facts.items()


def test_a_limit_that_the_weights_do_not_tell_is_not_named():
    both = {
        f"{s} {w}": 0.0 for s in ("subject", "reference") for w in ("clip by norm", "weight decay")
    }
    facts = both | {"left, subject": 1e-4, "left, reference": 1e-4, "subject clip by norm": 1.0}
    facts |= {"subject corrects bias": 1.0, "reference corrects bias": 1.0}
    assert "a clip by norm at 1 in the subject: " in hints(record("any", facts=facts))[0]
    facts["subject clip at any limit"] = 1.0
    said = hints(record("any", facts=facts))[0]
    assert "a clip by norm in the subject, whose limit these weights do not tell" in said


def test_a_clipped_gradient_shows_its_bound():
    rng = np.random.default_rng(0)
    whole = {"a": rng.normal(0, 1, 500)}
    noisy = {"a": whole["a"] * (1 + 1e-6 * rng.normal(0, 1, 500))}
    bound, floor = "gradient bound, B", {"a": 1e-6}
    assert scale_facts({"a": noisy["a"].clip(-1, 1)}, whole, floor, "B")[bound] == pytest.approx(1)
    assert scale_facts(noisy, {"a": whole["a"].clip(-1, 1)}, floor, "B")[bound] == pytest.approx(-1)
    assert bound not in scale_facts(noisy, whole, floor, "B")
    scaled = scale_facts({"a": 0.5 * whole["a"]}, whole, floor, "B")
    assert scaled["gradient ratio, B"] == pytest.approx(0.5)
    # 69 of 252 tensors 1 % longer point the same way to six digits, and are no common factor.
    partly = {name: v * (1.01 if i % 4 == 0 else 1.0) for i, (name, v) in enumerate(many(252))}
    floors = dict.fromkeys(partly, 1e-6)
    # Where all is rounding a ratio next to one explains nothing.
    assert "gradient ratio, B" not in scale_facts({"a": 1.000001 * whole["a"]}, whole, floor, "B")
    assert "gradient ratio, B" not in scale_facts(partly, dict(many(252)), floors, "B")
    # One tensor of 252 that is another multiple is a hundredth of the difference, and no rounding.
    most = {name: v * (1.5 if i else 1.6) for i, (name, v) in enumerate(many(252))}
    assert "gradient ratio, B" not in scale_facts(most, dict(many(252)), floors, "B")
    assert bound not in scaled


def many(count):
    """Tensors of a gradient, by name."""
    rng = np.random.default_rng(0)
    return [(f"layers.{i}.lora_b", rng.normal(size=(4, 8))) for i in range(count)]


def test_another_number_of_elements_is_no_cast():
    def cast(note):
        found = Metric(name="dtype.adapter", verdict=Verdict.DIVERGE, value=1, tolerance=0,
                       minimum_required_tolerance=1, note=note)  # fmt: skip
        return hints(record().model_copy(update={"metrics": [found]}))

    assert not cast(
        "dtype of the adapter: float32 (8) in the subject, float32 (9) in the reference"
    )
    assert cast("dtype of the adapter: bfloat16 (8) in the subject, float32 (8) in the reference")
