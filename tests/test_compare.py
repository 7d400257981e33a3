import numpy as np
import pytest

from parity.judge.compare import (
    compare,
    compare_exact,
    compare_group,
    compare_series,
    side_off,
)
from parity.judge.noise import HEADROOM, Noise, perturb
from parity.record import Verdict, worst

RNG = np.random.default_rng(0)
TRUTH = RNG.normal(0, 1, (8, 16))
REFERENCE = TRUTH.astype(np.float32)
NOISE = Noise(exact=False, referee={"x": TRUTH})


def test_equal_bits_are_identical_and_no_more_than_that():
    assert compare("x", REFERENCE, REFERENCE.copy(), NOISE).verdict is Verdict.IDENTICAL
    assert compare("x", perturb(REFERENCE, RNG), REFERENCE, NOISE).verdict is Verdict.AGREE
    exact = Noise(exact=True)
    assert compare("x", perturb(REFERENCE, RNG), REFERENCE, exact).verdict is Verdict.DIVERGE


def test_the_tolerance_is_the_multiple_of_the_floor_and_is_published():
    floor = NOISE.floor("x", REFERENCE)
    for factor, verdict in ((0.9, Verdict.AGREE), (1.1, Verdict.DIVERGE)):
        moved = REFERENCE.astype(np.float64)
        moved[3, 5] += factor * HEADROOM * floor
        metric = compare("x", moved, REFERENCE, NOISE)
        assert metric.verdict is verdict
        assert metric.tolerance == pytest.approx(HEADROOM * floor)
        assert metric.minimum_required_tolerance == pytest.approx(
            factor * HEADROOM * floor, rel=1e-6
        )
        assert metric.where == "x at (3, 5)"
    assert metric.off == "subject"
    assert metric.mismatched == 1


def test_a_noisier_reference_has_a_wider_floor_and_a_better_subject_passes():
    rough = (TRUTH + 1e-3).astype(np.float32)
    assert compare("x", REFERENCE, rough, NOISE).verdict is Verdict.AGREE
    assert compare("x", REFERENCE, rough, Noise(exact=False)).verdict is Verdict.DIVERGE


def test_the_side_that_is_off():
    assert side_off(1e-3, 1e-7, 1e-7) == "subject"
    assert side_off(1e-7, 1e-3, 1e-7) == "reference"
    assert side_off(1e-3, 2e-3, 1e-7) == "both"
    assert side_off(1e-7, 1e-7, 1e-7) == "neither"
    assert side_off(None, 1e-7, 1e-7) == ""


def test_nothing_and_nan_are_never_green():
    empty = np.zeros((0, 3), np.float32)
    assert compare("x", empty, empty, NOISE).verdict is Verdict.INCONCLUSIVE
    assert compare_exact("x", empty, empty).verdict is Verdict.INCONCLUSIVE
    assert compare_group("x", {}, {}, NOISE).verdict is Verdict.INCONCLUSIVE
    assert worst([]) is Verdict.INCONCLUSIVE
    nan = REFERENCE.copy()
    nan[0, 0] = np.nan
    assert compare("x", nan, nan, NOISE).verdict is Verdict.INCONCLUSIVE
    one = compare("x", nan, REFERENCE, NOISE)
    assert one.verdict is Verdict.DIVERGE
    assert "non-finite" in one.note


def test_unmatched_names_and_shapes_diverge_by_name():
    metric = compare_group("g", {"a": REFERENCE, "b": REFERENCE}, {"a": REFERENCE}, NOISE)
    assert metric.verdict is Verdict.DIVERGE
    assert metric.where == "b"
    assert "subject only" in metric.note
    metric = compare_group("g", {"a": REFERENCE}, {"a": REFERENCE[:4]}, NOISE)
    assert metric.verdict is Verdict.DIVERGE
    assert "shape" in metric.note


def test_a_group_speaks_of_its_worst_tensor():
    bad = REFERENCE.copy()
    bad[1, 1] += 1
    metric = compare_group("g", {"a": REFERENCE, "b": bad}, {"a": REFERENCE, "b": REFERENCE}, NOISE)
    assert (metric.verdict, metric.where) == (Verdict.DIVERGE, "b at (1, 1)")
    assert metric.total == 2 * REFERENCE.size


def test_series_name_their_first_divergent_step():
    loss = np.linspace(5, 1, 20)
    subject = loss.copy()
    subject[12:] += 1e-2
    metric = compare_series(
        "loss", subject, loss, Noise(exact=False, referee={"loss": loss + 1e-5})
    )
    assert (metric.verdict, metric.step) == (Verdict.DIVERGE, 13)
    assert compare_series("loss", loss, loss, NOISE).verdict is Verdict.IDENTICAL
    assert compare_series("loss", loss[:9], loss, NOISE).verdict is Verdict.DIVERGE
    assert "cut short" in compare_series("loss", loss[:9], loss, NOISE).note


def test_a_constant_series_is_named_and_not_green():
    flat = np.full(20, 0.7)
    metric = compare_series("norm", flat, flat, NOISE)
    assert metric.verdict is Verdict.INCONCLUSIVE
    assert "constant over all 20 steps" in metric.note


def test_noise_piles_up_along_a_trajectory_but_never_before_it_was_seen():
    loss = np.linspace(5, 1, 20)
    referee = loss.copy()
    referee[10:] += 1e-4
    noise = Noise(exact=False, referee={"loss": referee})
    late, early = loss.copy(), loss.copy()
    late[15] += 2e-4
    early[5] += 2e-4
    assert compare_series("loss", late, loss, noise).verdict is Verdict.AGREE
    assert compare_series("loss", early, loss, noise).verdict is Verdict.DIVERGE


def test_perturb_moves_by_one_ulp_and_leaves_integers():
    moved = perturb(REFERENCE, RNG)
    assert np.all(np.abs(moved - REFERENCE) <= np.spacing(np.abs(REFERENCE)))
    assert (moved != REFERENCE).all()
    ids = np.arange(5)
    assert perturb(ids, RNG) is ids
