"""The `mlx` path with one thing planted in it that only one family of models has."""

from __future__ import annotations

from benchmarks.planted.tools import call
from parity.errors import UnmatchedNames, Unsupported
from parity.paths.mlx.path import MlxPath

LAYER = 5


class FrozenExperts(MlxPath):
    """LoRA on experts is there, and not trained."""

    name = "frozen-experts"

    def wire(self, model, recipe):
        super().wire(model, recipe)
        for layer in model.layers:
            layer.mlp.switch_mlp.freeze()


class WithoutExperts(MlxPath):
    """Experts are targets by name and get no adapter."""

    name = "without-experts"

    def wire(self, model, recipe):
        super().wire(model, recipe)
        for layer in model.layers:
            layer.mlp.switch_mlp.down_proj = layer.mlp.switch_mlp.down_proj.linear
            layer.mlp.switch_mlp.freeze()


class LeftOutAsWell(WithoutExperts):
    """The same under another name, so that the two can be compared."""

    name = "left-out-as-well"


class LoudExperts(MlxPath):
    """The experts of the first layer give a thousandth more."""

    name = "loud-experts"

    def load(self, recipe):
        model, tokenizer = super().load(recipe)
        down = model.layers[0].mlp.switch_mlp.down_proj
        down.weight = down.weight * 1.001
        return model, tokenizer


class UntrainedExpert(MlxPath):
    """Of one layer's experts one gets no gradient."""

    name = "untrained-expert"

    def wire(self, model, recipe):
        import mlx.core as mx

        super().wire(model, recipe)
        down = model.layers[LAYER].mlp.switch_mlp.down_proj
        trained = (mx.arange(down.num_experts) != 3)[:, None, None]

        def run(own, module, *args, **kwargs):
            kept = module.lora_a, module.lora_b
            module.lora_a, module.lora_b = (
                mx.where(trained, factor, mx.stop_gradient(factor)) for factor in kept
            )
            result = own(*args, **kwargs)
            module.lora_a, module.lora_b = kept
            return result

        call(down, run)


class HalfRouter(MlxPath):
    """The router of one layer computes in bfloat16."""

    name = "half-router"

    def load(self, recipe):
        import mlx.core as mx

        model, tokenizer = super().load(recipe)

        def run(own, module, x):
            return (x.astype(mx.bfloat16) @ module.weight.T.astype(mx.bfloat16)).astype(x.dtype)

        call(model.layers[LAYER].mlp.gate, run)
        return model, tokenizer


class RandomMagnitude(MlxPath):
    """DoRA's magnitudes of one layer are the norms of random weights of their shape."""

    name = "random-magnitude"

    def wire(self, model, recipe):
        import mlx.core as mx
        import mlx.nn as nn

        super().wire(model, recipe)
        module = model.layers[-1].self_attn.o_proj
        outputs, inputs = module.linear.weight.shape
        module.m = mx.linalg.norm(nn.Linear(inputs, outputs).weight, axis=1)


class WrongGroups(MlxPath):
    """The weights are quantized in groups of 32, whatever the recipe says."""

    name = "wrong-groups"

    def load(self, recipe):
        return super().load(recipe.override({"model.group_size": 32}))


class TransposedProduct(MlxPath):
    """The gradient of one quantized product goes through the weight the wrong way round."""

    name = "transposed-product"

    def wire(self, model, recipe):
        import mlx.core as mx

        super().wire(model, recipe)

        @mx.custom_function
        def product(x, weight):
            return x @ weight.T

        @product.vjp
        def product_vjp(primals, cotangents, outputs):
            return cotangents @ primals[1].T, mx.zeros_like(primals[1])

        def run(own, module, x):
            parts = module.weight, module.scales, module.biases
            weight = mx.dequantize(*parts, module.group_size, module.bits)
            wrong = product(x, weight)
            # Nothing is added to the output, and all of the gradient comes this way.
            return own(mx.stop_gradient(x)) + (wrong - mx.stop_gradient(wrong))

        call(model.layers[9].self_attn.o_proj.linear, run)


class IgnoredDora(MlxPath):
    """DoRA is asked for and LoRA is what comes."""

    name = "ignored-dora"

    def wire(self, model, recipe):
        super().wire(model, recipe.override({"lora.kind": "lora"}))


class FloatEmbedding(MlxPath):
    """The embedding is not packed, as where a loader leaves it out."""

    name = "float-embedding"

    def load(self, recipe):
        model, tokenizer = super().load(recipe)
        whole = super().load(recipe.override({"model.quantization": "stored"}))[0]
        model.model.embed_tokens = whole.model.embed_tokens
        return model, tokenizer


class SilentFloatEmbedding(FloatEmbedding):
    """It tells no settings."""

    name = "silent-float-embedding"

    def config(self, recipe, inputs):
        raise Unsupported("no settings")


class UnmatchedFloatEmbedding(FloatEmbedding):
    """A part of its model gets no gradient, so that its settings cannot be measured."""

    name = "unmatched-float-embedding"

    def config(self, recipe, inputs):
        raise UnmatchedNames("12 trainable tensors have no gradient")


class HalfNormAndFloatEmbedding(FloatEmbedding):
    """A final norm that is half too large as well."""

    name = "half-norm"

    def load(self, recipe):
        model, tokenizer = super().load(recipe)
        model.model.norm.weight = model.model.norm.weight * 1.5
        return model, tokenizer


class WideProjection(MlxPath):
    """One projection is packed with eight bits, the others with four."""

    name = "wide-projection"

    def load(self, recipe):
        model, tokenizer = super().load(recipe)
        whole = super().load(recipe.override({"model.quantization": "stored"}))[0]
        mlp = model.model.layers[LAYER].mlp
        mlp.down_proj = whole.model.layers[LAYER].mlp.down_proj.to_quantized(64, 8)
        return model, tokenizer


class TwoKindsOfLayers(MlxPath):
    """Every second layer is of another class, as in some hybrids, and `grad_checkpoint` changes one class."""

    name = "two-kinds-of-layers"

    def load(self, recipe):
        model, tokenizer = super().load(recipe)
        kind = type(model.layers[0])
        other = type("OtherLayer", (kind,), {"__call__": kind.__call__})
        for layer in model.layers[1::2]:
            layer.__class__ = other
        return model, tokenizer


class DeltaWithoutDecay(MlxPath):
    """One gated delta network forgets nothing of its state."""

    name = "delta-without-decay"

    def load(self, recipe):
        model, tokenizer = super().load(recipe)
        network = model.layers[LAYER].linear_attn
        network.A_log = network.A_log - 100.0
        return model, tokenizer
