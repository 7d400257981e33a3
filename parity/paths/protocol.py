"""What a path is: a class with a method for each of `parity.paths.contract.METHODS`.

A path carries out a recipe with one implementation. Each method takes the recipe and the inputs of
one stage and returns a `Trace`; `parity contract` prints the inputs and outputs of each. What is not
implemented, and a factor that the path does not honour, raises `Unsupported`, which becomes a `skip`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from parity.errors import Unsupported
from parity.factors import Knobs
from parity.paths.contract import METHODS
from parity.recipe import Recipe
from parity.trace import Trace


class TrainingPath:
    """One implementation of recipes. Subclasses import their framework inside methods."""

    name: ClassVar[str]
    framework: ClassVar[str]
    """`mlx` or `torch`; two paths of one framework are expected bit-identical, `operations` aside."""
    operations: ClassVar[Mapping[str, str]] = {}
    """Stage → what is computed there otherwise than usual in the framework. Two paths of one
    framework that differ in it are expected to agree within the noise floor in that stage."""
    packages: ClassVar[tuple[str, ...]] = ()
    """Distributions whose versions belong to the environment of a trace."""
    honours: ClassVar[tuple[str, ...]] = ()
    """Factors that it carries out at any value, or refuses by itself; `lora.` is all of a section."""
    fixed: ClassVar[Mapping[str, Any]] = {}
    """Factors that it has no option for, with the one value that it always has."""
    documented: ClassVar[Mapping[str, Any]] = {}
    """Factor to the default that its documentation gives, where `documents` cannot read it."""
    knobs: ClassVar[type[Knobs] | None] = None
    """Factors that only it has; it honours all of them."""
    release: ClassVar[str] = ""
    """The one of them that `PATH@VERSION` names a release of; without one there is no such path."""
    without_dependencies: ClassVar[tuple[str, ...]] = ()
    """Those of them that run without what they require, which would not fit this machine."""
    hidden: ClassVar[tuple[str, ...]] = ()
    """Packages that its process cannot import: mlx-lm imports transformers, and that imports torch
    where it is installed, for 2 s and 180 MB of which no MLX path uses anything."""
    patches: ClassVar[bool] = False
    """Whether importing or using it changes functions of libraries that other paths use as well."""
    own_parts: ClassVar[tuple[str, ...]] = ()
    """Parts (see `parity.paths.parts`) that it trains with and can lend to another path."""
    takes_parts: ClassVar[tuple[str, ...]] = ()
    """Parts in whose place it trains with those of another path, where it is a hybrid."""
    stands_on: ClassVar[str] = ""
    """The path that all parts but `own_parts` are taken from; empty where they are all its own."""
    own_factors: ClassVar[tuple[str, ...]] = ()
    """Factors that its own code decides, whatever the recipe has. It is run all the same: what it does
    is compared with the reference, which carries out the recipe."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache

    @classmethod
    def alone(cls) -> bool:
        """Whether it changes its libraries, so that no other path may share its process."""
        return any(member.patches for member in cls.made_of())

    @classmethod
    def made_of(cls) -> tuple[type[TrainingPath], ...]:
        """The paths whose code it runs."""
        return (cls,)

    @classmethod
    def knob_types(cls) -> tuple[type[Knobs], ...]:
        """The knobs of the paths whose code it runs."""
        found = (member.knobs for member in cls.made_of())
        return tuple(dict.fromkeys(knobs for knobs in found if knobs is not None))

    @classmethod
    def refused(cls, recipe: Recipe) -> dict[str, str]:
        """Factors whose values it cannot carry out together, with the reason of each."""
        return {}

    def shipped(self) -> dict[str, Any]:
        """Factors as this path sets them by default, read from the live library."""
        return {}

    def documents(self) -> dict[str, Any]:
        """Factors as its documentation gives their defaults, read from the installed library."""
        return {}

    def defaults(self, recipe: Recipe, inputs: Trace) -> Trace:
        """`shipped()` or `documents()`, which need the framework, where captures run."""
        asked = inputs.scalars.get("documented", False)
        return Trace(scalars={**self.documents(), **self.documented} if asked else self.shipped())

    def emit(self, method: str, recipe: Recipe, inputs: Trace) -> Trace:
        """What a method of the contract, by name, emits."""
        trace: Trace = getattr(self, method)(recipe, inputs)
        return trace

    def environment(self) -> dict[str, Any]:
        """Versions, device and settings of the running process."""
        return {}


def _absent(name: str) -> Callable[[TrainingPath, Recipe, Trace], Trace]:
    """What stands for a method that a path does not implement."""

    def method(self: TrainingPath, recipe: Recipe, inputs: Trace) -> Trace:
        raise Unsupported(_no_method(self, name))

    method.__name__, method.__doc__ = name, f"{METHODS[name].summary.capitalize()}."
    return method


_ABSENT = {name: _absent(name) for name in METHODS if not hasattr(TrainingPath, name)}
for _name, _method in _ABSENT.items():
    setattr(TrainingPath, _name, _method)


def absent(kind: type[TrainingPath]) -> dict[str, str]:
    """Methods of the contract that a path does not implement, and what it says when they are called."""
    names = [name for name, method in _ABSENT.items() if getattr(kind, name) is method]
    return {name: _no_method(kind, name) for name in names}


def _no_method(path: TrainingPath | type[TrainingPath], name: str) -> str:
    return f"path {path.name!r} has no {name}"
