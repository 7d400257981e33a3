"""Which modules `lora.target_modules` means, looked up in what a model really has."""

from __future__ import annotations

from collections.abc import Iterable

from parity.errors import Unsupported
from parity.recipe import Recipe


def targets(recipe: Recipe, names: Iterable[str], adaptable: Iterable[str]) -> list[str]:
    """Those names, sorted, whose last part is a target.

    Args:
        recipe: Its `lora.target_modules` are last parts of names.
        names: Of what the model has.
        adaptable: Last parts of the names that can be a target, for the error.

    Raises:
        Unsupported: A target that nothing is called.
    """
    wanted = set(recipe.lora.target_modules)
    found = sorted(name for name in names if name.rpartition(".")[2] in wanted)
    if missing := sorted(wanted - {name.rpartition(".")[2] for name in found}):
        there = ", ".join(sorted(set(adaptable)))
        raise Unsupported(
            f"the model has no modules {missing} (lora.target_modules); it has {there}"
        )
    return found
