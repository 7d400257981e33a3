"""A divergence is searched by the cheapest question that shows it, and what is found confirmed by the whole.

Training is asked in the fewest steps that show it. Where bits decide, no side is run once more for each
question, to see whether it repeats itself.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

from parity.bisect.minimize import Answer, CouldNotAsk, Search, Watch, minimize
from parity.bisect.result import FOUND
from parity.recipe import Recipe
from parity.record import Record, Verdict
from parity.stages.loss_curve import LossCurve
from parity.stages.pair import Extent

STEPS = "train.steps"


class Asked(NamedTuple):
    """How much of a cell is asked."""

    steps: int = 0
    """Of training; 0: as many as the recipe has."""
    extent: Extent = Extent.VERDICT


WHOLE = Asked()
Oracle = Callable[[frozenset[str], Asked], Answer]
"""Whether a set makes the runs differ, as far as it is asked."""


def cheapest(record: Record, recipe: Recipe, changed: Collection[str]) -> Asked:
    """What shows the divergence of a record, which was asked as a whole.

    Args:
        record: Of a cell that diverges.
        recipe: What it was run with.
        changed: Factors in which either side differs from it.
    """
    repeats_itself = not any(metric.why_floor for metric in record.metrics)
    extent = Extent.DIFFERENCE if repeats_itself else Extent.VERDICT
    return Asked(shortest(record, recipe, changed), extent)


def shortest(record: Record, recipe: Recipe, changed: Collection[str]) -> int:
    """The first step that diverges in a loss curve, where it comes in the first half of training; else 0.

    Args:
        record: Of a cell that diverges.
        recipe: What it was run with.
        changed: Factors in which either side differs from it: where the number of steps is one of
            them, none can be left out.
    """
    if record.stage != LossCurve.name:
        return 0  # what has steps elsewhere does not train
    bad = (m.step for m in record.metrics if m.gate and m.verdict is Verdict.DIVERGE and m.step)
    step = min(bad, default=0)
    return step if STEPS not in changed and 2 * step <= recipe.train.steps else 0


def minimal(
    names: Sequence[str],
    oracle: Oracle,
    cheap: Asked,
    recipe: Recipe,
    weights: Mapping[str, float] | None = None,
    repeats: int = 1,
    watch: Watch | None = None,
) -> Search:
    """Minimal sets of names, as `minimize` finds them.

    What is found cheaply is asked once more as a whole: each set alone, what is left of it without each
    of its members, and all others together. Where that does not hold, or nothing is found, all is asked
    as a whole.

    Args:
        names: What is searched.
        oracle: Says whether a set makes the runs differ.
        cheap: How much of a cell shows the divergence.
        recipe: Has the number of all steps.
        weights: How likely each is a cause.
        repeats: How often each question is asked.
        watch: Told of each question.
    """
    if cheap != WHOLE:
        found = minimize(names, lambda asked: oracle(asked, cheap), weights, repeats, watch)
        if found.verdict == FOUND and _confirmed(names, found, oracle):
            said = f"asked in {cheap.steps} steps of training, and confirmed in all {recipe.train.steps}"
            for entry in found.ledger:
                if entry.changes in found.causes and cheap.steps:
                    entry.evidence.append(said)
            return found
    return minimize(names, lambda asked: oracle(asked, WHOLE), weights, repeats, watch)


def _confirmed(names: Sequence[str], found: Search, oracle: Oracle) -> bool:
    rest = frozenset(names).difference(*found.causes)
    less = [frozenset(cause) - {name} for cause in found.causes if len(cause) > 1 for name in cause]
    try:
        return all(
            oracle(frozenset(cause), WHOLE) is Answer.DIVERGES for cause in found.causes
        ) and all(oracle(agreeing, WHOLE) is Answer.AGREES for agreeing in (*less, rest))
    except CouldNotAsk:
        return False
