"""Factors are carried out or refused: what a recipe asks of a path that the path does not honour."""

from __future__ import annotations

from parity.errors import Unsupported
from parity.paths.contract import METHODS
from parity.paths.protocol import TrainingPath, absent
from parity.recipe import Recipe
from parity.trace import Trace


def unmet(kind: type[TrainingPath], recipe: Recipe) -> dict[str, str]:
    """Factors of a recipe that a path does not carry out, each with the reason; empty: no option.

    A factor that the path has fixed must have this value. Any other must be honoured, unless it is
    at a neutral value, or the path's own code decides it: what that does is compared. What a path
    refuses by itself (`refused`) comes on top.
    """
    honoured = kind.honours + tuple(f"{knobs.section}." for knobs in kind.knob_types())
    honoured += kind.own_factors
    found = {}
    for name, value in recipe.active().items():
        if name in kind.fixed:
            only = kind.fixed[name]
            if (list(only) if isinstance(only, tuple) else only) != value:
                found[name] = f"path {kind.name!r} always has {name}={only}, not {value}"
        elif not name.startswith(honoured) and not recipe.neutral(name):
            found[name] = ""
    return found | kind.refused(recipe)


def check(kind: type[TrainingPath], method: str, recipe: Recipe, inputs: Trace) -> None:
    """Refuses a call of what a path has not, or that would ignore a factor which the method reads.

    Raises:
        Unsupported: With each factor, its value and the reason.
    """
    if why := absent(kind).get(method):
        raise Unsupported(why)
    factors = recipe.factors()
    found = {n: why for n, why in unmet(kind, recipe).items() if METHODS[method].read(n, inputs)}
    reasons = dict.fromkeys(why for why in found.values() if why)
    if ignored := [f"{name}={factors[name]}" for name, why in found.items() if not why]:
        reasons[f"path {kind.name!r} does not honour {', '.join(ignored)}"] = None
    if reasons:
        raise Unsupported("; ".join(reasons))
