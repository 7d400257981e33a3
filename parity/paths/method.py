"""One method of a path: its inputs and outputs, and the factors that it reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from parity.errors import UsageError
from parity.paths.schema import Bindings, Spec, shortened, violations
from parity.recipe import Recipe, build
from parity.trace import Trace

SCOPED = ("seed", "mask", "optim", "train", "decode")
"""Sections of a recipe that a method is given as far as it reads them. Model, data, adapter and knobs stay
as they are: not every path can load another model, nor every model take the default adapter."""


class ContractError(Exception):
    """The output of a method does not fit its schema; the message names each item."""


@dataclass(frozen=True)
class Method:
    """One method of a path: `method(recipe, inputs) -> Trace`.

    Attributes:
        name: Its name.
        stage: The stage that judges it; empty where it only serves others.
        summary: A phrase.
        inputs: Schema of its inputs.
        outputs: Schema of what it returns.
        reads: Factors, or prefixes of factors, that may change what it emits.
        ignores: Those among them that do not.
        without: Group of optional inputs to the factors that it reads only without these inputs.
    """

    name: str
    stage: str
    summary: str
    inputs: tuple[Spec, ...] = ()
    outputs: tuple[Spec, ...] = ()
    reads: tuple[str, ...] = ()
    ignores: tuple[str, ...] = ()
    without: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def read(self, factor: str, inputs: Trace) -> bool:
        """Whether it reads a factor when it has these inputs."""
        lacking = (names for group, names in self.without.items() if not inputs.group(group))
        return any(factor.startswith(names) for names in lacking) or (
            factor.startswith(self.reads) and not factor.startswith(self.ignores)
        )

    def scope(self, recipe: Recipe, inputs: Trace) -> Recipe:
        """The recipe with each factor of `SCOPED` that it does not read at its default.

        It is what the method is run with, so that what is not declared cannot have an effect, and
        recipes that differ only there share one capture.
        """
        data, defaults = recipe.model_dump(mode="json"), Recipe().model_dump(mode="json")
        for section in SCOPED:
            for key, value in defaults[section].items():
                if not self.read(f"{section}.{key}", inputs):
                    data[section][key] = value
        return build(data, self.name, type(recipe))

    def check_inputs(self, inputs: Trace) -> Bindings:
        """What the dimensions of the inputs stand for.

        Raises:
            UsageError: They do not fit; the message names each item.
        """
        bindings = Bindings()
        if found := violations(self.inputs, inputs, bindings):
            raise UsageError(f"inputs of {self.name}: {shortened(found)}")
        return bindings

    def check_outputs(self, outputs: Any, bindings: Bindings) -> None:
        """Holds what the method returned against its schema.

        Args:
            outputs: Whatever it returned.
            bindings: Those of its inputs.

        Raises:
            ContractError: It does not fit; the message names each item.
        """
        if not isinstance(outputs, Trace):
            raise ContractError(f"it returned {type(outputs).__name__}, expected a Trace")
        if found := violations(self.outputs, outputs, bindings.copy()):
            raise ContractError(shortened(found))
