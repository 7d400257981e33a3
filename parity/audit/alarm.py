"""A donor whose parts tell that they were called: what a path takes from `self.part(...)`."""

from __future__ import annotations

from typing import Any, NoReturn

from parity.errors import Unsupported
from parity.paths import parts
from parity.paths.mlx.path import WRITTEN_AS, MlxPath
from parity.recipe import Recipe

SPEC = f"{__name__}:Alarm"
METHODS = {part: names for part, names in WRITTEN_AS.items() if part in parts.PARTS}
"""Part to the methods of an MLX path that are it."""


USED_IN = {"saver": "round_trip", "reader": "round_trip", "fuse": "fuse"}
"""Part to the method of the contract that uses it; the others are used in `train`."""


def called(part: str) -> str:
    """What is raised where a part is called."""
    return f"the {part} was taken from elsewhere"


def _alarm(part: str) -> NoReturn:
    raise Unsupported(called(part))


class Alarm(MlxPath):
    """None of its parts does anything else."""

    name = "alarm"

    def load(self, recipe: Recipe) -> Any:
        """Raises."""
        _alarm("loader")

    def wire(self, model: Any, recipe: Recipe) -> Any:
        """Raises."""
        _alarm("wiring")

    def dataset(self, recipe: Recipe, tokenizer: Any) -> Any:
        """Raises."""
        _alarm("batching")

    def iterate(self, recipe: Recipe, dataset: Any) -> Any:
        """Raises."""
        _alarm("batching")

    def loss(self, recipe: Recipe) -> Any:
        """Raises."""
        _alarm("loss")

    def clip(self, recipe: Recipe) -> Any:
        """Raises."""
        _alarm("clip")

    def optimizer(self, recipe: Recipe) -> Any:
        """Raises."""
        _alarm("optimizer")

    def save(self, recipe: Recipe, setup: Any, folder: Any) -> Any:
        """Raises."""
        _alarm("saver")

    def read(self, recipe: Recipe, folder: Any, loader: Any) -> Any:
        """Raises."""
        _alarm("reader")

    def merge(self, recipe: Recipe, folder: Any, read: Any, dequantize: bool) -> Any:
        """Raises."""
        _alarm("fuse")
