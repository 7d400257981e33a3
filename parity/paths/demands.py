"""Factors are carried out or refused: what a recipe asks of a path that the path does not honour."""

from __future__ import annotations

from parity.errors import Unsupported
from parity.paths.contract import METHODS
from parity.paths.protocol import TrainingPath
from parity.recipe import Recipe
from parity.trace import Trace


def unmet(kind: type[TrainingPath], recipe: Recipe) -> dict[str, str]:
    """Factors of a recipe that a path does not carry out, each with the reason.

    A factor that the path has fixed must have this value. Any other must be honoured, unless it is
    at a neutral value. What a path says of factors together (`refused`) comes on top.
    """
    honoured = kind.honours + tuple(f"{knobs.section}." for knobs in kind.knob_types())
    found = {}
    for name, value in recipe.active().items():
        if name in kind.fixed:
            only = kind.fixed[name]
            if (list(only) if isinstance(only, tuple) else only) != value:
                found[name] = f"path {kind.name!r} always has {name}={only}, not {value}"
        elif not name.startswith(honoured) and not recipe.neutral(name):
            found[name] = f"path {kind.name!r} does not honour {name}={value}"
    return found | kind.refused(recipe)


def check(kind: type[TrainingPath], method: str, recipe: Recipe, inputs: Trace) -> None:
    """Refuses a call that would ignore a factor which the method reads.

    Raises:
        Unsupported: With each factor, its value and the reason.
    """
    reasons = [
        reason for name, reason in unmet(kind, recipe).items() if METHODS[method].read(name, inputs)
    ]
    if reasons:
        raise Unsupported("; ".join(dict.fromkeys(reasons)))
