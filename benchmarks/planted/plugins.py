"""Mistakes in what users hand over as functions (`parity.plugin`): a loss, rows, batches, a whole loop."""

from __future__ import annotations

from typing import Any

from benchmarks.planted.registry import planted
from parity import plugin

ROWS = {"data.source": "mixed", "train.batch_size": 2}
HALF = {**ROWS, "train.accumulation": 2}


def _masked(model: Any, ids: Any, lengths: Any) -> tuple[Any, Any]:
    import mlx.core as mx
    import mlx.nn as nn

    steps = mx.arange(1, ids.shape[1])
    mask = (steps >= lengths[:, :1]) & (steps <= lengths[:, 1:])
    return nn.losses.cross_entropy(model(ids[:, :-1]), ids[:, 1:]), mask


@planted("loss", "cross_entropy", parts="loss", settings="loss.denominator", recipe=ROWS)
def divided_by_the_batch() -> Any:
    """The sum over a batch is divided by its rows, not by its tokens."""

    def per_row(model: Any, ids: Any, lengths: Any) -> Any:
        losses, mask = _masked(model, ids, lengths)
        return (losses * mask).sum() / ids.shape[0], mask.sum()

    return plugin.from_loss(per_row)


@planted("loss", "supervised_positions", parts="loss", settings="mask.supervised")
def shifted_by_two() -> Any:
    """Targets are shifted twice: each token is to predict the one after the next."""

    def two_ahead(model: Any, ids: Any, lengths: Any) -> Any:
        import mlx.core as mx
        import mlx.nn as nn

        logits, targets = model(ids[:, :-1])[:, :-1], ids[:, 2:]
        steps = mx.arange(1, targets.shape[1] + 1)
        mask = (steps >= lengths[:, :1]) & (steps <= lengths[:, 1:])
        losses = nn.losses.cross_entropy(logits, targets)
        return (losses * mask).sum() / mask.sum(), mask.sum()

    return plugin.from_loss(two_ahead)


@planted("loss", "cross_entropy", parts="loss")
def summed_in_bfloat16() -> Any:
    """Token losses are summed in bfloat16."""

    def in_half(model: Any, ids: Any, lengths: Any) -> Any:
        import mlx.core as mx

        losses, mask = _masked(model, ids, lengths)
        total = (losses.astype(mx.bfloat16) * mask).sum()
        return (total / mask.sum()).astype(mx.float32), mask.sum()

    return plugin.from_loss(in_half)


@planted("loss", "cross_entropy", {"8": 8.0, "20": 20.0}, parts="loss")
def capped_token_loss(most: float) -> Any:
    """The loss of a token is at most so much."""

    def capped(model: Any, ids: Any, lengths: Any) -> Any:
        import mlx.core as mx

        losses, mask = _masked(model, ids, lengths)
        return (mx.minimum(losses, most) * mask).sum() / mask.sum(), mask.sum()

    return plugin.from_loss(capped)


@planted("loss", "cross_entropy", {"1e-3": 1e-3, "1e-5": 1e-5}, parts="loss")
def confident_entropy(weight: float) -> Any:
    """The entropy of the prediction is subtracted, a penalty of confidence."""

    def penalised(model: Any, ids: Any, lengths: Any) -> Any:
        import mlx.core as mx
        import mlx.nn as nn

        logits = model(ids[:, :-1])
        _, mask = _masked(lambda _: logits, ids, lengths)
        losses = nn.losses.cross_entropy(logits, ids[:, 1:])
        chances = mx.softmax(logits, axis=-1)
        entropy = -(chances * mx.log(chances + 1e-12)).sum(-1)
        return ((losses - weight * entropy) * mask).sum() / mask.sum(), mask.sum()

    return plugin.from_loss(penalised)


@planted(
    "batching",
    "tokenization",
    parts="batching",
    recipe={**ROWS, "data.max_length": 12},
    settings="batch.rows batch.shapes mask.supervised",
)
def cut_from_the_left() -> Any:
    """Rows that are too long lose their beginning."""

    def rows_of(tokenizer: Any, rows: Any, max_length: int) -> Any:
        ids = [[*tokenizer.encode(row["text"]), tokenizer.eos_token_id] for row in rows]
        return [row[-max_length:] for row in ids]

    return plugin.from_parts(dataset=rows_of)


@planted(
    "batching",
    "supervised_positions",
    parts="batching",
    recipe=ROWS,
    settings="batch.pad_id batch.rows batch.shapes mask.supervised",
)
def padded_with_the_end() -> Any:
    """Rows are padded with the end-of-sequence id, one place of which is learned."""

    def draw(dataset: Any, tokenizer: Any, batch_size: int) -> Any:
        import mlx.core as mx
        import numpy as np

        for start in range(0, len(dataset) - batch_size + 1, batch_size):
            rows = [list(row)[:2048] for row in dataset[start : start + batch_size]]
            width = 1 + -(-max(map(len, rows)) // 32) * 32
            ids = np.full((batch_size, width), tokenizer.eos_token_id, np.int32)
            for line, row in zip(ids, rows, strict=True):
                line[: len(row)] = row
            yield mx.array(ids), mx.array([[0, len(row)] for row in rows])

    return plugin.from_parts(batches=draw)


@planted("optimizer", "optimizer_step", parts="optimizer", hints="bias_correction",
         settings="optim.bias_correction")  # fmt: skip
def optimizer_of_mlx_by_default() -> Any:
    """MLX's AdamW as a script makes it: without bias correction."""

    def made(lr: float) -> Any:
        import mlx.optimizers as optim

        return optim.AdamW(learning_rate=lr, weight_decay=0.0)

    return plugin.from_parts(optimizer=made)


def _loop(share: Any, clip_each: bool = False, late: bool = False) -> Any:
    """A loop with accumulation whose gradient is `share(count)` times the sum over micro-batches."""

    def run(
        model: Any,
        optimizer: Any,
        loss: Any,
        batches: Any,
        clip: Any,
        steps: int,
        accumulation: int,
    ) -> None:
        import mlx.core as mx
        import mlx.nn as nn
        from mlx.utils import tree_map

        value_and_grad = nn.value_and_grad(model, loss)
        model.train()
        batches = iter(batches)
        for _ in range(steps):
            total = None
            for _ in range(accumulation):
                _, gradient = value_and_grad(model, *next(batches))
                if clip_each and clip is not None:
                    gradient = clip(gradient)
                total = gradient if total is None else tree_map(lambda a, b: a + b, total, gradient)
                mx.eval(total)
            total = tree_map(lambda g: g * share(accumulation), total)
            if clip is not None and not clip_each:
                total = clip(total)
            optimizer.update(model, total)
            mx.eval(model.parameters(), optimizer.state)

    return run


def _by_norm(gradient: Any, clip_value: float) -> Any:
    import mlx.core as mx
    from mlx.utils import tree_flatten, tree_map

    norm = mx.sqrt(sum(mx.square(g).sum() for _, g in tree_flatten(gradient)))
    share = mx.minimum(1.0, clip_value / (norm + 1e-6))
    return tree_map(lambda g: g * share, gradient)


LOOP = "the loss that is reported|the gradient that the loop makes|the clip inside the loop"


@planted("loop", "loss_curve", parts="loop", recipe=HALF, steps=(1,), differs=LOOP,
         settings="accumulation.weighting train.compile")  # fmt: skip
def accumulated_sum() -> Any:
    """Gradients of micro-batches are added up and not averaged."""
    return plugin.from_parts(loop=_loop(lambda count: 1.0))


@planted("loop", "loss_curve", parts="loop", steps=(1,), differs=LOOP,
         recipe={**HALF, "optim.clip": "norm", "optim.clip_value": 0.3}, references=("hf",))  # fmt: skip
def clipped_before_averaging() -> Any:
    """Each micro-batch is clipped before the mean is taken."""
    return plugin.from_parts(loop=_loop(lambda count: 1 / count, clip_each=True))


@planted("harmless", references=("hf",), recipe=HALF)
def loop_by_hand() -> Any:
    """A loop with accumulation, nothing compiled."""
    return plugin.from_parts(loop=_loop(lambda count: 1 / count))


@planted("harmless", references=("hf",),
         recipe={**HALF, "optim.clip": "norm", "optim.clip_value": 0.3})  # fmt: skip
def loop_with_its_clip() -> Any:
    """The same, which clips the mean by a function of its own."""
    return plugin.from_parts(loop=_loop(lambda count: 1 / count), clip=_by_norm)


@planted("harmless", references=("hf",))
def loss_without_its_count() -> Any:
    """A loss of inputs and targets that returns no count of tokens."""

    def plain(model: Any, inputs: Any, targets: Any, lengths: Any) -> Any:
        import mlx.core as mx
        import mlx.nn as nn

        steps = mx.arange(1, targets.shape[1] + 1)
        mask = (steps >= lengths[:, :1]) & (steps <= lengths[:, 1:])
        return (nn.losses.cross_entropy(model(inputs), targets) * mask).sum() / mask.sum()

    return plugin.from_loss(plain)


@planted("harmless", references=("hf",), recipe={"optim.clip": "norm", "optim.clip_value": 0.5})
def clip_by_hand() -> Any:
    """A clip by norm written out in float32."""
    return plugin.from_parts(clip=_by_norm)
