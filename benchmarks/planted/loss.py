"""Faults in the loss: its reduction, its mask, its targets, its precision."""

from __future__ import annotations

from typing import Any

from benchmarks.planted.registry import planted
from parity.paths.mlx.path import MlxPath

ROWS = {"data.source": "mixed", "train.batch_size": 4}


def token_losses(model: Any, batch: Any, lengths: Any) -> tuple[Any, Any]:
    """Cross-entropy (B, T) float32 and the mask (B, T) of mlx-lm's loss."""
    import mlx.core as mx
    import mlx.nn as nn

    ids, targets = batch[:, :-1], batch[:, 1:]
    steps = mx.arange(1, targets.shape[1] + 1)
    mask = mx.logical_and(steps >= lengths[:, 0:1], steps <= lengths[:, 1:])
    return nn.losses.cross_entropy(model(ids), targets).astype(mx.float32), mask


@planted("loss", "cross_entropy", {"10 %": 1.1, "1e-3": 1.001, "1e-5": 1.00001}, parts="loss")
def scaled_loss(factor: float) -> type[MlxPath]:
    """The loss is multiplied by a factor."""

    class Path(MlxPath):
        def loss(self, recipe: Any) -> Any:
            inner = super().loss(recipe)

            def loss(model: Any, batch: Any, lengths: Any) -> Any:
                value, tokens = inner(model, batch, lengths)
                return factor * value, tokens

            return loss

    return Path


@planted(
    "loss",
    "cross_entropy",
    parts="loss",
    hints="averages_over_padding",
    settings="loss.denominator",
    recipe=ROWS,
)
def averaged_over_padding() -> type[MlxPath]:
    """The sum is divided by all positions, padding included."""

    class Path(MlxPath):
        def loss(self, recipe: Any) -> Any:
            def loss(model: Any, batch: Any, lengths: Any) -> Any:
                losses, mask = token_losses(model, batch, lengths)
                return (losses * mask).sum() / mask.size, mask.sum()

            return loss

    return Path


@planted("loss", "cross_entropy", parts="loss", settings="loss.denominator", recipe=ROWS)
def averaged_by_row() -> type[MlxPath]:
    """Each row is averaged by itself, then the rows: short rows count more."""

    class Path(MlxPath):
        def loss(self, recipe: Any) -> Any:
            def loss(model: Any, batch: Any, lengths: Any) -> Any:
                losses, mask = token_losses(model, batch, lengths)
                return ((losses * mask).sum(1) / mask.sum(1)).mean(), mask.sum()

            return loss

    return Path


@planted("loss", "cross_entropy", {"0.1": 0.1, "1e-3": 1e-3}, parts="loss")
def label_smoothing(amount: float) -> type[MlxPath]:
    """Labels are smoothed."""

    class Path(MlxPath):
        def loss(self, recipe: Any) -> Any:
            def loss(model: Any, batch: Any, lengths: Any) -> Any:
                import mlx.core as mx
                import mlx.nn as nn

                logits, targets = model(batch[:, :-1]), batch[:, 1:]
                steps = mx.arange(1, targets.shape[1] + 1)
                mask = mx.logical_and(steps >= lengths[:, 0:1], steps <= lengths[:, 1:])
                losses = nn.losses.cross_entropy(logits, targets, label_smoothing=amount)
                count = mask.sum()
                return (losses.astype(mx.float32) * mask).sum() / count, count

            return loss

    return Path


@planted(
    "loss",
    "supervised_positions",
    {"1e-2": 1e-2, "1e-5": 1e-5},
    parts="loss",
    settings="mask.supervised",
)
def z_loss(weight: float) -> type[MlxPath]:
    """The squared logarithm of the normaliser is added, of padding as well."""

    class Path(MlxPath):
        def loss(self, recipe: Any) -> Any:
            inner = super().loss(recipe)

            def loss(model: Any, batch: Any, lengths: Any) -> Any:
                import mlx.core as mx

                logits = model(batch[:, :-1])
                value, tokens = inner(lambda _: logits, batch, lengths)
                return value + weight * mx.logsumexp(logits, -1).square().mean(), tokens

            return loss

    return Path


@planted("loss", "cross_entropy", {"2 %": 1.02, "1e-4": 1.0001}, parts="loss")
def temperature(value: float) -> type[MlxPath]:
    """Logits are divided by a temperature."""

    class Path(MlxPath):
        def loss(self, recipe: Any) -> Any:
            inner = super().loss(recipe)
            return lambda model, batch, lengths: inner(lambda x: model(x) / value, batch, lengths)

    return Path


@planted("loss", "cross_entropy", parts="loss")
def capped_logits() -> type[MlxPath]:
    """Logits are soft-capped once more, at 30."""

    class Path(MlxPath):
        def loss(self, recipe: Any) -> Any:
            import mlx.core as mx

            inner = super().loss(recipe)
            return lambda model, batch, lengths: inner(
                lambda x: 30 * mx.tanh(model(x) / 30), batch, lengths
            )

    return Path


@planted("loss", "cross_entropy", parts="loss")
def loss_in_bfloat16() -> type[MlxPath]:
    """Logits are cast to bfloat16 before the loss."""

    class Path(MlxPath):
        def loss(self, recipe: Any) -> Any:
            import mlx.core as mx

            inner = super().loss(recipe)
            return lambda model, batch, lengths: inner(
                lambda x: model(x).astype(mx.bfloat16), batch, lengths
            )

    return Path


@planted(
    "loss",
    "supervised_positions",
    parts="loss",
    hints="padding_supervised",
    settings="mask.supervised",
)
def one_more_position() -> type[MlxPath]:
    """A second padding position is supervised."""

    class Path(MlxPath):
        def loss(self, recipe: Any) -> Any:
            import mlx.core as mx

            inner = super().loss(recipe)
            return lambda model, batch, lengths: inner(model, batch, lengths + mx.array([0, 1]))

    return Path


@planted(
    "loss", "supervised_positions", parts="loss", hints="last_token", settings="mask.supervised"
)
def last_token_missing() -> type[MlxPath]:
    """The last token of a row, and what follows, are not supervised."""

    class Path(MlxPath):
        def loss(self, recipe: Any) -> Any:
            import mlx.core as mx

            inner = super().loss(recipe)
            return lambda model, batch, lengths: inner(model, batch, lengths - mx.array([0, 2]))

    return Path


@planted(
    "loss", "supervised_positions", parts="loss", hints="prompt_offset", settings="mask.supervised"
)
def first_token_missing() -> type[MlxPath]:
    """The first target of a row is not supervised."""

    class Path(MlxPath):
        def loss(self, recipe: Any) -> Any:
            import mlx.core as mx

            inner = super().loss(recipe)

            def loss(model: Any, batch: Any, lengths: Any) -> Any:
                first = mx.maximum(lengths[:, :1], 1) + 1
                return inner(model, batch, mx.concatenate([first, lengths[:, 1:]], axis=1))

            return loss

    return Path


@planted("loss", "supervised_positions", parts="loss")
def predicts_the_input() -> type[MlxPath]:
    """Targets are not shifted: each token is to predict itself."""

    class Path(MlxPath):
        def loss(self, recipe: Any) -> Any:
            inner = super().loss(recipe)

            def loss(model: Any, batch: Any, lengths: Any) -> Any:
                import mlx.core as mx

                logits = model(batch[:, :-1])
                same = mx.concatenate([batch[:, :1], batch[:, :-1]], axis=1)
                return inner(lambda _: logits, same, lengths)

            return loss

    return Path


@planted("loss", "supervised_positions", parts="loss", settings="mask.supervised")
def end_of_sequence_ignored() -> type[MlxPath]:
    """Targets that are an end-of-sequence or padding id below 3 are left out."""

    class Path(MlxPath):
        def loss(self, recipe: Any) -> Any:
            def loss(model: Any, batch: Any, lengths: Any) -> Any:
                losses, mask = token_losses(model, batch, lengths)
                mask = mask * (batch[:, 1:] > 2)
                count = mask.sum()
                return (losses * mask).sum() / count, count

            return loss

    return Path


@planted("loss", "cross_entropy", {"2": 2.0, "0.01": 0.01}, parts="loss")
def focal(gamma: float) -> type[MlxPath]:
    """Tokens that are known already are weighted down."""

    class Path(MlxPath):
        def loss(self, recipe: Any) -> Any:
            def loss(model: Any, batch: Any, lengths: Any) -> Any:
                import mlx.core as mx

                losses, mask = token_losses(model, batch, lengths)
                losses = losses * mx.power(mx.maximum(1 - mx.exp(-losses), 1e-6), gamma)
                count = mask.sum()
                return (losses * mask).sum() / count, count

            return loss

    return Path
