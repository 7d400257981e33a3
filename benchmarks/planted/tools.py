"""Ways to change one module of a live MLX model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from parity.paths.mlx.path import MlxPath
from parity.recipe import Recipe


class ChangedModel(MlxPath):
    """Changes the base model as it is loaded; a changed model is loaded anew for each recipe."""

    def change(self, model: Any) -> None:
        """What is planted."""

    def load(self, recipe: Recipe) -> tuple[Any, Any]:
        model, tokenizer = super().load(recipe)
        self.change(model)
        return model, tokenizer


class ChangedAdapter(MlxPath):
    """Changes the model after LoRA has been put into it."""

    def change(self, model: Any) -> None:
        """What is planted."""

    def wire(self, model: Any, recipe: Recipe) -> None:
        super().wire(model, recipe)
        self.change(model)

    def base(self, recipe: Recipe) -> tuple[Any, Any]:
        self._loaded = {}  # what was changed cannot be taken out again
        return super().base(recipe)


def call(module: Any, run: Callable[..., Any]) -> None:
    """Replaces what calling one module does: `run(own, module, *args, **kwargs)`."""
    kind = type(module)

    def changed(self: Any, *args: Any, **kwargs: Any) -> Any:
        return run(lambda *a, **k: kind.__call__(self, *a, **k), self, *args, **kwargs)

    module.__class__ = type(kind.__name__, (kind,), {"__call__": changed})


def on_way_back(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The identity, through which a gradient is changed on its way back."""
    import mlx.core as mx

    @mx.custom_function
    def same(x: Any) -> Any:
        return x

    @same.vjp
    def same_vjp(primals: Any, cotangents: Any, outputs: Any) -> Any:
        return change(cotangents)

    return same


def norms(layer: Any) -> list[Any]:
    """The norms that stand directly in a layer."""
    return [value for name, value in layer.items() if name.endswith("layernorm")]
