"""One method of a path: what it is handed, what it emits, which factors it reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from parity.errors import UsageError
from parity.paths.schema import Bindings, Spec, shortened, violations
from parity.trace import Trace


class ContractError(Exception):
    """What a path emitted is not what its method's schema says; the message names each item."""


@dataclass(frozen=True)
class Method:
    """One method of a path: `method(recipe, inputs) -> Trace`.

    Attributes:
        name: Its name.
        stage: The stage that judges it; empty where it only serves others.
        summary: A phrase.
        inputs: What it is handed.
        outputs: What it emits.
        reads: Factors, or prefixes of factors, that may change what it emits.
        ignores: Those among them that do not.
        without: Optional inputs to factors that it reads only where it is not handed them.
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
        """Whether it reads a factor when it is handed these inputs."""
        lacking = (names for group, names in self.without.items() if not inputs.group(group))
        return any(factor.startswith(names) for names in lacking) or (
            factor.startswith(self.reads) and not factor.startswith(self.ignores)
        )

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
