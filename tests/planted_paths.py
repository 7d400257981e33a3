"""The `mlx` path with one thing planted in it, for the tests of the search."""

from __future__ import annotations

from parity.paths.mlx.path import MlxPath
from parity.paths.mlx_lm.path import MlxLmPath


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


def watched(module, change):
    """The input of a module goes through a function."""
    kind = type(module)
    call = lambda self, x: kind.__call__(self, change(x))  # noqa: E731
    module.__class__ = type(kind.__name__, (kind,), {"__call__": call})


class RoundsOnTheWayBack(MlxPath):
    """What the down-projections pass on is rounded otherwise."""

    def wire(self, model, recipe):
        import mlx.core as mx

        super().wire(model, recipe)

        @mx.custom_function
        def rounded(x):
            return x

        @rounded.vjp
        def rounded_vjp(primals, cotangents, outputs):
            return (cotangents * 3.0) / 3.0

        for layer in model.layers:
            watched(layer.mlp.down_proj, rounded)


class BadAmongRounding(RoundsOnTheWayBack):
    """The gradient through layer 4 is cut off at its MLP; what all others pass on is rounded otherwise."""

    name = "bad-among-rounding"

    def wire(self, model, recipe):
        import mlx.core as mx

        super().wire(model, recipe)
        watched(model.layers[4].mlp, mx.stop_gradient)


class LoudLoopOfRoundingLoss(RoundsOnTheWayBack):
    """Its loop makes half as much again of the loss; outside of it gradients are off by rounding alone."""

    name = "loud-loop"

    def loop(self, recipe, setup, batches):
        inner = setup.loss

        def loss(*batch):
            value, tokens = inner(*batch)
            return 1.5 * value, tokens

        setup.loss = loss
        return super().loop(recipe, setup, batches)


class RoundedInTrain(MlxLmPath):
    """What the step hands to its optimizer is off by an ulp or two, as a compiler may leave it."""

    name = "rounded-in-train"

    def _train(self, *arguments, **options):
        reports, observer, adapter = super()._train(*arguments, **options)
        inner = observer.gradient

        def gradient():
            return {name: value * (1 + 1e-6) for name, value in inner().items()}

        observer.gradient = gradient
        return reports, observer, adapter


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


def louder(factor=1.01):
    """The identity, whose gradient is 1 % too large."""
    import mlx.core as mx

    @mx.custom_function
    def same(x):
        return x

    @same.vjp
    def same_vjp(primals, cotangents, outputs):
        return cotangents * factor

    return same


class Planted(MlxPath):
    """Changes layer 9 of the wired model; the loaded one is never used again."""

    def wire(self, model, recipe):
        super().wire(model, recipe)
        self.plant(model.layers[9])

    def base(self, recipe):
        self._loaded = {}
        return super().base(recipe)


def loud_input(module):
    """The module's gradient is too large where it leaves it towards the input."""
    kind, loud = type(module), louder()

    class Loud(kind):
        def __call__(self, x, *args, **kwargs):
            return kind.__call__(self, loud(x), *args, **kwargs)

    module.__class__ = Loud


class BadNormBackward(Planted):
    """A norm, which has no adapter, passes on a gradient that is too large."""

    name = "bad-norm-backward"

    def plant(self, layer):
        loud_input(layer.post_attention_layernorm)


class BadRopeBackward(Planted):
    """The rotary embedding passes on a gradient that is too large."""

    name = "bad-rope-backward"

    def plant(self, layer):
        loud_input(layer.self_attn.rope)


class BadAttentionBackward(Planted):
    """Attention hands its queries a gradient that is too large; no module of it is bad."""

    name = "bad-attention-backward"

    def plant(self, layer):
        import sys

        kind, loud = type(layer.self_attn), louder()
        module = sys.modules[kind.__module__]
        attend = module.scaled_dot_product_attention

        class Loud(kind):
            def __call__(self, *args, **kwargs):
                module.scaled_dot_product_attention = lambda q, *a, **k: attend(loud(q), *a, **k)
                try:
                    return kind.__call__(self, *args, **kwargs)
                finally:
                    module.scaled_dot_product_attention = attend

        layer.self_attn.__class__ = Loud


class BadLoraBackward(Planted):
    """One `lora_b` is given a gradient that is too large; nothing is passed on."""

    name = "bad-lora-backward"

    def plant(self, layer):
        kind, loud = type(layer.self_attn.v_proj), louder()

        class Loud(kind):
            def __call__(self, x):
                z = (self.dropout(x) @ self.lora_a) @ loud(self.lora_b)
                return self.linear(x) + (self.scale * z).astype(x.dtype)

        layer.self_attn.v_proj.__class__ = Loud


class BadLossBackward(MlxPath):
    """The loss is right and its gradient too large."""

    name = "bad-loss-backward"

    def loss(self, recipe):
        inner, loud = super().loss(recipe), louder()

        def loss(model, ids, lengths):
            value, tokens = inner(model, ids, lengths)
            return loud(value), tokens

        return loss
