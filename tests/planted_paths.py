"""The `mlx` path with one thing planted in it, for the tests of the search."""

from __future__ import annotations

from parity.paths.mlx import MlxPath


class BadModule(MlxPath):
    """One row of the up-projection of layer 7 is too large in the forward pass."""

    name = "bad-module"

    def load(self, recipe):
        import mlx.core as mx

        model, tokenizer = super().load(recipe)
        up = model.layers[7].mlp.up_proj
        rows = mx.arange(up.weight.shape[0])[:, None]
        up.weight = mx.where(rows == 3, 1.5 * up.weight, up.weight)
        return model, tokenizer


class BadRope(MlxPath):
    """Layer 5 turns with another theta."""

    name = "bad-rope"

    def load(self, recipe):
        model, tokenizer = super().load(recipe)
        rope = model.layers[5].self_attn.rope
        rope.base = rope.base * 2
        return model, tokenizer


class BadBackward(MlxPath):
    """The down-projection of layer 9 passes on a gradient that is 1 % too large."""

    name = "bad-backward"

    def wire(self, model, recipe):
        import mlx.core as mx
        import mlx.nn as nn

        super().wire(model, recipe)

        @mx.custom_function
        def louder(x):
            return x

        @louder.vjp
        def louder_vjp(primals, cotangents, outputs):
            return cotangents * 1.01

        class Louder(nn.Module):
            def __init__(self, inner):
                super().__init__()
                self.inner = inner

            def __call__(self, x):
                return louder(self.inner(x))

        down = model.layers[9].mlp.down_proj
        down.linear = Louder(down.linear)

    def base(self, recipe):
        self._loaded = {}  # a wrapped linear cannot be taken out again
        return super().base(recipe)


class BadThirdStep(MlxPath):
    """The optimizer's third step is 1 % too long."""

    name = "bad-third-step"

    def optimizer(self, recipe):
        optimizer = super().optimizer(recipe)
        inner = optimizer.apply_single

        def apply_single(gradient, parameter, state):
            import mlx.core as mx

            moved = inner(gradient, parameter, state)
            third = optimizer.step == 3
            return mx.where(third, parameter + 1.01 * (moved - parameter), moved)

        optimizer.apply_single = apply_single
        return optimizer


class LouderLoss(MlxPath):
    """The loss is 1 % too large."""

    name = "louder-loss"

    def loss(self, recipe):
        inner = super().loss(recipe)

        def louder(model, batch, lengths):
            loss, tokens = inner(model, batch, lengths)
            return 1.01 * loss, tokens

        return louder


class LazyLoop(MlxPath):
    """The loop trains on its first batch again and again."""

    name = "lazy-loop"

    def loop(self, recipe, setup, batches):
        import itertools

        return super().loop(recipe, setup, itertools.repeat(next(batches)))
