"""Factors that differ and have no effect on the subject at all: nobody need look for them in a divergence."""

from __future__ import annotations

from collections.abc import Iterable

from parity.capture.engine import Engine
from parity.errors import NO_ANSWER
from parity.paths.contract import METHODS
from parity.paths.registry import resolve
from parity.recipe import Recipe
from parity.trace import Trace

STEPS = 3  # of training that are compared


def silent(
    engine: Engine, subject: str, mine: Recipe, theirs: Recipe, names: Iterable[str]
) -> list[str]:
    """Runs the subject with the reference's value of each factor; those that change no bit, in words.

    Args:
        engine: Runs the subject.
        subject: Its path.
        mine: Its recipe.
        theirs: The reference's.
        names: Factors that are no cause.
    """
    short = mine.override({"train.steps": min(STEPS, mine.train.steps)})
    own = tuple(f"{knobs.section}." for knobs in resolve(subject).knob_types())
    values, found = theirs.with_knobs(mine.knob_types()).factors(), []
    for name in names:
        methods = [
            method
            for method in ("lora_init", "train")
            if (own and name.startswith(own)) or METHODS[method].read(name, Trace())
        ]
        if "train" not in methods or name == "train.steps":
            continue
        value = short.factors()[name]
        try:
            other = short.override({name: values[name]})
            equal = all(_equal(engine, subject, method, short, other) for method in methods)
        except NO_ANSWER:
            continue
        if equal:
            found.append(
                f"{name} = {value!r} against {values[name]!r} has no effect on {subject}: "
                f"{' and '.join(methods)} ({short.train.steps} steps) give the same arrays bit for bit"
            )
    return found


def _equal(engine: Engine, subject: str, method: str, a: Recipe, b: Recipe) -> bool:
    traces = (engine.capture(subject, method, recipe, Trace()) for recipe in (a, b))
    first, second = (Trace(trace.arrays) for trace in traces)
    return first.digest() == second.digest()
