"""Pass rates over seeds, and paired tests with the power they had.

No test here can show that two paths are the same. One that finds no difference gives
the number of seeds that would be needed to find one. Bad input raises ValueError.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import isqrt, sqrt
from numbers import Integral

import numpy as np

from parity.trace import Array

MOST_SEEDS = 10_000
NORMAL_975 = 1.959963984540054
"""Quantile of the standard normal distribution at 97.5 %."""


@dataclass(frozen=True, slots=True)
class Interval:
    """Two-sided 95 % confidence interval of a pass rate; both ends are fractions of 1."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class PairedTest:
    """Two-sided exact test that `b` events one way and `c` the other are equally likely."""

    b: int
    c: int
    exact_p: float


@dataclass(frozen=True, slots=True)
class PairedComparison:
    """Passes on the common `seeds`: `a` both, `b` subject only, `c` reference only, `d` neither.

    `power` and `seeds_needed` take the observed discordance for the true one: they plan the next
    run and are no evidence about this one (Hoenig & Heisey 2001). `seeds_needed` is None where b
    equals c or 10,000 seeds are too few; `discordance_upper` is None where a seed was discordant.
    """

    seeds: tuple[int, ...]
    a: int
    b: int
    c: int
    d: int
    test: PairedTest
    power: float
    seeds_needed: int | None
    discordance_upper: float | None
    summary: str


def check_count(name: str, value: int, upper: float = np.inf) -> None:
    """Refuses what is no whole number from 0 to `upper`, booleans included."""
    if not isinstance(value, Integral) or isinstance(value, bool) or not 0 <= value <= upper:
        raise ValueError(f"{name} = {value!r}: give a whole number from 0 to {upper:g}")


def check_fraction(name: str, value: float, upper: float = 1.0) -> None:
    """Refuses what is not strictly between 0 and `upper`, NaN included."""
    if not 0 < value < upper:
        raise ValueError(f"{name} = {value!r}: give a fraction above 0 and below {upper:g}")


def wilson(passes: int, n: int) -> Interval:
    """Wilson's interval: 95 % coverage on average (Wilson 1927; Brown, Cai & DasGupta 2001)."""
    check_count("n", n)
    check_count("passes", passes, n)
    if n == 0:
        raise ValueError("n = 0: no seed was run, so there is no pass rate; run at least one")
    p, z = passes / n, NORMAL_975
    scale = 2 * (n + z**2)
    center, half = (2 * n * p + z**2) / scale, z / scale * sqrt(4 * n * p * (1 - p) + z**2)
    return Interval(center - half if passes else 0.0, center + half if passes < n else 1.0)


def discordance_bound(n: int, confidence: float = 0.95) -> float:
    """One-sided upper bound on the discordance rate when none was seen in `n` seeds.

    Solves (1 - rate)^n = 1 - confidence (Clopper & Pearson 1934); 1.0 for n = 0.
    """
    check_count("n", n)
    check_fraction("confidence", confidence)
    return float(1 - (1 - confidence) ** (1 / n)) if n else 1.0


def mcnemar(b: int, c: int) -> PairedTest:
    """Exact McNemar test: a binomial test on the discordant pairs (McNemar 1947).

    It never exceeds its level, and needs 6 discordant pairs, all one way, for p < 0.05. Without any
    discordant pair the p-value is 1.
    """
    check_count("b", b)
    check_count("c", c)
    b, c = int(b), int(c)
    fewer, ways = 0, 1  # whole numbers: nothing is rounded
    for k in range(min(b, c) + 1):
        fewer += ways
        ways = ways * (b + c - k) // (k + 1)
    return PairedTest(b, c, min(1.0, 2 * fewer / 2 ** (b + c)))


def mcnemar_power(
    p_subject_only: float,
    p_reference_only: float,
    n: int,
    alpha: float = 0.05,
) -> float:
    """Unconditional power of the two-sided test with `n` seeds, as an exact sum.

    The number of discordant seeds is binomial in n and its split binomial in that number. Either
    direction rejects, so equal probabilities give the false-positive rate.
    """
    check_count("n", n)
    check_fraction("alpha", alpha, 0.5)
    rate = p_subject_only + p_reference_only
    if not (p_subject_only >= 0 and p_reference_only >= 0 and rate < 1 + 1e-9):
        given = f"p_subject_only = {p_subject_only!r}, p_reference_only = {p_reference_only!r}"
        raise ValueError(f"{given}: give two probabilities whose sum is at most 1")
    if n == 0 or rate == 0:
        return 0.0
    share, rate = p_subject_only / rate, min(rate, 1.0)
    spread = 9 * sqrt(n * rate * (1 - rate)) + 40  # beyond lies less than rounding error
    first, last = max(0, int(n * rate - spread)), min(n, int(n * rate + spread) + 1)
    rejected = _rejected(share, alpha, 1 << last.bit_length())[first : last + 1]
    return float(np.sum(_binomial(np.arange(first, last + 1), n, rate) * rejected))


@lru_cache(maxsize=256)
def _rejected(share: float, alpha: float, size: int) -> Array:
    """Chance that so many discordant pairs (the index) are rejected, `share` of them one way."""
    from scipy.special import bdtr, bdtrc, bdtrik  # a tenth of what scipy.stats takes to import

    pairs = np.arange(size)
    # The largest minority count that is still rejected is near this quantile.
    near = np.maximum(np.ceil(bdtrik(alpha / 2, pairs, 0.5)), 0)
    k = near + 1
    for _ in range(3):  # down to a count that is rejected
        k = np.where((k >= 0) & (2 * bdtr(np.maximum(k, 0), pairs, 0.5) > alpha), k - 1, k)
    fewer = np.where(k >= 0, bdtr(np.maximum(k, 0), pairs, share), 0.0)
    more = np.where(k >= 0, bdtrc(np.maximum(pairs - k - 1, 0), pairs, share), 0.0)
    found: Array = fewer + more
    return found


def _binomial(k: Array, n: int, rate: float) -> Array:
    """Chance of k of n."""
    from scipy.special import gammaln, xlog1py, xlogy

    choose = gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)
    chance: Array = np.exp(choose + xlogy(k, rate) + xlog1py(n - k, -rate))
    return chance


def seeds_for_power(
    p_subject_only: float,
    p_reference_only: float,
    power: float = 0.8,
    alpha: float = 0.05,
) -> int | None:
    """Smallest number of seeds from which on the power is `power` or more.

    The power saw-tooths where nearly every seed is discordant: fewer seeds may reach it and one
    more fall short again. That it stays is checked for 20 + 4 sqrt(n) seeds more. None where
    both probabilities are equal or 10,000 seeds are too few.
    """
    check_fraction("power", power)
    difference, rate = abs(p_subject_only - p_reference_only), p_subject_only + p_reference_only
    if difference == 0 or _about(difference, rate, power, alpha) > 2 * MOST_SEEDS:
        return None

    def reached(n: int) -> bool:
        return mcnemar_power(p_subject_only, p_reference_only, n, alpha) >= power

    low, high = 0, 1
    while not reached(high):
        low, high = high, 2 * high
        if low > MOST_SEEDS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    seeds = high + 20 + 4 * isqrt(high)
    while reached(seeds - 1):
        seeds -= 1
    return seeds if seeds <= MOST_SEEDS else None


def _about(difference: float, rate: float, power: float, alpha: float) -> float:
    """The number of seeds by the normal approximation (Miettinen 1968; Connor 1987)."""
    from scipy.special import ndtri

    spread = sqrt(max(rate - difference**2, 0.0))
    return float((ndtri(1 - alpha / 2) * sqrt(rate) + ndtri(power) * spread) / difference) ** 2


def paired(
    subject_passes: Mapping[int, bool], reference_passes: Mapping[int, bool], alpha: float = 0.05
) -> PairedComparison:
    """Compare pass or fail, keyed by seed, by the exact McNemar test on the common seeds."""
    for side, passes in (("subject", subject_passes), ("reference", reference_passes)):
        for seed, passed in passes.items():
            if not isinstance(passed, bool | np.bool_):
                raise ValueError(f"{side}_passes[{seed!r}] = {passed!r}: give True or False")
    seeds = tuple(sorted(subject_passes.keys() & reference_passes.keys()))
    no_subject = tuple(sorted(reference_passes.keys() - subject_passes.keys()))
    no_reference = tuple(sorted(subject_passes.keys() - reference_passes.keys()))
    n = len(seeds)
    count = Counter((bool(subject_passes[s]), bool(reference_passes[s])) for s in seeds)
    a, b, c, d = (count[x, y] for x in (True, False) for y in (True, False))
    test, rates = mcnemar(b, c), (b / max(n, 1), c / max(n, 1))
    power, needed = mcnemar_power(*rates, n, alpha), seeds_for_power(*rates, alpha=alpha)
    upper = None if b + c else discordance_bound(n, 1 - alpha)

    text = f"subject {a + b}/{n}, reference {a + c}/{n} on the same seeds; "
    text += f"discordant {b} vs {c}; exact McNemar p = {test.exact_p:.2g}"
    if n == 0:
        text = "no seed in common, nothing was compared: no claim either way"
    elif test.exact_p <= alpha:
        text += f": the subject passes {'more' if b > c else 'less'} often"
    elif upper is not None:
        text += f"; the true discordance may be up to {upper:.0%} (one-sided {1 - alpha:.0%} bound)"
        text += ": no claim either way"
    else:
        wanted = f"about {needed}" if needed else "more than 10000"
        text += f"; {n} seeds had about {power:.0%} power; {wanted} seeds would be needed for 80%"
        text += " - underpowered: no claim either way"
    for side, missing in (("subject", no_subject), ("reference", no_reference)):
        text += f"; {side} lacks seeds {', '.join(map(str, missing))}" if missing else ""
    found = (test, power, needed, upper, text.replace("%", " %"))
    return PairedComparison(seeds, a, b, c, d, *found)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p-values of a family of tests after Holm's step-down correction (Holm 1979), in their order."""
    for name, p in p_values.items():
        if not 0 <= p <= 1:
            raise ValueError(f"p_values[{name!r}] = {p!r}: give a p-value from 0 to 1")
    adjusted, highest = dict.fromkeys(p_values, 0.0), 0.0
    for rank, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * float(p_values[name])))
        adjusted[name] = highest
    return adjusted
