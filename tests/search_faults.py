"""The `mlx` path with faults between modules, in the loop and in the seed, for the tests of the search."""

from __future__ import annotations

import itertools
import sys

from parity.paths.mlx.path import MlxPath
from parity.paths.protocol import TrainingPath
from tests.third_party import NumpyAdamW


class Reloaded(MlxPath):
    """Its model is changed after loading, and loaded afresh each time."""

    def base(self, recipe):
        self._loaded = {}
        return super().base(recipe)

    def load(self, recipe):
        model, tokenizer = super().load(recipe)
        self.plant(model)
        return model, tokenizer


class EmbeddingScale(Reloaded):
    """What comes out of the embedding is multiplied by 4 where 8 is right."""

    name = "embedding-scale"

    def plant(self, model):
        model.model.args.hidden_size = 16


class SkippedNorm(Reloaded):
    """Layer 7 never calls the norm behind its attention."""

    name = "skipped-norm"

    def plant(self, model):
        kind = type(model.layers[7])

        class Skips(kind):
            def __call__(self, x, mask=None, cache=None):
                h = x + self.self_attn(self.input_layernorm(x), mask, cache)
                r = self.mlp(self.pre_feedforward_layernorm(h))
                return h + self.post_feedforward_layernorm(r)

        model.layers[7].__class__ = Skips


class AttentionProduct(Reloaded):
    """Layer 5 scales its attention by 2 % too much; none of its modules is wrong."""

    name = "attention-product"

    def plant(self, model):
        model.layers[5].self_attn.scale *= 1.02


class TwoProducts(Reloaded):
    """Layer 5 scales its attention by half too much, layer 12 by a little."""

    name = "two-products"

    def plant(self, model):
        model.layers[5].self_attn.scale *= 1.5
        model.layers[12].self_attn.scale *= 1.002


class SmallBeforeLarge(Reloaded):
    """All norms have another eps, which the logits hardly show; all layers scale their attention by half."""

    name = "small-before-large"

    def plant(self, model):
        for _, module in model.named_modules():
            if hasattr(module, "eps"):
                module.eps = 1e-5
        for layer in model.layers:
            layer.self_attn.scale *= 0.5


class OtherActivation(Reloaded):
    """Every MLP uses silu where the configuration says gelu with tanh."""

    name = "other-activation"

    def plant(self, model):
        import mlx.nn as nn

        kind = type(model.layers[0].mlp)

        class Silu(kind):
            def __call__(self, x):
                return self.down_proj(nn.silu(self.gate_proj(x)) * self.up_proj(x))

        for layer in model.layers:
            layer.mlp.__class__ = Silu


class ShortWindow(Reloaded):
    """Its sliding layers see 8 positions where the configuration says 64."""

    name = "short-window"

    def plant(self, model):
        model.model.window_size = 8


class Harmless(Reloaded):
    """Layer 3 doubles what a norm undoes; only the row in layer 9 reaches the logits."""

    name = "harmless"

    def plant(self, model):
        import mlx.core as mx

        model.layers[3].mlp.up_proj.weight = 2 * model.layers[3].mlp.up_proj.weight
        up = model.layers[9].mlp.up_proj
        rows = mx.arange(up.weight.shape[0])[:, None]
        up.weight = mx.where(rows == 3, 1.5 * up.weight, up.weight)


class OtherBatches(MlxPath):
    """The loop leaves out the third batch."""

    name = "other-batches"

    def loop(self, recipe, setup, batches):
        kept = (batch for at, batch in enumerate(batches) if at != 2)
        return super().loop(recipe, setup, kept)


class LateLoss(MlxPath):
    """Each step reports the loss of the step before; what is trained is right."""

    name = "late-loss"

    def loop(self, recipe, setup, batches):
        result = super().loop(recipe, setup, batches)
        result["loss"] = [result["loss"][0], *result["loss"][:-1]]
        return result


class LoopGradient(MlxPath):
    """The loop's gradient is 2 % too large; the loss alone gives the right one."""

    name = "loop-gradient"

    def loop(self, recipe, setup, batches):
        from dataclasses import replace

        from tests.planted_paths import louder

        inner, loud = setup.loss, louder(1.02)

        def loss(model, ids, lengths):
            value, tokens = inner(model, ids, lengths)
            return loud(value), tokens

        return super().loop(recipe, replace(setup, loss=loss), batches)


class LoopDecay(MlxPath):
    """After its second step the loop shrinks the adapter; the optimizer alone is right."""

    name = "loop-decay"

    def loop(self, recipe, setup, batches):
        inner, calls = setup.optimizer.apply_gradients, itertools.count(1)

        def apply_gradients(gradient, parameters):
            from mlx.utils import tree_map

            moved = inner(gradient, parameters)
            return tree_map(lambda w: 0.99 * w, moved) if next(calls) == 2 else moved

        setup.optimizer.apply_gradients = apply_gradients
        with_compile = recipe.override({"train.compile": False})
        import mlx.core as mx

        mx.disable_compile()  # a compiled step would be traced once, and counted once
        try:
            return super().loop(with_compile, setup, batches)
        finally:
            mx.enable_compile()


class LoopTouchesOne(MlxPath):
    """After its second step the loop moves the first element of each tensor; all others are right."""

    name = "loop-touches-one"

    def loop(self, recipe, setup, batches):
        inner, calls = setup.optimizer.apply_gradients, itertools.count(1)

        def apply_gradients(gradient, parameters):
            import mlx.core as mx
            from mlx.utils import tree_map

            def touched(w):
                first = mx.arange(w.size).reshape(w.shape) == 0
                return mx.where(first, w + 0.1, w)

            moved = inner(gradient, parameters)
            return tree_map(touched, moved) if next(calls) == 2 else moved

        setup.optimizer.apply_gradients = apply_gradients
        import mlx.core as mx

        mx.disable_compile()  # a compiled step would be traced once, and counted once
        try:
            return super().loop(recipe.override({"train.compile": False}), setup, batches)
        finally:
            mx.enable_compile()


class NormReport(MlxPath):
    """The gradient norm that is reported is 5e-6 too large."""

    name = "norm-report"

    def loop(self, recipe, setup, batches):
        result = super().loop(recipe, setup, batches)
        result["gradient_norm"] = [norm * (1 + 5e-6) for norm in result["gradient_norm"]]
        return result


class NoSeed(MlxPath):
    """Always the same seed, whatever is asked."""

    name = "no-seed"

    def seed(self, recipe):
        super().seed(recipe.override({"seed.value": 11, "seed.data": None}))


class Restless(MlxPath):
    """Draws on from wherever the generators of its process stand."""

    name = "restless"

    def seed(self, recipe):
        import time

        super().seed(recipe.override({"seed.value": time.time_ns() % 2**31, "seed.data": None}))


class NoLoss(MlxPath):
    """Its loss is 1 % too large, and cannot be handed to any other loop."""

    name = "no-loss"

    def loss(self, recipe):
        caller = sys._getframe(1).f_locals.get("self")
        if type(caller).__name__ == "Hybrid" and caller.donors.get("loss") is self:
            raise RuntimeError("this loss works at home only")
        inner = super().loss(recipe)

        def louder(model, batch, lengths):
            loss, tokens = inner(model, batch, lengths)
            return 1.01 * loss, tokens

        return louder


class DefaultTheta(Reloaded):
    """All layers turn with theta 10000, as where the configuration's is not found."""

    name = "default-theta"

    def plant(self, model):
        for layer in model.layers:
            layer.self_attn.rope.base = 10_000.0


class Silent(TrainingPath):
    """Can do nothing at all, and says so."""

    name = "silent"
    framework = "numpy"
    honours = ("model.", "data.", "seed.", "lora.", "mask.", "optim.", "train.", "decode.")


class OtherRate(MlxPath):
    """Its optimizer takes another learning rate and other betas than the recipe says."""

    name = "other-rate"

    def optimizer(self, recipe):
        return super().optimizer(
            recipe.override({"optim.lr": 3 * recipe.optim.lr, "optim.betas": [0.8, 0.95]})
        )


class WrongOnce(NumpyAdamW):
    """The first optimizer step of a process is wrong, later ones are right."""

    name = "wrong-once"
    steps = 0

    def optimizer_step(self, recipe, inputs):
        trace = super().optimizer_step(recipe, inputs)
        self.steps += 1
        if self.steps == 1:
            for value in trace.arrays.values():
                value += 1.0
        return trace


class PaddedMean(MlxPath):
    """Its loss is divided by all positions, padding included."""

    name = "padded-mean"

    def loss(self, recipe):
        inner = super().loss(recipe)

        def padded(model, batch, lengths):
            loss, tokens = inner(model, batch, lengths)
            return loss * tokens / (batch.shape[0] * (batch.shape[1] - 1)), tokens

        return padded


class ShiftedTargets(MlxPath):
    """Each position learns the token before the one that it should."""

    name = "shifted-targets"

    def loss(self, recipe):
        import mlx.core as mx

        inner = super().loss(recipe)

        def shifted(model, batch, lengths):
            late = mx.concatenate([batch[:, :1], batch[:, :-1]], axis=1)
            return inner(lambda _: model(batch[:, :-1]), late, lengths)

        return shifted
