"""An adapter as its files describe it, whichever stack wrote them; nothing is computed yet."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from parity.adapters.tensors import Tensor
from parity.judge.updates import Updates
from parity.trace import Array


@dataclass(frozen=True)
class Finding:
    """Something wrong.

    Attributes:
        check: The check that found it.
        where: A tensor, a module, a key of the settings or a file.
        text: A sentence with the value.
        by_names: Whether it rests on the names in the base's files, which a framework may call
            otherwise: its loader knows better.
    """

    check: str
    where: str
    text: str
    by_names: bool = False


class Scale(NamedTuple):
    """What A·B is multiplied by; None where it cannot be told."""

    value: float | None
    source: str


@dataclass(frozen=True)
class Sizes:
    """Dimensions of A and B as they stand: A maps `inputs` to `rank_a`, B `rank_b` to `outputs`."""

    inputs: int
    rank_a: int
    rank_b: int
    outputs: int
    experts: int = 0

    @property
    def fits(self) -> bool:
        """Whether A and B can be multiplied."""
        return self.rank_a == self.rank_b

    @property
    def turned(self) -> Sizes:
        """Were both stored the other way round."""
        return Sizes(self.rank_a, self.inputs, self.outputs, self.rank_b, self.experts)


@dataclass(frozen=True)
class Module:
    """A module with tensors of an adapter.

    Attributes:
        name: Canonical.
        key: As the file has it.
        tensors: `a`, `b`, `m` (DoRA's magnitude) and `bias`, as far as they are there.
        embedding: Whether its tensors are named as those of an embedding.
    """

    name: str
    key: str
    tensors: Mapping[str, Tensor]
    embedding: bool = False


class Extra(NamedTuple):
    """A tensor that is no LoRA factor, and why it is there; without a reason it should not be."""

    tensor: Tensor
    reason: str


@dataclass(frozen=True)
class Adapter(ABC):
    """Files of an adapter.

    Attributes:
        folder: Where it is.
        written: What `adapter_config.json` holds.
        tensors: All tensors, by the name in the file.
        modules: By canonical name.
        extra: Tensors that are no LoRA factors, by the name in the file.
    """

    folder: Path
    written: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    modules: Mapping[str, Module]
    extra: Mapping[str, Extra]

    layout: ClassVar[str]
    """`mlx` or `peft`."""
    orientation: ClassVar[str]
    """In words, how A and B are stored."""

    @property
    @abstractmethod
    def writer(self) -> str:
        """Which stack wrote it, and what shows that."""

    @property
    @abstractmethod
    def kind(self) -> str:
        """`LoRA`, `DoRA` or `full`, as its settings say."""

    @property
    @abstractmethod
    def base(self) -> str:
        """The base that its settings name; may be empty."""

    @abstractmethod
    def rank(self, module: str) -> tuple[int | None, str]:
        """The rank that the settings give a module, and which of them."""

    @abstractmethod
    def scale(self, module: str) -> Scale:
        """The scale that the settings give a module."""

    @abstractmethod
    def settings(self) -> list[Finding]:
        """What is missing in the settings, or contradicts itself, whatever the tensors are."""

    @abstractmethod
    def wanted(self, names: Iterable[str], count: int) -> set[str]:
        """Those of a base's modules that the settings say are adapted.

        Args:
            names: As the base's files have them.
            count: Layers of the base.
        """

    @abstractmethod
    def targets(self) -> dict[str, bool]:
        """Each entry that names modules, and whether any of the adapter's modules matches it."""

    @abstractmethod
    def untargeted(self) -> list[str]:
        """Modules of the adapter that no entry names."""

    @abstractmethod
    def layer_settings(self, layers: set[int], count: int | None) -> list[Finding] | str:
        """What the settings say of the layers, against those that have tensors.

        Returns:
            Findings, or why that cannot be told without the base's `count` of layers.
        """

    @abstractmethod
    def bias_settings(self) -> list[Finding]:
        """What the settings say of biases, against the tensors."""

    @abstractmethod
    def sizes(self, module: Module) -> Sizes | None:
        """Dimensions of A and B; None where one is missing or has another number of dimensions."""

    @abstractmethod
    def oriented(self, module: Module) -> tuple[Array, Array]:
        """A (in, r) and B (r, out), or (experts, r, in) and (experts, out, r)."""

    def updates(self) -> Updates:
        """What is added to each module that has both factors, read when it is looked up."""
        whole = {n: m for n, m in self.modules.items() if (s := self.sizes(m)) and s.fits}
        scales = {name: self.scale(name).value for name in whole}
        return Updates(
            _Factors(self, whole), {n: float("nan") if s is None else s for n, s in scales.items()}
        )


class _Factors(Mapping[str, Array]):
    """`<module>.lora_a` and `.lora_b`, read when they are looked up."""

    def __init__(self, adapter: Adapter, modules: Mapping[str, Module]) -> None:
        self._adapter, self._modules = adapter, modules

    def __getitem__(self, name: str) -> Array:
        module, _, factor = name.rpartition(".")
        a, b = self._adapter.oriented(self._modules[module])
        return np.ascontiguousarray(a if factor == "lora_a" else b)

    def __iter__(self) -> Any:
        return (f"{name}.{factor}" for name in self._modules for factor in ("lora_a", "lora_b"))

    def __len__(self) -> int:
        return 2 * len(self._modules)
