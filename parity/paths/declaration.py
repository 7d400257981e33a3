"""Whether a class declares a path as `TrainingPath` wants it, found before any work."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from parity import recipe as recipes
from parity.errors import UsageError
from parity.factors import Knobs
from parity.paths.contract import METHODS, STAGES
from parity.paths.parts import ALL
from parity.paths.protocol import TrainingPath
from parity.recipe import Recipe

CLOSE = 0.85
"""Similarity (Ratcliff and Obershelp, as difflib has it) from which on a name is a misspelling."""


def check(spec: str, found: Any) -> type[TrainingPath]:
    """The class, if it declares a path.

    Raises:
        UsageError: It is no path, or the first thing that is wrong with its declaration.
    """
    if not (isinstance(found, type) and issubclass(found, TrainingPath)):
        raise UsageError(f"{spec!r} is no subclass of parity.paths.protocol.TrainingPath")
    if wrong := _first_wrong(found):  # type: ignore[arg-type] # a class is hashable
        raise UsageError(f"path {spec!r}: {wrong}")
    return found


@cache  # a class is resolved for every capture
def _first_wrong(kind: type[TrainingPath]) -> str:
    return next(_wrong(kind), "")


def _wrong(kind: type[TrainingPath]) -> Iterator[str]:
    for attribute in ("name", "framework"):
        value = getattr(kind, attribute, None)
        if not isinstance(value, str) or not value:
            example = "'my-trainer'" if attribute == "name" else "'mlx' or 'torch'"
            yield f"it needs `{attribute}`, a string such as {example}, not {value!r}"
    sequences = (
        "packages",
        "honours",
        "hidden",
        "without_dependencies",
        "own_parts",
        "own_factors",
    )
    for attribute in sequences:
        value = getattr(kind, attribute)
        if not isinstance(value, tuple) or not all(isinstance(item, str) for item in value):
            yield f"`{attribute}` is a tuple of strings, not {value!r}"
            return
    for attribute in ("fixed", "operations", "documented"):
        if not isinstance(value := getattr(kind, attribute), Mapping):
            yield f"`{attribute}` is a mapping, not {value!r}"
            return
    knobs = kind.knobs
    if knobs is not None and not (
        isinstance(knobs, type)
        and issubclass(knobs, Knobs)
        and isinstance(getattr(knobs, "section", None), str)
    ):
        yield "`knobs` is a subclass of parity.factors.Knobs that names its `section`"
        return
    if knobs is not None and knobs.section in Recipe.model_fields:
        yield f"`knobs` cannot be called {knobs.section!r}: a section of every recipe is"
        return
    yield from _wrong_factors(kind)
    for stage in kind.operations:
        if stage not in STAGES:
            yield f"`operations` names the stage {stage!r}: stages are {', '.join(STAGES)}"
    for part in kind.own_parts:
        if part not in ALL:
            yield f"`own_parts` names {part!r}: parts are {', '.join(ALL)}"
    yield from _wrong_methods(kind)


def _wrong_factors(kind: type[TrainingPath]) -> Iterator[str]:
    known = recipes.kind_of(kind.knob_types())().factors()
    named = {"honours": kind.honours, "own_factors": kind.own_factors, "fixed": tuple(kind.fixed)}
    for attribute, names in named.items():
        for name in names:
            section = attribute != "fixed" and name.endswith(".")
            if name not in known and not (section and any(k.startswith(name) for k in known)):
                close = difflib.get_close_matches(name, known, n=2, cutoff=0.5)
                hint = f": did you mean {' or '.join(close)}?" if close else ""
                yield f"`{attribute}` names {name!r}, which is no factor{hint}"


def _wrong_methods(kind: type[TrainingPath]) -> Iterator[str]:
    for name in METHODS:
        try:
            inspect.signature(getattr(kind, name)).bind(None, None, None)
        except TypeError:
            yield f"`{name}` takes (self, recipe, inputs)"
        except ValueError:  # a callable without a signature
            continue
    own = (base for base in kind.__mro__ if base not in TrainingPath.__mro__)
    for name, value in ((n, v) for base in own for n, v in vars(base).items()):
        if name.startswith("_") or name in METHODS or hasattr(TrainingPath, name):
            continue
        if not inspect.isfunction(value):
            continue
        close = difflib.get_close_matches(name, METHODS, n=1, cutoff=CLOSE)
        if not close and [*inspect.signature(value).parameters][1:] == ["recipe", "inputs"]:
            close = difflib.get_close_matches(name, METHODS, n=1, cutoff=0.0)
        if close:
            yield (
                f"`{name}` is no method of a path: did you mean `{close[0]}`? "
                "(`parity contract` lists them; a helper's name begins with an underscore)"
            )
