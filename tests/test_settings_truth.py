"""Settings are what a path does, not what its recipe says; what is not known is not green."""

from __future__ import annotations

import numpy as np
import pytest

from parity.cells.cell import Cell
from parity.cells.run import run_cell
from parity.paths import loss_settings, measured
from parity.paths.registry import knobs
from parity.record import Verdict
from parity.report.text import describe
from parity.stages import find
from parity.stages.config import REQUESTED
from parity.stages.settings import TITLES, same
from parity.trace import Trace
from tests.cost import long

PROBE = find("00")
PATHS = "tests.settings_paths"


def run(engine, recipe, path, reference="mlx-lm", **changes):
    subject = path if path in ("mlx", "trl", "unsloth") else f"{PATHS}:{path}"
    recipe = recipe.with_knobs(knobs([subject, reference]))
    return run_cell(engine, Cell(PROBE, subject, reference, recipe, changes))


def diverging(record):
    return {m.name: m.note for m in record.metrics if m.verdict is Verdict.DIVERGE and m.gate}


FAULTS = [
    (
        "DeafToAccumulation",
        {"train.accumulation": 4},
        {"accumulation.steps": "1 in the subject, 4 in the reference"},
    ),
    long(
        "ClipInLoop",
        {},
        {"clip.mode": "norm in the subject, none", "clip.value": "0.5 in the subject"},
    ),
    (
        "Uncompiled",
        {"train.compile": True},
        {"train.compile": "False", "train.gradient_checkpointing": "True in the"},
    ),
    long(
        "AveragesOverPadding", {}, {"loss.denominator": "all positions in the subject, supervised"}
    ),
    ("SeedsNowhere", {}, {"seed.placement": "nowhere in the subject, before_lora"}),
    long("SeedsEarly", {}, {"seed.placement": "before_load in the subject, before_lora"}),
    ("HalfOfTheWeights", {}, {"dtype.parameters": "bfloat16 (64)"}),
]


@pytest.mark.parametrize(("path", "factors", "notes"), FAULTS)
def test_settings_are_what_a_path_does(path, factors, notes, engine, small):
    record = run(engine, small.override(factors), path)
    found = diverging(record)
    for key, words in notes.items():
        assert words in found.get(key, ""), describe(record)


def test_a_census_compares_how_many(engine, small):
    cell = Cell(PROBE, f"{PATHS}:MoreHalfWeights", f"{PATHS}:HalfOfTheWeights", small)
    found = diverging(run_cell(engine, cell))
    assert "bfloat16 (128) in the subject" in found["dtype.parameters"]


def test_one_setting_in_common_is_not_all_of_them(engine, small):
    record = run(engine, small, "SilentConfig")
    assert record.verdict is Verdict.INCONCLUSIVE
    assert f"1 of {len(TITLES)} settings were compared" in record.reason
    assert "not reported by the subject" in record.reason
    shipped = [finding for finding in record.findings if "as shipped" in finding]
    assert all("optimizer" in finding for finding in shipped), "only what both report"


def test_a_path_without_training_has_unknown_settings(engine, small):
    record = run(engine, small, "NeverTrains")
    metrics = {metric.name: metric for metric in record.metrics}
    assert metrics["clip.mode"].verdict is Verdict.INCONCLUSIVE
    assert "gradient clip: unknown (it cannot train) in the subject, none in the reference" in (
        metrics["clip.mode"].note
    )
    assert record.verdict is Verdict.INCONCLUSIVE, describe(record)


@pytest.mark.parametrize(
    ("path", "key", "note"),
    [
        # It counts positions from one, which rotary embeddings do not know.
        long("ports:positions_from_one_path", "rope.frequencies", ""),
        # A and B together give no gradient from which micro-batches could be counted.
        ("starts:b_is_drawn_and_a_is_zero_path", "accumulation.steps", "unknown (the gradient at"),
    ],
)
def test_what_is_no_setting_is_none(path, key, note, engine, small):
    record = run_cell(engine, Cell(PROBE, f"benchmarks.planted.{path}", "hf", small))
    metric = next(metric for metric in record.metrics if metric.name == key)
    assert note in metric.note
    assert metric.verdict is not Verdict.DIVERGE


CLEAN = [
    ("mlx", "mlx-lm", {}),
    long("mlx", "mlx-lm", {"train.accumulation": 3, "train.gradient_checkpointing": True}),
    ("mlx", "hf", {}),
    long("mlx", "hf", {"model.source": "tiny-llama"}),
    long("mlx", "hf", {"model.source": "tiny-qwen3"}),
    ("mlx", "hf", {"optim.clip": "norm", "optim.clip_value": 0.7, "lora.dropout": 0.1}),
    long("mlx", "hf", {"train.accumulation": 3, "train.accumulation_weighting": "token"}),
    long("mlx", "hf", {"optim.name": "sgd", "mask.end_shift": 0, "optim.clip": "value"}),
    long("mlx", "hf", {"model.dtype": "bfloat16", "train.gradient_checkpointing": True}),
    long("mlx", "hf", {"optim.schedule": "cosine", "train.steps": 30}),
    long("trl", "hf", {}),
    long("trl", "hf", {"optim.clip": "norm", "train.autocast": "bfloat16"}),
    long("mlx", "hf", {"model.dtype": "float16"}),
    long("unsloth", "mlx-lm", {"mask.end_shift": 1}),
]


@pytest.mark.parametrize(("subject", "reference", "changes"), CLEAN)
def test_clean_cells_have_equal_settings(subject, reference, changes, engine, small):
    record = run(engine, small.override(changes), subject, reference)
    assert record.verdict.green, describe(record)
    assert "were compared" in record.metrics[0].note


# What is measured, without a framework ------------------------------------------------------------


def gradients(count):
    rng = np.random.default_rng(0)
    return [{"a": rng.normal(size=(4, 3)), "b": rng.normal(size=(5,))} for _ in range(count)]


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ([1, 0, 0], (1, "only one a step")),
        ([1 / 3] * 3, (3, "mean")),
        ([4 / 14, 9 / 14, 1 / 14], (3, "token")),
        ([1, 1, 1], ("unknown (a step of their sum, or a step for each)", "each in full")),
        (
            [0.01, 0.01, 0.01],
            (3, "unknown (they count 0.01, 0.01, 0.01)"),
        ),  # mean or sum, and a clip
        ([0.5, 0.5, 0], (2, "mean")),
    ],
)
def test_micro_batches_are_counted_in_an_update(shares, expected):
    parts = gradients(3)
    update = {
        name: sum(s * part[name] for s, part in zip(shares, parts, strict=True)) for name in "ab"
    }
    found, residual = measured.combination(update, parts)
    assert residual < 1e-6
    assert measured.weighting_of(found, [4, 9, 1], 1e-2) == expected


def test_an_update_that_is_no_sum_leaves_a_rest():
    parts = gradients(2)
    assert measured.combination({n: np.sign(v) for n, v in parts[0].items()}, parts)[1] > 0.1


def test_clips_are_told_from_what_they_leave():
    [long] = gradients(1)
    long = {name: 1e4 * value for name, value in long.items()}
    norms = {name: np.linalg.norm(value) for name, value in long.items()}
    whole = np.hypot(*norms.values())
    for expected, limit, given in (
        ("none", None, long),
        ("norm", 0.5, {n: v * 0.5 / whole for n, v in long.items()}),
        ("leaf_norm", 0.5, {n: v * 0.5 / norms[n] for n, v in long.items()}),
        ("value", 0.5, {n: np.clip(v, -0.5, 0.5) for n, v in long.items()}),
    ):
        mode, found = measured.clip_of(long, given, 1e-2)
        assert (mode, found) == (expected, limit if limit is None else pytest.approx(limit))
    odd = {name: np.abs(value) for name, value in long.items()}
    assert measured.clip_of(long, odd, 1e-2)[0].startswith("unknown")


def weights(rule):
    for ids, lengths in loss_settings.loss_batches():
        steps = np.arange(1, ids.shape[1])
        mask = (steps < lengths[:, 1:]).astype(float)
        yield mask / rule(mask, lengths), lengths


@pytest.mark.parametrize(
    ("rule", "name"),
    [
        (lambda mask, _: mask.sum() / 1.01, "supervised tokens"),
        (lambda mask, _: mask.size, "all positions"),
        (lambda mask, _: len(mask), "rows"),
        (lambda *_: 1, "nothing"),
        (lambda mask, lengths: lengths[:, 1].sum(), "tokens that are no padding"),
        (
            lambda mask, _: mask.sum(1, keepdims=True) * len(mask),
            "supervised tokens of each row, then rows",
        ),
        (lambda mask, _: np.arange(1, mask.shape[1] + 1), "unknown (its tokens weigh"),
    ],
)
def test_denominators_are_told_from_weights(rule, name):
    assert loss_settings.denominator(weights(rule)).startswith(name)


def test_the_seed_in_effect_is_the_last_before_the_draw():
    seed, load, draw = ("seed", 7), ("load", None), ("draw", None)
    assert measured.seed_facts([load, seed, draw])["seed.placement"] == "before_lora"
    assert measured.seed_facts([seed, load, draw])["seed.placement"] == "before_load"
    # SFTTrainer seeds once more, for its data
    late = measured.seed_facts([seed, load, draw, ("seed", 8)])
    assert (late["seed.value"], late["seed.placement"]) == (7, "before_load")
    assert measured.seed_facts([load, draw], "nowhere")["seed.placement"] == "nowhere"
    assert not measured.known(measured.seed_facts([load, draw])["seed.value"])


def test_rates_of_a_schedule_that_ends_near_zero_are_compared_by_its_size():
    """MLX computes the cosine in float32, where the last of 30 rates is 3.7e-6 of itself off."""
    import math

    rates = [3e-3 * 0.5 * (1 + math.cos(math.pi * step / 30)) for step in range(30)]
    single = [float(np.float32(3e-3) * np.float32(r / 3e-3 + 7e-8)) for r in rates]
    assert abs(single[-1] / rates[-1] - 1) > 1e-6
    assert same("optim.lr", single, rates)
    assert not same("optim.lr", [*rates[:-1], rates[-1] + 3e-7], rates)
    assert not same("optim.lr", rates[:-1], rates)
    assert not same("rope.frequencies", [1.0, 1e-7], [1.0, 2e-7])


def test_what_a_recipe_asks_for_is_known_by_its_name():
    assert set(REQUESTED.values()) <= TITLES.keys()
    asked = {"optim.betas", "optim.eps", "lora.rank", "train.accumulation_weighting", "optim.clip"}
    assert asked <= REQUESTED.keys()


def test_unknown_is_a_value():
    assert not measured.known(measured.unknown("why"))
    assert measured.known(None)
    assert Trace(scalars={"x": measured.unknown("why")}).scalars["x"] == "unknown (why)"


@pytest.mark.parametrize(
    ("factor", "usual", "mode"),
    [(1.05, 1.05, "none"), (0.9, 0.9, "none"), (1.05, 1.0, "unknown"), (0.5, 1.0, "norm")],
)
def test_a_factor_on_every_update_is_no_clip(factor, usual, mode):
    gradient = {"a": np.full(4, 100.0), "b": np.full(3, -50.0)}
    given = {name: factor * value for name, value in gradient.items()}
    assert measured.clip_of(gradient, given, 0.01, usual)[0].startswith(mode)


def test_an_adapter_that_does_not_start_at_zero_is_no_clip(engine, small):
    """With B other than zero a gradient is not proportional to the scale at which clips are looked for."""
    scalars = engine.capture(
        "benchmarks.planted.wiring:b_not_zero_0", "config", small, Trace()
    ).scalars
    assert scalars["clip.mode"] == "none"
    assert scalars["clip.value"] is None
