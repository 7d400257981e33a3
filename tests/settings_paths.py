"""Paths that do otherwise than their recipe says, for the tests of what settings are read from."""

from __future__ import annotations

import itertools

from parity.paths.hf.path import HfPath
from parity.paths.mlx.path import MlxPath


class OneRow(MlxPath):
    """It trains on the first row alone."""

    name = "one-row"

    def dataset(self, recipe, tokenizer):
        return [super().dataset(recipe, tokenizer)[0]] * 48


class RowsWithReplacement(HfPath):
    """Its first rows come twice a pass, and no row is missing."""

    name = "rows-twice"

    def iterate(self, recipe, tokenizer):
        for index, batch in enumerate(super().iterate(recipe, tokenizer)):
            yield batch
            if index == 0:
                yield batch


class DeafToAccumulation(MlxPath):
    """Its loop updates after every micro-batch."""

    name = "deaf-to-accumulation"

    def loop(self, recipe, setup, batches):
        return super().loop(recipe.override({"train.accumulation": 1}), setup, batches)


class ClipInLoop(MlxPath):
    """Its loop clips by norm whatever the recipe says."""

    name = "clip-in-loop"

    def loop(self, recipe, setup, batches):
        import mlx.optimizers as optim

        setup.clip = lambda gradient: optim.clip_grad_norm(gradient, 0.5)[0]
        return super().loop(recipe, setup, batches)


class Uncompiled(MlxPath):
    """Its loop never compiles, and keeps no activations."""

    name = "uncompiled"

    def loop(self, recipe, setup, batches):
        import mlx.core as mx

        mx.disable_compile()
        try:
            return super().loop(
                recipe.override({"train.gradient_checkpointing": True}), setup, batches
            )
        finally:
            mx.enable_compile()


def summed(logits, ids, mask):
    import mlx.core as mx
    import mlx.nn as nn

    losses = nn.losses.cross_entropy(logits, ids[:, 1:]).astype(mx.float32)
    return (losses * mask).sum(), mask.sum()


def mask_of(ids, lengths):
    import mlx.core as mx

    steps = mx.arange(1, ids.shape[1])
    return mx.logical_and(steps >= lengths[:, 0:1], steps <= lengths[:, 1:])


class AveragesOverPadding(MlxPath):
    """Its loss is divided by all positions."""

    name = "averages-over-padding"

    def loss(self, recipe):
        def loss(model, ids, lengths):
            mask = mask_of(ids, lengths)
            total, tokens = summed(model(ids[:, :-1]), ids, mask)
            return total / mask.size, tokens

        return loss


class SmoothedLabels(MlxPath):
    """Its loss is another function of the logits of a token."""

    name = "smoothed-labels"

    def loss(self, recipe):
        import mlx.core as mx
        import mlx.nn as nn

        def loss(model, ids, lengths):
            logits, mask = model(ids[:, :-1]), mask_of(ids, lengths)
            losses = nn.losses.cross_entropy(logits, ids[:, 1:], label_smoothing=0.1)
            return (losses.astype(mx.float32) * mask).sum() / mask.sum(), mask.sum()

        return loss


class NoSafeSoftmax(MlxPath):
    """Its loss takes the exponential of the logits as they are."""

    name = "no-safe-softmax"

    def loss(self, recipe):
        import mlx.core as mx

        def loss(model, ids, lengths):
            logits, mask = model(ids[:, :-1]).astype(mx.float32), mask_of(ids, lengths)
            score = mx.take_along_axis(logits, ids[:, 1:, None], axis=-1)[..., 0]
            losses = mx.log(mx.exp(logits).sum(axis=-1)) - score
            return (losses * mask).sum() / mask.sum(), mask.sum()

        return loss


class WholeRowsOnly(MlxPath):
    """Its loss cannot be had for one token: rows of less than four tokens count for nothing."""

    name = "whole-rows-only"

    def loss(self, recipe):
        from mlx_lm.tuner.trainer import default_loss

        def loss(model, ids, lengths):
            import mlx.core as mx

            if ids.shape[1] < 8:
                logits = model(ids[:, :-1])
                return (logits * 0).sum(), mx.array(1)
            return default_loss(model, ids, lengths)

        return loss


class SeedsNowhere(MlxPath):
    """It sets no seed."""

    name = "seeds-nowhere"

    def seed(self, recipe):
        pass


class SeedsEarly(MlxPath):
    """It seeds before loading, whatever the recipe says."""

    name = "seeds-early"

    def setup(self, recipe, adapter=None):
        return super().setup(recipe.override({"seed.placement": "before_load"}), adapter)


class SilentConfig(MlxPath):
    """It reports one setting."""

    name = "silent-config"

    def config(self, recipe, inputs):
        from parity.trace import Trace

        return Trace(scalars={"optim.class": "AdamW"})


class HalfOfTheWeights(MlxPath):
    """One weight of the base is kept in half precision."""

    name = "half-of-the-weights"

    def load(self, recipe):
        import mlx.core as mx

        model, tokenizer = super().load(recipe)
        norm = model.layers[3].input_layernorm
        norm.weight = norm.weight.astype(mx.bfloat16)
        return model, tokenizer


class MoreHalfWeights(HalfOfTheWeights):
    """Two weights of the base are kept in half precision."""

    name = "more-half-weights"

    def load(self, recipe):
        import mlx.core as mx

        model, tokenizer = super().load(recipe)
        norm = model.layers[4].input_layernorm
        norm.weight = norm.weight.astype(mx.bfloat16)
        return model, tokenizer


class OneTensorOfZeros(MlxPath):
    """One `lora_a` starts at zero."""

    name = "one-tensor-of-zeros"

    def wire(self, model, recipe):
        super().wire(model, recipe)
        module = model.layers[7].self_attn.v_proj
        module.lora_a = module.lora_a * 0


class ThreeAtHalfScale(MlxPath):
    """Three `lora_a` are drawn from half the range."""

    name = "three-at-half-scale"

    def wire(self, model, recipe):
        super().wire(model, recipe)
        for index in (2, 9, 16):
            module = model.layers[index].mlp.up_proj
            module.lora_a = module.lora_a * 0.5


class ForeverTheSameRows(MlxPath):
    """It draws its first batch again and again."""

    name = "same-rows"

    def iterate(self, recipe, dataset):
        inner = super().iterate(recipe, dataset)
        return lambda: itertools.repeat(next(inner()))


class NeverTrains(MlxPath):
    """It has no training of its own."""

    name = "never-trains"

    def train(self, recipe, inputs):
        from parity.errors import Unsupported

        raise Unsupported("it cannot train")
