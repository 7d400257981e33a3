"""Which factors a divergence at a stage is likely to come from. It orders a search and decides nothing."""

from __future__ import annotations

from collections.abc import Iterable

from parity.paths.contract import METHODS
from parity.paths.parts import FILES, part_of
from parity.recipe import factor_names
from parity.stages import STAGES
from parity.trace import Trace

FIRST_READ, READ, OTHER = 16.0, 4.0, 1.0
"""Weights of a factor that no earlier stage reads, that earlier ones read as well, and of others."""


def likelihood(stage: str, factors: Iterable[str]) -> dict[str, float]:
    """Weight of each factor at a stage, from what the contract says that methods read.

    What an earlier stage reads as well would have shown there: it is less likely, not impossible.
    """
    names = [other.name for other in STAGES]
    earlier = names[: names.index(stage)] if stage in names else names
    reading = {method.stage: method for method in METHODS.values() if method.stage}
    # The first stage reads every factor and explains none.
    before = [reading[name] for name in earlier[1:] if name in reading]

    def weight(factor: str) -> float:
        if stage not in reading or not reading[stage].read(factor, Trace()):
            return OTHER
        return READ if any(method.read(factor, Trace()) for method in before) else FIRST_READ

    return {factor: weight(factor) for factor in factors}


def of_parts(stage: str, parts: Iterable[str]) -> dict[str, float]:
    """Weight of each part at a stage: that of the likeliest factor that it honours.

    One that honours none is used first where the adapter goes through it.
    """
    weights = likelihood(stage, factor_names())
    return {
        part: max(
            (w for name, w in weights.items() if part_of(name) == part),
            default=FIRST_READ if part in FILES else OTHER,
        )
        for part in parts
    }
