"""Which modules `lora.target_modules` means, looked up in what a model really has."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from parity.errors import Unsupported
from parity.paths.measured import unknown
from parity.recipe import Recipe
from parity.trace import Trace


class NoTarget(Unsupported):
    """A target that nothing in the model is called; `others` are names that it has."""

    def __init__(self, message: str, others: Iterable[str]) -> None:
        super().__init__(message)
        self.others = list(others)


def targets(recipe: Recipe, names: Iterable[str], adaptable: Mapping[str, bool]) -> list[str]:
    """Those names, sorted, whose last part is a target.

    Args:
        recipe: Its `lora.target_modules` are last parts of names.
        names: Of what the model has.
        adaptable: Last parts of the names that can be a target, and whether they stand in a layer.

    Raises:
        NoTarget: A target that nothing is called.
    """
    wanted = set(recipe.lora.target_modules)
    found = sorted(name for name in names if name.rpartition(".")[2] in wanted)
    if missing := sorted(wanted - {name.rpartition(".")[2] for name in found}):
        raise NoTarget(
            f"the model has no modules {missing} (lora.target_modules); it has "
            f"{', '.join(sorted(adaptable))}",
            sorted(name for name, inside in adaptable.items() if inside),
        )
    return found


def config_without_targets(recipe: Recipe, config: Callable[[Recipe], Trace]) -> Trace:
    """The effective configuration, also where no adapter can be had as the recipe wants it.

    Then all that has nothing to do with the adapter is read with one on another module, and what has
    is `unknown`, with the reason.
    """
    try:
        return config(recipe)
    except NoTarget as error:
        if not error.others:
            raise
        trace = config(recipe.override({"lora.target_modules": error.others[:1]}))
        adapter = [name for name in trace.scalars if name.startswith("lora.")]
        trace.scalars |= dict.fromkeys([*adapter, "dtype.adapter"], unknown(error))
        return trace
