"""A divergence of training is searched in the fewest steps that show it, and confirmed in all of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from parity.bisect.minimize import Answer, CouldNotAsk, Search, Watch, minimize
from parity.bisect.result import FOUND
from parity.recipe import Recipe
from parity.record import Record, Verdict
from parity.stages.loss_curve import LossCurve

STEPS = "train.steps"

Oracle = Callable[[frozenset[str], int], Answer]
"""Whether a set makes the runs differ in so many steps of training; 0: in the recipe's."""


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
    steps: int,
    recipe: Recipe,
    weights: Mapping[str, float] | None = None,
    repeats: int = 1,
    watch: Watch | None = None,
) -> Search:
    """Minimal sets of names, as `minimize` finds them.

    What is found in a few steps is asked once more under the recipe itself: each set alone, what is
    left of it without each of its members, and all others together. Where that does not hold, or nothing is found, all is asked under the recipe.

    Args:
        names: What is searched.
        oracle: Says whether a set makes the runs differ.
        steps: The few; 0: none.
        recipe: Has the number of all.
        weights: How likely each is a cause.
        repeats: How often each question is asked.
        watch: Told of each question.
    """
    if steps:
        found = minimize(names, lambda asked: oracle(asked, steps), weights, repeats, watch)
        if found.verdict == FOUND and _confirmed(names, found, oracle):
            said = f"asked in {steps} steps of training, and confirmed in all {recipe.train.steps}"
            for entry in found.ledger:
                if entry.changes in found.causes:
                    entry.evidence.append(said)
            return found
    return minimize(names, lambda asked: oracle(asked, 0), weights, repeats, watch)


def _confirmed(names: Sequence[str], found: Search, oracle: Oracle) -> bool:
    rest = frozenset(names).difference(*found.causes)
    less = [frozenset(cause) - {name} for cause in found.causes if len(cause) > 1 for name in cause]
    try:
        return all(
            oracle(frozenset(cause), 0) is Answer.DIVERGES for cause in found.causes
        ) and all(oracle(agreeing, 0) is Answer.AGREES for agreeing in (*less, rest))
    except CouldNotAsk:
        return False
