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


def test_series_magnitude() -> None:
    found = series_over_seeds({2: wave(0.2), 1: wave(0.1), 3: wave(0.3)})
    assert found.steps == 8
    assert found.complete == (1, 2, 3)
    assert found.max_abs == pytest.approx({1: 0.8, 2: 1.6, 3: 2.4})
    assert found.median == pytest.approx(1.6)
    assert found.problems == ()


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
    found = series_over_seeds(diffs)
    assert found.systematic is systematic
    assert (found.sign.b, found.sign.c) == (sum(s > 0 for s in shifts), sum(s < 0 for s in shifts))
    if any(shifts):
        assert found.sign.exact_p == pytest.approx(sign_test(shifts)[1])
    else:
        assert found.sign.exact_p == 1.0


def test_series_truncated_is_named_and_left_out() -> None:
    found = series_over_seeds({1: wave(1), 2: wave(9, steps=5), 3: []})
    assert found.complete == (1,)
    assert found.median == pytest.approx(8)
    assert found.problems == (
        "seed 2: truncated, 5 of 8 steps",
        "seed 3: truncated, 0 of 8 steps",
    )


def test_series_all_cut_at_the_same_step_are_named() -> None:
    found = series_over_seeds({1: wave(1), 2: wave(1)}, steps=10)
    assert found.complete == ()
    assert np.isnan(found.median)
    assert not found.systematic
    assert len(found.problems) == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_series_non_finite_is_named_and_left_out(value: float) -> None:
    found = series_over_seeds({1: [0.0, 1.0, value, 1.0], 2: [0.0, 1.0, 2.0, 1.0]})
    assert found.problems == (f"seed 1: not finite at step 3, value {value}",)
    assert found.complete == (2,)
    assert not np.isfinite(found.max_abs[1])


def test_series_constant_metric_is_named() -> None:
    zero = {1: [0.0] * 4}
    named = ("seed 1: constant over 4 steps, was it measured?",)
    assert series_over_seeds(zero).problems == named
    assert series_over_seeds(zero, {1: [2.0] * 4}).problems == named
    assert series_over_seeds(zero, {1: [4.0, 3.0, 2.0, 1.0]}).problems == ()
    assert series_over_seeds({1: wave(1)}, {1: [2.0] * 8}).problems
