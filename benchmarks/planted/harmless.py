"""Variants that make no difference but rounding, or are nearer to the truth than the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.planted.loss import token_losses
from benchmarks.planted.registry import planted
from benchmarks.planted.tools import ChangedAdapter, ChangedModel, call
from parity.paths.mlx.path import MlxPath

ROUNDS = ("hf",)
"""Against mlx-lm bits are expected, and these change bits."""


def lossy(run: Callable[[Any, Any, Any], Any]) -> type[MlxPath]:
    class Path(MlxPath):
        def loss(self, recipe: Any) -> Any:
            return run

    return Path


def modelled(change: Callable[[Any], None]) -> type[MlxPath]:
    class Path(ChangedModel):
        def change(self, model: Any) -> None:
            change(model)

    return Path


def wired(change: Callable[[Any], None]) -> type[MlxPath]:
    class Path(ChangedAdapter):
        def change(self, model: Any) -> None:
            change(model)

        def reloaded(self, recipe: Any, folder: Any) -> Any:
            model = super().reloaded(recipe, folder)
            change(model)
            return model

    return Path


@planted("harmless")
def same_as_ever() -> type[MlxPath]:
    """Nothing is changed at all."""

    class Path(MlxPath):
        pass

    return Path


@planted("harmless", references=ROUNDS)
def loss_by_log_softmax() -> type[MlxPath]:
    """The loss takes the logarithm of the softmax, then the target's entry."""

    def loss(model: Any, batch: Any, lengths: Any) -> Any:
        import mlx.core as mx

        logits, targets = model(batch[:, :-1]), batch[:, 1:]
        steps = mx.arange(1, targets.shape[1] + 1)
        mask = mx.logical_and(steps >= lengths[:, 0:1], steps <= lengths[:, 1:])
        logs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        # Taking the entry out of it instead is what mlx 0.32.4 cannot compile.
        entry = mx.arange(logits.shape[-1]) == targets[..., None]
        losses = -mx.where(entry, logs, 0.0).sum(axis=-1)
        count = mask.sum()
        return (losses * mask).sum() / count, count

    return lossy(loss)


@planted("harmless", references=ROUNDS)
def loss_summed_backwards() -> type[MlxPath]:
    """The batch is summed in the opposite order."""

    def loss(model: Any, batch: Any, lengths: Any) -> Any:
        losses, mask = token_losses(model, batch, lengths)
        whole = (losses * mask).reshape(-1)[::-1]
        count = mask.sum()
        return whole.sum() / count, count

    return lossy(loss)


@planted("harmless", references=ROUNDS)
def loss_by_row_sums() -> type[MlxPath]:
    """Rows are summed first, then the batch; the divisor is the same."""

    def loss(model: Any, batch: Any, lengths: Any) -> Any:
        losses, mask = token_losses(model, batch, lengths)
        count = mask.sum()
        return (losses * mask).sum(1).sum() / count, count

    return lossy(loss)


@planted("harmless", references=ROUNDS)
def loss_with_float_mask() -> type[MlxPath]:
    """The mask is float32 instead of boolean."""

    def loss(model: Any, batch: Any, lengths: Any) -> Any:
        import mlx.core as mx

        losses, mask = token_losses(model, batch, lengths)
        weights = mask.astype(mx.float32)
        return (losses * weights).sum() / weights.sum(), mask.sum()

    return lossy(loss)


@planted("harmless", references=ROUNDS)
def logsumexp_in_blocks() -> type[MlxPath]:
    """The normaliser is summed in blocks of 64 entries: nearer to float64 than one running sum."""

    def loss(model: Any, batch: Any, lengths: Any) -> Any:
        import mlx.core as mx

        logits, targets = model(batch[:, :-1]), batch[:, 1:]
        steps = mx.arange(1, targets.shape[1] + 1)
        mask = mx.logical_and(steps >= lengths[:, 0:1], steps <= lengths[:, 1:])
        size = logits.shape[-1]
        padded = mx.pad(logits, [(0, 0), (0, 0), (0, -size % 64)], constant_values=-1e30)
        blocks = mx.logsumexp(padded.reshape(*logits.shape[:-1], -1, 64), axis=-1)
        losses = mx.logsumexp(blocks, axis=-1)
        losses = losses - mx.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        count = mask.sum()
        return (losses * mask).sum() / count, count

    return lossy(loss)


@planted("harmless", settings="train.compile")
def not_compiled() -> type[MlxPath]:
    """The step is never compiled."""

    class Path(MlxPath):
        def train(self, recipe: Any, inputs: Any) -> Any:
            return super().train(recipe.override({"train.compile": False}), inputs)

    return Path


@planted("harmless", references=ROUNDS)
def attention_by_hand() -> type[MlxPath]:
    """Attention is made of a product, a softmax and a product."""

    def change(model: Any) -> None:
        import sys

        import mlx.core as mx

        def attend(q: Any, k: Any, v: Any, cache: Any, scale: float, mask: Any, **_: Any) -> Any:
            repeats = q.shape[1] // k.shape[1]
            k, v = mx.repeat(k, repeats, axis=1), mx.repeat(v, repeats, axis=1)
            scores = (q * scale) @ k.transpose(0, 1, 3, 2)
            if isinstance(mask, str):
                rows, columns = q.shape[2], k.shape[2]
                mask = mx.arange(columns)[None] <= mx.arange(columns - rows, columns)[:, None]
            if mask is not None:
                scores = mx.where(mask, scores, -1e9) if mask.dtype == mx.bool_ else scores + mask
            return mx.softmax(scores, axis=-1, precise=True) @ v

        def run(own: Any, attention: Any, *args: Any, **kwargs: Any) -> Any:
            module = sys.modules[type(attention).__mro__[1].__module__]
            kept = module.scaled_dot_product_attention
            module.scaled_dot_product_attention = attend
            try:
                return own(*args, **kwargs)
            finally:
                module.scaled_dot_product_attention = kept

        for layer in model.layers:
            call(layer.self_attn, run)

    return modelled(change)


@planted("harmless", references=ROUNDS)
def norms_by_hand() -> type[MlxPath]:
    """Root mean square norms are computed from their formula."""

    def change(model: Any) -> None:
        import mlx.core as mx

        def run(own: Any, norm: Any, x: Any) -> Any:
            offset = 1.0 if "gemma" in type(norm).__mro__[1].__module__ else 0.0
            scaled = x * mx.rsqrt(x.square().mean(axis=-1, keepdims=True) + norm.eps)
            return scaled * (offset + norm.weight)

        for layer in model.layers:
            for name, module in layer.items():
                if name.endswith("layernorm"):
                    call(module, run)

    return modelled(change)


@planted("harmless", references=ROUNDS)
def products_in_two_halves() -> type[MlxPath]:
    """The down-projections sum over two halves of their inputs."""

    def change(model: Any) -> None:
        def run(own: Any, linear: Any, x: Any) -> Any:
            half = x.shape[-1] // 2
            weight = linear.weight.T
            return x[..., :half] @ weight[:half] + x[..., half:] @ weight[half:]

        for layer in model.layers:
            call(layer.mlp.down_proj, run)

    return modelled(change)


@planted("harmless", references=ROUNDS)
def adapters_scaled_first() -> type[MlxPath]:
    """The scale multiplies the input of B instead of its output."""

    def change(model: Any) -> None:
        def run(own: Any, lora: Any, x: Any) -> Any:
            z = (lora.scale * (lora.dropout(x) @ lora.lora_a)) @ lora.lora_b
            return lora.linear(x) + z

        for _, module in model.named_modules():
            if hasattr(module, "lora_a"):
                call(module, run)

    return wired(change)


@planted("harmless", references=ROUNDS)
def adapters_merged_first() -> type[MlxPath]:
    """The adapter is multiplied out before it meets the input."""

    def change(model: Any) -> None:
        def run(own: Any, lora: Any, x: Any) -> Any:
            return lora.linear(x) + lora.dropout(x) @ (lora.scale * (lora.lora_a @ lora.lora_b))

        for layer in model.layers[:4]:
            call(layer.mlp.up_proj, run)

    return wired(change)


def adam(step: Callable[..., Any]) -> type[MlxPath]:
    class Path(MlxPath):
        def optimizer(self, recipe: Any) -> Any:
            optimizer = super().optimizer(recipe)
            if recipe.optim.name != "sgd":
                optimizer.apply_single = lambda g, p, s: step(optimizer, recipe.optim, g, p, s)
            return optimizer

    return Path


@planted("harmless", references=ROUNDS)
def adam_rearranged() -> type[MlxPath]:
    """Adam divides both moments by their corrections before it takes the root."""

    def step(optimizer: Any, o: Any, g: Any, p: Any, state: Any) -> Any:
        import mlx.core as mx

        (b1, b2), t = o.betas, optimizer.step
        state["m"] = b1 * state["m"] + (1 - b1) * g
        state["v"] = b2 * state["v"] + (1 - b2) * mx.square(g)
        first, second = state["m"] / (1 - b1**t), state["v"] / (1 - b2**t)
        p = p * (1 - optimizer.learning_rate * o.weight_decay)
        return p - optimizer.learning_rate * first / (mx.sqrt(second) + o.eps)

    return adam(step)


@planted("harmless", references=ROUNDS)
def adam_by_differences() -> type[MlxPath]:
    """Adam's moments move by a share of their distance from the gradient."""

    def step(optimizer: Any, o: Any, g: Any, p: Any, state: Any) -> Any:
        import mlx.core as mx

        (b1, b2), t = o.betas, optimizer.step
        state["m"] = state["m"] + (1 - b1) * (g - state["m"])
        state["v"] = state["v"] + (1 - b2) * (mx.square(g) - state["v"])
        p = p * (1 - optimizer.learning_rate * o.weight_decay)
        rate = optimizer.learning_rate / (1 - b1**t)
        return p - rate * state["m"] / (mx.sqrt(state["v"]) / mx.sqrt(1 - b2**t) + o.eps)

    return adam(step)


@planted("harmless", references=ROUNDS)
def wider_batches() -> type[MlxPath]:
    """Batches handed over are padded to twice their width where they are trained on."""

    class Path(MlxPath):
        def loop(self, recipe: Any, setup: Any, batches: Any) -> Any:
            import mlx.core as mx

            wide = ((mx.pad(ids, [(0, 0), (0, 32)]), lengths) for ids, lengths in batches)
            return super().loop(recipe, setup, wide)

    return Path


@planted("harmless", references=ROUNDS)
def residual_in_another_order() -> type[MlxPath]:
    """The output of layer 3 is taken apart and put together again."""

    def change(model: Any) -> None:
        call(model.layers[3], lambda own, layer, x, *a, **k: x + (own(x, *a, **k) - x))

    return modelled(change)


@planted("harmless", references=ROUNDS)
def attention_doubled_and_halved() -> type[MlxPath]:
    """The output of attention in layer 8 is added to itself and halved."""

    def change(model: Any) -> None:
        def run(own: Any, attention: Any, *arguments: Any, **named: Any) -> Any:
            result = own(*arguments, **named)
            return (result + result) / 2

        call(model.layers[8].self_attn, run)

    return modelled(change)


@planted("harmless")
def another_name_of_the_model() -> type[MlxPath]:
    """The same checkpoint by its full path."""

    class Path(MlxPath):
        def load(self, recipe: Any) -> Any:
            from parity import resources

            source = resources.model_dir(recipe.model.source)
            return super().load(recipe.override({"model.source": source}))

    return Path


@planted("harmless")
def learning_rate_as_a_schedule() -> type[MlxPath]:
    """A constant learning rate is given as a schedule."""

    class Path(MlxPath):
        def optimizer(self, recipe: Any) -> Any:
            import mlx.core as mx

            optimizer = super().optimizer(recipe)
            optimizer._schedulers["learning_rate"] = lambda step: mx.array(recipe.optim.lr)
            return optimizer

    return Path


@planted("harmless")
def weights_read_late() -> type[MlxPath]:
    """Weights are read when they are first used."""

    class Path(MlxPath):
        def load(self, recipe: Any) -> Any:
            import mlx_lm

            from parity import resources

            return mlx_lm.load(resources.model_dir(recipe.model.source), lazy=True)[:2]

    return Path
