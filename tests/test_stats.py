"""The statistics hold the level, the power and the coverage that they state.

Coverage, levels and powers are summed over every outcome; sampling is used once, as a check of
those sums by a way that shares no code with them.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import binom, multinomial

from parity.results import statistics as stats
from parity.results.series import series_over_seeds

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar
    from statsmodels.stats.multitest import multipletests
    from statsmodels.stats.proportion import proportion_confint

RATES = np.linspace(0, 1, 401)


def coverage(n: int) -> np.ndarray:
    """Probability, at each of RATES, that the interval from n seeds holds the true rate."""
    passes = np.arange(n + 1)
    found = [stats.wilson(int(k), n) for k in passes]
    low = np.array([i.low for i in found])[:, None]
    high = np.array([i.high for i in found])[:, None]
    inside = (low <= RATES + 1e-12) & (high >= RATES - 1e-12)
    return (binom.pmf(passes[:, None], n, RATES) * inside).sum(0)


@pytest.fixture(scope="module")
def p_values() -> np.ndarray:
    """p[b, c] of the test itself, for up to 45 discordant seeds."""
    size = 46
    table = np.ones((size, size))
    for b in range(size):
        for c in range(size - b):
            table[b, c] = stats.mcnemar(b, c).exact_p
    return table


def enumerated_power(p: np.ndarray, p10: float, p01: float, n: int, alpha: float) -> float:
    """Sum the probability of every (b, c) that the test rejects."""
    b, c = np.nonzero(p[: n + 1, : n + 1] <= alpha)
    keep = b + c <= n
    b, c = b[keep], c[keep]
    outcomes = np.stack([b, c, n - b - c], axis=1)
    return float(multinomial.pmf(outcomes, n, [p10, p01, max(0.0, 1 - p10 - p01)]).sum())


# Intervals


@pytest.mark.parametrize("n", [5, 15, 30, 59, 100])
def test_wilson_covers_nominally_on_average(n: int) -> None:
    assert coverage(n).mean() == pytest.approx(0.95, abs=0.01)


@pytest.mark.parametrize(("passes", "n"), [(0, 5), (7, 15), (10, 15), (15, 15), (3, 59)])
def test_intervals_agree_with_statsmodels(passes: int, n: int) -> None:
    found = stats.wilson(passes, n)
    low, high = proportion_confint(passes, n, alpha=0.05, method="wilson")
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-9)


def test_discordance_bound_is_the_rate_at_which_silence_has_5_percent() -> None:
    bounds = {n: stats.discordance_bound(n) for n in (5, 15, 59)}
    assert {n: round(100 * x) for n, x in bounds.items()} == {5: 45, 15: 18, 59: 5}
    for n, bound in bounds.items():
        assert binom.pmf(0, n, bound) == pytest.approx(0.05)
        _, upper = proportion_confint(0, n, alpha=0.1, method="beta")
        assert bound == pytest.approx(upper)
    assert stats.discordance_bound(0) == 1.0


# McNemar


@pytest.mark.parametrize(("b", "c"), [(5, 2), (0, 0), (0, 6), (3, 3), (1, 7), (40, 20)])
def test_exact_mcnemar_agrees_with_statsmodels(b: int, c: int) -> None:
    theirs = 1.0 if b == c == 0 else statsmodels_mcnemar([[4, b], [c, 4]], exact=True).pvalue
    assert stats.mcnemar(b, c).exact_p == pytest.approx(theirs)


def test_discordant_pairs_needed_to_reject() -> None:
    assert stats.mcnemar(5, 0).exact_p > 0.05 >= stats.mcnemar(6, 0).exact_p


@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.1])
def test_exact_mcnemar_false_positives_never_exceed_alpha(
    p_values: np.ndarray, alpha: float
) -> None:
    for n in (5, 6, 15, 30, 45):
        for discordance in np.linspace(0.02, 1, 25):
            half = discordance / 2
            assert enumerated_power(p_values, half, half, n, alpha) <= alpha


@pytest.mark.parametrize("alpha", [0.05, 0.0625, 0.01])  # 5 vs 0 has exactly p = 0.0625
def test_power_is_the_sum_over_every_outcome(p_values: np.ndarray, alpha: float) -> None:
    p = p_values
    for n in (1, 5, 6, 15, 45):
        for p10, p01 in ((0.33, 0.13), (0.2, 0.0), (0.0, 0.5), (0.5, 0.5), (0.9, 0.1), (1.0, 0.0)):
            ours = stats.mcnemar_power(p10, p01, n, alpha)
            assert ours == pytest.approx(enumerated_power(p, p10, p01, n, alpha), abs=1e-12)


@pytest.mark.parametrize(
    ("p10", "p01", "n"), [(1 / 3, 2 / 15, 15), (0.33, 0.13, 96), (0.2, 0.05, 92), (0.05, 0.2, 40)]
)
def test_power_is_within_2_points_of_simulation(p10: float, p01: float, n: int) -> None:
    drawn = np.random.default_rng(3407).multinomial(n, [p10, p01, 1 - p10 - p01], size=20_000)
    outcomes, times = np.unique(drawn[:, :2], axis=0, return_counts=True)
    tests = [stats.mcnemar(int(b), int(c)) for b, c in outcomes]
    p = np.array([t.exact_p for t in tests])
    simulated = times[p <= 0.05].sum() / times.sum()
    assert stats.mcnemar_power(p10, p01, n) == pytest.approx(simulated, abs=0.02)


def test_published_seed_counts() -> None:
    """.33/.13 are 5/15 and 2/15: unrounded they take 96 seeds, the rounded figures take 95."""
    assert stats.seeds_for_power(5 / 15, 2 / 15) == 96
    assert stats.seeds_for_power(0.33, 0.13) == 95
    assert stats.mcnemar_power(0.33, 0.13, 96) >= 0.8
    assert stats.seeds_for_power(0.20, 0.0) == 39
    assert stats.seeds_for_power(0.20, 0.05) == 92


@pytest.mark.parametrize(
    ("p10", "p01"), [(0.8, 0.2), (0.7, 0.3), (1.0, 0.0), (0.5, 0.2), (0.05, 0.3), (0.65, 0.33)]
)
def test_seeds_for_power_is_where_the_power_stays(p10: float, p01: float) -> None:
    reached = [stats.mcnemar_power(p10, p01, n) >= 0.8 for n in range(300)]
    last_short = max(n for n, enough in enumerate(reached) if not enough)
    assert stats.seeds_for_power(p10, p01) == last_short + 1 < 250


def test_seeds_for_power_passes_over_a_saw_tooth() -> None:
    assert stats.mcnemar_power(0.8, 0.2, 20) >= 0.8 > stats.mcnemar_power(0.8, 0.2, 22)
    assert stats.seeds_for_power(0.8, 0.2) == 23


def test_no_number_of_seeds_for_no_or_a_minute_effect() -> None:
    assert stats.seeds_for_power(0.2, 0.2) is None
    assert stats.seeds_for_power(0.0, 0.0) is None
    assert stats.seeds_for_power(0.055, 0.05) is None


# Paired comparison


def sides(a: int, b: int, c: int, d: int) -> tuple[dict[int, bool], dict[int, bool]]:
    subject = [True] * (a + b) + [False] * (c + d)
    reference = [True] * a + [False] * b + [True] * c + [False] * d
    return dict(enumerate(subject)), dict(enumerate(reference))


def test_known_case_10_of_15_against_7_of_15() -> None:
    found = stats.paired(*sides(5, 5, 2, 3))
    assert (found.a, found.b, found.c, found.d) == (5, 5, 2, 3)
    assert found.test.exact_p == pytest.approx(0.4531, abs=5e-5)
    assert found.power == pytest.approx(0.10, abs=0.005)
    assert found.seeds_needed == 96
    assert found.discordance_upper is None
    assert found.test.exact_p > 0.05
    assert found.summary == (
        "subject 10/15, reference 7/15 on the same seeds; discordant 5 vs 2; exact McNemar "
        "p = 0.45; 15 seeds had about 10 % power; about 96 seeds would be needed for 80 % - "
        "underpowered: no claim either way"
    )


def test_only_common_seeds_count_and_the_others_are_named() -> None:
    subject, reference = sides(5, 5, 2, 3)
    found = stats.paired(subject | {3407: True, 42: False}, reference | {7_000: True})
    assert found.seeds == tuple(range(15))
    assert "subject lacks seeds 7000; reference lacks seeds 42, 3407" in found.summary
    assert found.test == stats.paired(subject, reference).test


def test_no_seed_in_common_is_no_result() -> None:
    found = stats.paired({1: True}, {2: True})
    assert (found.seeds, found.test.exact_p, found.power) == ((), 1.0, 0.0)
    assert found.discordance_upper == 1.0
    assert "nothing was compared" in found.summary
    assert "subject lacks seeds 2; reference lacks seeds 1" in found.summary


def test_no_discordance_states_how_much_may_be_hidden() -> None:
    found = stats.paired(*sides(10, 0, 0, 5))
    assert found.discordance_upper == pytest.approx(0.181, abs=5e-4)
    assert found.test.exact_p > 0.05
    assert "may be up to 18 % (one-sided 95 % bound)" in found.summary


@pytest.mark.parametrize(("b", "c", "word"), [(6, 0, "more"), (1, 12, "less")])
def test_a_difference_is_claimed_with_its_direction(b: int, c: int, word: str) -> None:
    found = stats.paired(*sides(3, b, c, 3))
    assert found.test.exact_p <= 0.05
    assert f"subject passes {word} often" in found.summary


def test_never_claims_sameness() -> None:
    claim = re.compile(r"\b(agree|identical|equal|equivalent|no difference|the same as)\b")
    for b, more, concordant in np.ndindex(5, 8, 2):
        found = stats.paired(*sides(3 * concordant, b, b + more, concordant))
        assert not claim.search(found.summary), found.summary
        if found.test.exact_p > 0.05:
            assert "no claim either way" in found.summary
            assert found.seeds_needed is None or found.seeds_needed > len(found.seeds)


# Holm


@pytest.mark.parametrize(
    "p",
    [(0.01, 0.04, 0.03, 0.005), (0.02, 0.02, 0.02), (0.9, 0.8), (0.0, 1.0, 0.05), (0.05,)],
)
def test_holm_agrees_with_statsmodels_and_keeps_names(p: tuple[float, ...]) -> None:
    named = {f"probe {i}": x for i, x in enumerate(p)}
    found = stats.holm(named)
    _, adjusted, *_ = multipletests(p, 0.05, method="holm")
    assert list(found) == list(named)
    assert list(found.values()) == pytest.approx(list(adjusted))


def test_holm_of_nothing_is_nothing() -> None:
    assert stats.holm({}) == {}


# Guards


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: stats.wilson(3, 0), "passes = 3"),
        (lambda: stats.wilson(0, 0), "n = 0: no seed was run"),
        (lambda: stats.wilson(16, 15), "passes = 16: give a whole number from 0 to 15"),
        (lambda: stats.wilson(-1, 15), "passes = -1"),
        (lambda: stats.wilson(1.5, 15), "passes = 1.5"),
        (lambda: stats.wilson(True, 15), "passes = True"),
        (lambda: stats.discordance_bound(-5), "n = -5"),
        (lambda: stats.discordance_bound(5, 1.0), "confidence = 1.0"),
        (lambda: stats.mcnemar(-1, 2), "b = -1"),
        (lambda: stats.mcnemar(1, 2.5), "c = 2.5"),
        (lambda: stats.mcnemar_power(0.8, 0.3, 15), "p_subject_only = 0.8, p_reference_only = 0.3"),
        (lambda: stats.mcnemar_power(-0.1, 0.3, 15), "p_subject_only = -0.1"),
        (lambda: stats.mcnemar_power(float("nan"), 0.3, 15), "p_subject_only = nan"),
        (lambda: stats.mcnemar_power(0.1, 0.3, -15), "n = -15"),
        (lambda: stats.mcnemar_power(0.1, 0.3, 15, alpha=0.5), "alpha = 0.5"),
        (lambda: stats.seeds_for_power(0.1, 0.3, power=80), "power = 80: give a fraction"),
        (lambda: stats.seeds_for_power(0.9, 0.3), "p_subject_only = 0.9"),
        (lambda: stats.paired({7: 1}, {7: True}), "subject_passes[7] = 1: give True or False"),
        (lambda: stats.paired({7: True}, {7: None}), "reference_passes[7] = None"),
        (lambda: stats.holm({"probe 05": 1.2}), "p_values['probe 05'] = 1.2"),
        (lambda: stats.holm({"probe 05": float("nan")}), "p_values['probe 05'] = nan"),
        (lambda: series_over_seeds({}), "diffs = {}"),
        (lambda: series_over_seeds({7: [[1.0]]}), "seed 7: (1, 1) differences"),
        (lambda: series_over_seeds({7: [1.0]}, {}), "(0,) values"),
        (lambda: series_over_seeds({7: [1.0]}, steps=-1), "steps = -1"),
    ],
)
def test_wrong_use_names_the_value_and_the_fix(call: Callable[[], object], named: str) -> None:
    with pytest.raises(ValueError, match=re.escape(named)) as error:
        call()
    assert re.search(r"give|run at least", str(error.value))


def test_results_are_frozen_and_slotted() -> None:
    found = stats.wilson(1, 2)
    with pytest.raises(AttributeError):
        found.low = 0.0
    assert not hasattr(found, "__dict__")
