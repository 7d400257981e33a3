"""The trainer of unsloth-zoo with parts of mlx-lm's stack, sound and faulty, and the other way round."""

from unittest import mock

from parity.paths.mlx import live as _mlx
from parity.paths.mlx.path import MlxPath
from parity.paths.unsloth.path import UnslothPath


class Faulty(MlxPath):
    def loss(self, recipe):
        own = super().loss(recipe)

        def loss(model, ids, lengths):
            value, tokens = own(model, ids, lengths)
            return 1.01 * value, tokens

        return loss

    def clip(self, recipe):
        import mlx.optimizers as optim

        return lambda gradient: optim.clip_grad_norm(gradient, 1e-9)[0]

    def optimizer(self, recipe):
        return super().optimizer(recipe.override({"optim.bias_correction": False}))


def hybrid(name, home, donor, *parts):
    class Hybrid(home):
        def __init__(self, cache):
            super().__init__(cache)
            self.donors = {part: donor(cache) for part in parts}

    Hybrid.__name__ = Hybrid.__qualname__ = name
    return Hybrid


PARTS = ("loader", "wiring", "batching", "loss", "clip", "optimizer")
Borrowed = hybrid("Borrowed", UnslothPath, MlxPath, *PARTS)
Lent = hybrid("Lent", MlxPath, UnslothPath, *PARTS)
FaultyLoss = hybrid("FaultyLoss", UnslothPath, Faulty, "loss")
FaultyClip = hybrid("FaultyClip", UnslothPath, Faulty, "clip")
FaultyOptimizer = hybrid("FaultyOptimizer", UnslothPath, Faulty, "optimizer")


class ConstantNorm(UnslothPath):
    """Reads something else where the gradient norm should be."""

    def loop(self, recipe, setup, batches):
        import mlx.core as mx

        with mock.patch.object(_mlx, "gradient_norm", lambda _: mx.array(0.5)):
            return super().loop(recipe, setup, batches)
