"""As `parity.audit.alarm`, for paths on torch."""

from __future__ import annotations

from typing import Any, ClassVar

from parity.audit.alarm import raised
from parity.paths import parts
from parity.paths.hf.path import HfPath
from parity.recipe import Recipe

SPEC = f"{__name__}:Alarm"


class Alarm(HfPath):
    """None of its parts does anything else."""

    name = "alarm"
    own_parts: ClassVar[tuple[str, ...]] = parts.TRAINING
    takes_parts: ClassVar[tuple[str, ...]] = HfPath.takes_parts

    def load(self, recipe: Recipe) -> Any:
        """Raises."""
        raised("loader")

    def wire(self, base: Any, recipe: Recipe) -> Any:
        """Raises."""
        raised("wiring")

    def rows(self, recipe: Recipe, tokenizer: Any) -> Any:
        """Raises."""
        raised("batching")

    def iterate(self, recipe: Recipe, tokenizer: Any) -> Any:
        """Raises."""
        raised("batching")

    def loss(self, recipe: Recipe) -> Any:
        """Raises."""
        raised("loss")

    def clip(self, recipe: Recipe) -> Any:
        """Raises."""
        raised("clip")

    def optimizer(self, recipe: Recipe, parameters: list[Any]) -> Any:
        """Raises."""
        raised("optimizer")
