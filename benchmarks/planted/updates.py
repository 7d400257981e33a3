"""Mistakes that optimizers, schedules and clips are shipped with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.planted.registry import planted
from parity.paths.mlx.path import MlxPath

ROWS = {"data.source": "mixed", "train.batch_size": 2}


def adam(step: Callable[..., Any]) -> type[MlxPath]:
    """A path whose Adam is `step(optimizer, gradient, parameter, state) -> parameter`.

    The parameter has decayed before, as in AdamW.
    """

    class Path(MlxPath):
        def optimizer(self, recipe: Any) -> Any:
            optimizer = super().optimizer(recipe)
            if recipe.optim.name != "sgd":
                decay = getattr(optimizer, "weight_decay", 0.0)
                optimizer.apply_single = lambda g, p, s: step(
                    optimizer, g, p * (1 - optimizer.learning_rate * decay), s
                )
            return optimizer

    return Path


def moments(optimizer: Any, gradient: Any, state: Any, ahead: int = 0) -> tuple[Any, Any]:
    """Both moments with their bias corrected for a step that may be another."""
    first, second = optimizer.betas
    state["m"] = first * state["m"] + (1 - first) * gradient
    state["v"] = second * state["v"] + (1 - second) * gradient * gradient
    step = optimizer.step + ahead
    return state["m"] / (1 - first**step), state["v"] / (1 - second**step)


@planted("optimizer", "optimizer_step", {"1e-8": 1e-8, "1e-6": 1e-6}, parts="optimizer")
def eps_inside_the_root(eps: float) -> type[MlxPath]:
    """Adam adds eps to the second moment before it takes the root."""

    def step(optimizer: Any, gradient: Any, parameter: Any, state: Any) -> Any:
        import mlx.core as mx

        first, second = moments(optimizer, gradient, state)
        return parameter - optimizer.learning_rate * first / mx.sqrt(second + eps)

    return adam(step)


@planted("optimizer", "optimizer_step", parts="optimizer")
def bias_one_step_ahead() -> type[MlxPath]:
    """Adam's bias is corrected as if a step more had been made."""

    def step(optimizer: Any, gradient: Any, parameter: Any, state: Any) -> Any:
        import mlx.core as mx

        first, second = moments(optimizer, gradient, state, ahead=1)
        return parameter - optimizer.learning_rate * first / (mx.sqrt(second) + optimizer.eps)

    return adam(step)


@planted("optimizer", "optimizer_step", parts="optimizer")
def second_moment_never_falls() -> type[MlxPath]:
    """Adam keeps the greatest second moment, as AMSGrad does."""

    def step(optimizer: Any, gradient: Any, parameter: Any, state: Any) -> Any:
        import mlx.core as mx

        greatest = state.get("greatest", mx.zeros_like(parameter))
        first, second = moments(optimizer, gradient, state)
        state["greatest"] = second = mx.maximum(greatest, second)
        return parameter - optimizer.learning_rate * first / (mx.sqrt(second) + optimizer.eps)

    return adam(step)


@planted("optimizer", "optimizer_step", parts="optimizer")
def looks_ahead() -> type[MlxPath]:
    """Adam with Nesterov's momentum."""

    def step(optimizer: Any, gradient: Any, parameter: Any, state: Any) -> Any:
        import mlx.core as mx

        beta = optimizer.betas[0]
        first, second = moments(optimizer, gradient, state)
        first = beta * first + (1 - beta) * gradient / (1 - beta**optimizer.step)
        return parameter - optimizer.learning_rate * first / (mx.sqrt(second) + optimizer.eps)

    return adam(step)


@planted("optimizer", "optimizer_step", parts="optimizer", settings="optim.betas")
def betas_swapped() -> type[MlxPath]:
    """Adam has its betas in the wrong order."""

    class Path(MlxPath):
        def optimizer(self, recipe: Any) -> Any:
            return super().optimizer(recipe.override({"optim.betas": recipe.optim.betas[::-1]}))

    return Path


@planted(
    "optimizer",
    "optimizer_step",
    parts="optimizer",
    recipe={"optim.weight_decay": 0.1},
)
def no_decay_of_lora_b() -> type[MlxPath]:
    """Weight decay leaves out `lora_b`."""

    class Path(MlxPath):
        def optimizer(self, recipe: Any) -> Any:
            optimizer = super().optimizer(recipe)
            inner = optimizer.apply_gradients

            def apply_gradients(gradient: Any, parameters: Any) -> Any:
                from mlx.utils import tree_map_with_path

                keep = 1 / (1 - optimizer.learning_rate * recipe.optim.weight_decay)

                def kept(name: str, value: Any) -> Any:
                    return value * keep if name.endswith("lora_b") else value

                return inner(gradient, tree_map_with_path(kept, parameters))

            optimizer.apply_gradients = apply_gradients
            return optimizer

    return Path


@planted(
    "optimizer",
    "optimizer_step",
    parts="optimizer",
    recipe={"optim.weight_decay": 0.01},
    hints="weight_decay",
    settings="optim.weight_decay",
)
def decay_without_the_rate() -> type[MlxPath]:
    """Weight decay is not multiplied by the learning rate."""

    class Path(MlxPath):
        def optimizer(self, recipe: Any) -> Any:
            rate = recipe.optim.lr or 1.0
            more = recipe.optim.weight_decay / rate
            return super().optimizer(recipe.override({"optim.weight_decay": more}))

    return Path


def scheduled(change: Callable[[Any, Any], Any], **recipe: Any) -> type[MlxPath]:
    """A path whose learning rate is `change(schedule, step)`."""

    class Path(MlxPath):
        def optimizer(self, recipe: Any) -> Any:
            optimizer = super().optimizer(recipe)
            if inner := optimizer._schedulers.get("learning_rate"):
                optimizer._schedulers["learning_rate"] = lambda step: change(inner, step)
            return optimizer

    return Path


@planted(
    "optimizer",
    "optimizer_step",
    parts="optimizer",
    recipe={"optim.warmup_steps": 3},
    settings="optim.lr",
)
def warmup_one_step_ahead() -> type[MlxPath]:
    """The warm-up begins at its second step."""
    return scheduled(lambda schedule, step: schedule(step + 1))


@planted(
    "optimizer",
    "optimizer_step",
    parts="optimizer",
    recipe={"optim.schedule": "cosine"},
    settings="optim.lr",
)
def decays_to_a_tenth() -> type[MlxPath]:
    """The cosine ends at a tenth of the learning rate."""

    class Path(MlxPath):
        def optimizer(self, recipe: Any) -> Any:
            least = 0.1 * recipe.optim.lr
            optimizer = super().optimizer(recipe)
            if inner := optimizer._schedulers.get("learning_rate"):
                optimizer._schedulers["learning_rate"] = lambda step: least + 0.9 * inner(step)
            return optimizer

    return Path


@planted(
    "optimizer",
    "loss_curve",
    parts="optimizer",
    recipe={**ROWS, "optim.schedule": "linear", "train.accumulation": 2},
    settings="optim.lr",
    steps=(2, 3),
    differs="the update|the adapter after it|the loss that is reported",
)
def schedule_counts_micro_batches() -> type[MlxPath]:
    """The schedule moves on with every micro-batch."""

    class Path(MlxPath):
        def optimizer(self, recipe: Any) -> Any:
            optimizer = super().optimizer(recipe)
            if inner := optimizer._schedulers.get("learning_rate"):
                often = recipe.train.accumulation
                optimizer._schedulers["learning_rate"] = lambda step: inner(often * step)
            return optimizer

    return Path


@planted("optimizer", "optimizer_step", parts="optimizer", settings="optim.lr")
def rate_in_bfloat16() -> type[MlxPath]:
    """The learning rate is rounded to bfloat16."""
    import mlx.core as mx

    class Path(MlxPath):
        def optimizer(self, recipe: Any) -> Any:
            rate = mx.array(recipe.optim.lr, mx.bfloat16).astype(mx.float32).item()
            return super().optimizer(recipe.override({"optim.lr": rate}))

    return Path


@planted(
    "clip",
    "optimizer_step",
    parts="clip",
    recipe={"optim.clip": "norm", "optim.clip_value": 0.5},
    references=("hf",),
    settings="clip.mode clip.value",
)
def norm_of_lora_b_alone() -> type[MlxPath]:
    """The norm that is clipped is that of `lora_b` alone."""

    class Path(MlxPath):
        def clip(self, recipe: Any) -> Any:
            import mlx.core as mx
            from mlx.utils import tree_flatten, tree_map

            if recipe.optim.clip != "norm":
                return None

            def clipped(gradient: Any) -> Any:
                parts = [v for name, v in tree_flatten(gradient) if name.endswith("lora_b")]
                norm = mx.sqrt(sum(mx.square(v).sum() for v in parts))
                share = mx.minimum(1.0, recipe.optim.clip_value / (norm + 1e-6))
                return tree_map(lambda g: g * share, gradient)

            return clipped

    return Path


@planted("harmless", references=("hf",))
def eps_scaled_with_the_bias() -> type[MlxPath]:
    """Adam's corrections are multiplied into the rate, as its paper proposes; eps of 1e-8 is a bit less."""

    def step(optimizer: Any, gradient: Any, parameter: Any, state: Any) -> Any:
        import mlx.core as mx

        first, second = optimizer.betas
        moments(optimizer, gradient, state)
        root = mx.sqrt(1 - second**optimizer.step)
        rate = optimizer.learning_rate * root / (1 - first**optimizer.step)
        return parameter - rate * state["m"] / (mx.sqrt(state["v"]) + root * optimizer.eps)

    return adam(step)
