"""Functions of a user, called with what their parameters name: live objects, and factors of a recipe.

What a function takes it carries out; a factor that it does not take is its own business.
"""

from __future__ import annotations

import difflib
import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from parity.errors import UsageError
from parity.recipe import Recipe, factor_names

_OTHER = {"seed": ("seed.value",), "learning_rate": ("optim.lr",)}
_VAGUE = ("name", "value", "data", "source", "weights", "placement")
"""Last parts of names that mean something else elsewhere."""
_ALPHA: Mapping[str, tuple[str, ...]] = {"alpha": ("lora.scale", "lora.rank")}


def parameter_names() -> dict[str, tuple[str, ...]]:
    """The name of a parameter → the factors that its value comes from.

    It is the last part of a factor's name where that is unique (`rank`), or both (`model_source`).
    """
    factors = [name for name in factor_names() if not name.startswith("decode.")]
    counts = Counter(name.partition(".")[2] for name in factors)
    found: dict[str, tuple[str, ...]] = {name.replace(".", "_"): (name,) for name in factors}
    for name in factors:
        if counts[short := name.partition(".")[2]] == 1 and short not in _VAGUE:
            found[short] = (name,)
    return {**found, **_OTHER, **_ALPHA}


def taken(
    function: Callable[..., Any], objects: Iterable[str], what: str, first: bool = False
) -> tuple[str, ...]:
    """The factors that a function takes.

    Args:
        function: Whose parameters are looked at.
        objects: Names of the live objects that it may take as well.
        what: The function in words, for the error.
        first: Whether its first parameter is given by its place, whatever its name.

    Raises:
        UsageError: A parameter without default that is neither a factor nor an object.
    """
    names, known, found = set(objects), parameter_names(), list[str]()
    for parameter in _parameters(function, what)[int(first) :]:
        name = parameter.name
        if name in known and name not in names:
            found += known[name]
        elif name not in names and parameter.default is parameter.empty:
            close = difflib.get_close_matches(name, [*names, *known], n=2, cutoff=0.5)
            hint = f": did you mean {' or '.join(close)}?" if close else ""
            raise UsageError(
                f"{what} takes {name!r}, which is neither a factor nor one of "
                f"{', '.join(sorted(names)) or 'no objects'}{hint}"
            )
    return tuple(dict.fromkeys(found))


def defaults(function: Callable[..., Any]) -> dict[str, Any]:
    """The factors that a function takes by a parameter with a default, with these values."""
    known = parameter_names()
    return {
        known[p.name][0]: p.default
        for p in _parameters(function, title(function))
        if p.name in known and p.name not in _ALPHA and p.default is not p.empty
    }


def call(
    function: Callable[..., Any],
    recipe: Recipe,
    objects: Mapping[str, Any],
    what: str,
    first: tuple[Any, ...] = (),
) -> Any:
    """Calls a function with the objects and factors that its parameters name."""
    factors, known = recipe.factors(), parameter_names()
    named = {}
    for parameter in _parameters(function, what)[len(first) :]:
        if parameter.name in objects:
            named[parameter.name] = objects[parameter.name]
        elif parameter.name in _ALPHA:
            named[parameter.name] = recipe.lora.scale * recipe.lora.rank
        elif parameter.name in known:
            value = factors[known[parameter.name][0]]
            named[parameter.name] = tuple(value) if isinstance(value, list) else value
    return function(*first, **named)


def _parameters(function: Callable[..., Any], what: str) -> list[inspect.Parameter]:
    try:
        found = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        raise UsageError(
            f"{what} has no signature that Python can read: wrap it in a function"
        ) from None
    return [p for p in found if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def title(function: Callable[..., Any]) -> str:
    """`module:name` of a function."""
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{getattr(function, '__module__', '?')}:{name}"
