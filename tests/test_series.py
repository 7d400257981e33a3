"""Step-for-step differences over seeds: what is cut short, constant or not finite is named."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from parity.results.series import series_over_seeds

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from statsmodels.stats.descriptivestats import sign_test


def wave(scale: float, shift: float = 0.0, steps: int = 8) -> list[float]:
    return [scale * (-1) ** i * (i + 1) + shift for i in range(steps)]


def test_series_magnitude_and_first_divergent_step() -> None:
    found = series_over_seeds({2: wave(0.2), 1: wave(0.1), 3: wave(0.3)}, 0.5)
    assert found.steps == 8
    assert found.complete == (1, 2, 3)
    assert found.max_abs == pytest.approx({1: 0.8, 2: 1.6, 3: 2.4})
    assert found.quartiles == pytest.approx((1.2, 1.6, 2.0))
    assert found.first_divergent == {1: 6, 2: 3, 3: 2}
    assert found.problems == ()
    assert series_over_seeds({1: wave(0.1)}, 0.9).first_divergent == {1: None}


def test_series_tolerance_by_step_and_by_seed() -> None:
    d = {1: [0.0, 1.0, -2.0], 2: [0.0, 1.0, -2.0]}
    assert series_over_seeds(d, [0, 1, 1.5]).first_divergent == {1: 3, 2: 3}
    by_seed = series_over_seeds(d, {1: 2.0, 2: [0.0, 0.5, 2.0]})
    assert by_seed.first_divergent == {1: None, 2: 2}


@pytest.mark.parametrize(
    ("shifts", "systematic"),
    [
        ([1, 2, 3, 4, 5, 6], True),
        ([-1, -2, -3, -4, -5, -6, 0], True),
        ([1, 2, 3, 4, 5], False),
        ([1, 2, 3, 4, 5, -6], False),
        ([0, 0, 0], False),
    ],
)
def test_series_sign_is_tested_over_seeds(shifts: list[float], systematic: bool) -> None:
    diffs = {i: [s - 10.0, s + 10.0] for i, s in enumerate(shifts)}
    found = series_over_seeds(diffs, 100.0)
    assert found.systematic is systematic
    assert (found.sign.b, found.sign.c) == (sum(s > 0 for s in shifts), sum(s < 0 for s in shifts))
    if any(shifts):
        assert found.sign.exact_p == pytest.approx(sign_test(shifts)[1])
    else:
        assert found.sign.exact_p == 1.0


def test_series_truncated_is_named_and_left_out() -> None:
    found = series_over_seeds({1: wave(1), 2: wave(9, steps=5), 3: []}, 100.0)
    assert found.complete == (1,)
    assert found.quartiles == pytest.approx((8, 8, 8))
    assert found.problems == (
        "seed 2: truncated, 5 of 8 steps",
        "seed 3: truncated, 0 of 8 steps",
    )
    assert found.first_divergent == {1: None, 2: None, 3: None}


@pytest.mark.parametrize("how", [{"tolerance": [9.0] * 10}, {"tolerance": 9.0, "steps": 10}])
def test_series_all_cut_at_the_same_step_are_named(how: dict[str, object]) -> None:
    found = series_over_seeds({1: wave(1), 2: wave(1)}, **how)
    assert found.complete == ()
    assert found.quartiles is None
    assert not found.systematic
    assert len(found.problems) == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_series_non_finite_is_named_divergent_and_left_out(value: float) -> None:
    found = series_over_seeds({1: [0.0, 1.0, value, 1.0], 2: [0.0, 1.0, 2.0, 1.0]}, 100.0)
    assert found.problems == (f"seed 1: not finite at step 3, value {value}",)
    assert found.first_divergent == {1: 3, 2: None}
    assert found.complete == (2,)
    assert not np.isfinite(found.max_abs[1])


def test_series_constant_metric_is_named() -> None:
    zero = {1: [0.0] * 4}
    named = ("seed 1: constant over 4 steps, was it measured?",)
    assert series_over_seeds(zero, 0.0).problems == named
    assert series_over_seeds(zero, 0.0, metric={1: [2.0] * 4}).problems == named
    assert series_over_seeds(zero, 0.0, metric={1: [4.0, 3.0, 2.0, 1.0]}).problems == ()
    assert series_over_seeds({1: wave(1)}, 9.0, metric={1: [2.0] * 8}).problems
