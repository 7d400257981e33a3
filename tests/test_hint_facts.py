"""Numbers that stages put into records, and the hints that are drawn from them."""

from __future__ import annotations

import numpy as np
import pytest

from parity.judge.hints import hints
from parity.judge.optimizers import adam, in_effect
from parity.recipe import Recipe
from parity.record import Metric, Verdict
from parity.stages.cross_entropy import mask_facts
from parity.stages.gradient import scale_facts
from parity.stages.targets import TargetDifference, TrainingRow, patterns
from tests.made_records import diverging


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
    said = hints(diverging("any", facts=patterns(differences)))
    assert len(said) == (fault in MEANT), said
    assert all(MEANT[fault] in text for text in said)


def test_hints_are_about_one_optimizer():
    """Of formulas that give the weights of both sides only what differs between them is said."""
    same = {"corrects bias": 1.0, "weight decay": 0.0, "clip by norm": 0.0, "clip by value": 0.0}
    both = {
        f"{side} {what}": value for side in ("subject", "reference") for what, value in same.items()
    }
    fits = {"left, subject": 1e-4, "left, reference": 1e-4}
    assert hints(diverging("any", facts=both | fits)) == []
    for what, value in (("corrects bias", 0.0), ("weight decay", 0.01), ("clip by norm", 1.0)):
        facts = both | fits | {f"subject {what}": value}
        assert len(hints(diverging("any", facts=facts))) == 1
        assert (
            hints(diverging("any", facts={k: v for k, v in facts.items() if k != "left, subject"}))
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
    assert "a clip by norm at 1 in the subject: " in hints(diverging("any", facts=facts))[0]
    facts["subject clip at any limit"] = 1.0
    said = hints(diverging("any", facts=facts))[0]
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
        return hints(diverging().model_copy(update={"metrics": [found]}))

    assert not cast(
        "dtype of the adapter: float32 (8) in the subject, float32 (9) in the reference"
    )
    assert cast("dtype of the adapter: bfloat16 (8) in the subject, float32 (8) in the reference")
