"""The class of a hybrid: a path with parts of other paths in the place of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from parity.paths import parts
from parity.paths.protocol import TrainingPath
from parity.recipe import Recipe, factor_names


def compose(
    name: str, base: type[TrainingPath], donors: Mapping[str, type[TrainingPath]]
) -> type[TrainingPath]:
    """A subclass of `base` that takes parts from other paths.

    Args:
        name: `PATH+PART=PATH+…`.
        base: The path named first, whose loop and order of set-up stay.
        donors: Part to the path that it is taken from.
    """
    members = (base, *donors.values())
    kind: Any = base

    class Hybrid(kind):  # type: ignore[misc]
        packages: ClassVar[tuple[str, ...]] = tuple(
            dict.fromkeys(package for member in members for package in member.packages)
        )
        fixed: ClassVar[Mapping[str, Any]] = _each(
            base.fixed, {part: donor.fixed for part, donor in donors.items()}
        )
        honours: ClassVar[tuple[str, ...]] = tuple(
            _each(
                _named(base.honours),
                {part: _named(donor.honours) for part, donor in donors.items()},
            )
        )
        own_factors: ClassVar[tuple[str, ...]] = tuple(
            _each(
                _named(base.own_factors),
                {part: _named(donor.own_factors) for part, donor in donors.items()},
            )
        )
        own_parts: ClassVar[tuple[str, ...]] = base.own_parts
        takes_parts: ClassVar[tuple[str, ...]] = base.takes_parts

        def __init__(self, cache: Path) -> None:
            super().__init__(cache)
            made = {donor: donor(cache) for donor in set(donors.values())}
            self.donors = {part: made[donor] for part, donor in donors.items()}

        @classmethod
        def made_of(cls) -> tuple[type[TrainingPath], ...]:
            return members

        @classmethod
        def refused(cls, recipe: Recipe) -> dict[str, str]:
            """Each factor as the path that honours it has it."""
            theirs = {part: donor.refused(recipe) for part, donor in donors.items()}
            return _each(base.refused(recipe), theirs)

        def shipped(self) -> dict[str, Any]:
            """Each factor as the path that honours it sets it."""
            theirs = {part: donor.shipped() for part, donor in self.donors.items()}
            return _each(super().shipped(), theirs)

    Hybrid.name = name
    return Hybrid


def _named(prefixes: tuple[str, ...]) -> dict[str, None]:
    """The factors that begin with one of these, one by one."""
    return {name: None for name in factor_names() if prefixes and name.startswith(prefixes)}


def _each(own: Mapping[str, Any], donors: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Each factor as the path that honours it has it; `donors` holds a mapping a part."""
    kept = {factor: value for factor, value in own.items() if parts.part_of(factor) not in donors}
    return kept | {
        factor: value
        for part, theirs in donors.items()
        for factor, value in theirs.items()
        if parts.part_of(factor) == part
    }
