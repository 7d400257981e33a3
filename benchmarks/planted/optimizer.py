"""Faults in the optimizer, its settings and its clip."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.planted.registry import planted
from parity.paths.mlx.path import MlxPath


def asked(factors: Mapping[str, Any]) -> type[MlxPath]:
    """A path whose optimizer is made from another recipe than it is given."""

    class Path(MlxPath):
        def optimizer(self, recipe: Any) -> Any:
            return super().optimizer(recipe.override(factors))

    return Path


def around(change: Callable[[Any, Any, Any, Any], Any]) -> type[MlxPath]:
    """A path whose optimizer updates each tensor otherwise: `change(optimizer, moved, gradient, old)`."""

    class Path(MlxPath):
        def optimizer(self, recipe: Any) -> Any:
            optimizer = super().optimizer(recipe)
            inner = optimizer.apply_single

            def apply_single(gradient: Any, parameter: Any, state: Any) -> Any:
                return change(optimizer, inner(gradient, parameter, state), gradient, parameter)

            optimizer.apply_single = apply_single
            return optimizer

    return Path


@planted(
    "optimizer",
    "optimizer_step",
    parts="optimizer",
    hints="bias_correction",
    settings="optim.bias_correction",
)
def no_bias_correction() -> type[MlxPath]:
    """Adam's bias is not corrected."""
    return asked({"optim.bias_correction": False})


@planted(
    "optimizer",
    "optimizer_step",
    {"0.01": 0.01, "1e-4": 1e-4},
    parts="optimizer",
    hints="weight_decay",
    settings="optim.weight_decay",
)
def hidden_decay(amount: float) -> type[MlxPath]:
    """There is weight decay that nobody asked for."""
    return asked({"optim.weight_decay": amount})


@planted(
    "optimizer",
    "optimizer_step",
    {"1e-4": 1e-4, "1e-7": 1e-7},
    parts="optimizer",
    settings="optim.eps",
)
def another_eps(value: float) -> type[MlxPath]:
    """Adam's eps is another."""
    return asked({"optim.eps": value})


@planted(
    "optimizer",
    "optimizer_step",
    {"0.95": (0.9, 0.95), "0.9991": (0.9, 0.9991)},
    parts="optimizer",
    settings="optim.betas",
)
def another_beta(betas: tuple[float, float]) -> type[MlxPath]:
    """The second beta is another."""
    return asked({"optim.betas": list(betas)})


@planted(
    "optimizer",
    "optimizer_step",
    {"1 %": 1.01, "1e-4": 1.0001},
    parts="optimizer",
    settings="optim.lr",
)
def longer_rate(factor: float) -> type[MlxPath]:
    """The learning rate is a little larger."""

    class Path(MlxPath):
        def optimizer(self, recipe: Any) -> Any:
            return super().optimizer(recipe.override({"optim.lr": factor * recipe.optim.lr}))

    return Path


@planted("optimizer", "optimizer_step", parts="optimizer")
def coupled_decay() -> type[MlxPath]:
    """A weight decay of 0.1 is added to the gradient, as in Adam with L2."""

    class Path(MlxPath):
        def optimizer(self, recipe: Any) -> Any:
            optimizer = super().optimizer(recipe)
            inner = optimizer.apply_single
            optimizer.apply_single = lambda g, p, s: inner(g + 0.1 * p, p, s)
            return optimizer

    return Path


@planted("optimizer", "optimizer_step", parts="optimizer", steps=(3,))
def third_step_longer() -> type[MlxPath]:
    """The third update is 1 % too long."""
    import mlx.core as mx

    return around(
        lambda optimizer, moved, gradient, old: mx.where(
            optimizer.step == 3, old + 1.01 * (moved - old), moved
        )
    )


@planted("optimizer", "optimizer_step", parts="optimizer")
def second_moment_in_float16() -> type[MlxPath]:
    """The second moment is kept in float16."""

    class Path(MlxPath):
        def optimizer(self, recipe: Any) -> Any:
            import mlx.core as mx

            optimizer = super().optimizer(recipe)
            inner = optimizer.apply_single

            def apply_single(gradient: Any, parameter: Any, state: Any) -> Any:
                moved = inner(gradient, parameter, state)
                state["v"] = state["v"].astype(mx.float16).astype(mx.float32)
                return moved

            optimizer.apply_single = apply_single
            return optimizer

    return Path


@planted("optimizer", "optimizer_step", parts="optimizer")
def moves_by_sign() -> type[MlxPath]:
    """Only the sign of an update is kept."""
    import mlx.core as mx

    def change(optimizer: Any, moved: Any, gradient: Any, old: Any) -> Any:
        return old + mx.sign(moved - old) * optimizer.learning_rate

    return around(change)


@planted("optimizer", "optimizer_step", {"1e-3": 1e-3, "1e-5": 1e-5}, parts="optimizer")
def update_shortened(share: float) -> type[MlxPath]:
    """Each update is a little too short."""
    return around(lambda optimizer, moved, gradient, old: old + (1 - share) * (moved - old))


@planted(
    "clip",
    "optimizer_step",
    {"norm": "norm", "value": "value"},
    parts="clip",
    hints="clip",
    settings="clip.mode clip.value",
)
def hidden_clip(kind: str) -> type[MlxPath]:
    """Gradients are clipped at 1 though nobody asked for it."""

    class Path(MlxPath):
        def clip(self, recipe: Any) -> Any:
            return super().clip(recipe.override({"optim.clip": kind, "optim.clip_value": 1.0}))

    return Path


@planted(
    "clip",
    "optimizer_step",
    parts="clip",
    hints="clip",
    recipe={"optim.clip": "norm", "optim.clip_value": 0.5},
    references=("hf",),
    settings="clip.mode clip.value",
)
def clip_by_leaf() -> type[MlxPath]:
    """The norm of each tensor is clipped instead of that of all."""

    class Path(MlxPath):
        def clip(self, recipe: Any) -> Any:
            import mlx.core as mx
            from mlx.utils import tree_map

            limit = recipe.optim.clip_value

            def leaf(g: Any) -> Any:
                return g * mx.minimum(1.0, limit / (mx.linalg.norm(g) + 1e-6))

            return lambda gradient: tree_map(leaf, gradient)

    return Path


@planted(
    "clip",
    "optimizer_step",
    parts="clip",
    recipe={"optim.clip": "norm", "optim.clip_value": 0.5},
    references=("hf",),
    hints="clip",
    settings="clip.mode clip.value",
)
def clip_forgotten() -> type[MlxPath]:
    """A clip by norm is asked for and not done."""

    class Path(MlxPath):
        def clip(self, recipe: Any) -> Any:
            return None

    return Path
