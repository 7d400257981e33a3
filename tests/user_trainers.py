"""Small trainers, each written as somebody might write it."""

from functools import partial
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map
from mlx_lm import load
from mlx_lm.tuner.utils import linear_to_lora_layers

from parity import plugin


def loss_fn(model, ids, lengths):
    steps = mx.arange(1, ids.shape[1])
    mask = (steps >= lengths[:, :1]) & (steps <= lengths[:, 1:])
    tokens = mask.sum()
    return (nn.losses.cross_entropy(model(ids[:, :-1]), ids[:, 1:]) * mask).sum() / tokens, tokens


def draw(rows, batch_size):
    while True:
        for start in range(0, len(rows) - batch_size + 1, batch_size):
            picked = rows[start : start + batch_size]
            ids = np.zeros((batch_size, max(map(len, picked)) + 1), np.int32)
            for line, row in zip(ids, picked, strict=True):
                line[: len(row)] = row
            yield mx.array(ids), mx.array([[0, len(row)] for row in picked])


def prepared(path, texts, seed, rank, scale):
    model, tokenizer = load(path)
    mx.random.seed(seed)
    model.freeze()
    linear_to_lora_layers(model, -1, {"rank": rank, "scale": scale, "dropout": 0.0})
    return model, [[*tokenizer.encode(row["text"]), tokenizer.eos_token_id] for row in texts]


def eager(path, rows, out, steps, lr, rank, scale, batch_size, seed):
    """A loop without a compiled step, whose loss has the model from elsewhere."""
    model, tokens = prepared(path, rows, seed, rank, scale)
    optimizer = optim.AdamW(learning_rate=lr, weight_decay=0.0, bias_correction=True)
    step = nn.value_and_grad(model, lambda ids, lengths: loss_fn(model, ids, lengths))
    for _, (ids, lengths) in zip(range(steps), draw(tokens, batch_size), strict=False):
        _, gradient = step(ids, lengths)
        optimizer.update(model, gradient)
        mx.eval(model.parameters(), optimizer.state)
    mx.save_safetensors(f"{out}/a.safetensors", dict(tree_flatten(model.trainable_parameters())))


def accumulating(path, rows, steps, lr, rank, scale, batch_size, seed, accumulation, clipped=0.25):
    """Adds gradients up without dividing by their number, and clips the sum by its norm."""
    model, tokens = prepared(path, rows, seed, rank, scale)
    optimizer = optim.SGD(learning_rate=lr)
    value_and_grad = nn.value_and_grad(model, loss_fn)
    state = [model.state, optimizer.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def step(batch, before, update):
        (loss, _), gradient = value_and_grad(model, *batch)
        if before is not None:
            gradient = tree_map(lambda a, b: a + b, gradient, before)
        if not update:
            return loss, gradient
        optimizer.update(model, optim.clip_grad_norm(gradient, clipped)[0])
        return loss, None

    batches, gradient = draw(tokens, batch_size), None
    for number in range(steps * accumulation):
        loss, gradient = step(next(batches), gradient, (number + 1) % accumulation == 0)
        mx.eval(state, loss, gradient)


def clipping_by_itself(path, rows, steps, lr, rank, scale, batch_size, seed, accumulation):
    """As `accumulating`, with a clip of its own."""
    own = lambda gradient, _: (tree_map(lambda g: mx.clip(g, -1e-3, 1e-3), gradient), None)  # noqa: E731
    with mock.patch.object(optim, "clip_grad_norm", own):
        accumulating(path, rows, steps, lr, rank, scale, batch_size, seed, accumulation)


def without_value_and_grad(path, rows, steps):
    load(path)


def made_inside(path, rows, steps, seed):
    """Its `value_and_grad` is made anew in each compiled step."""
    model, tokens = prepared(path, rows, seed, 8, 2.0)
    optimizer = optim.SGD(learning_rate=0.1)
    state = [model.state, optimizer.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def step(ids, lengths):
        (loss, _), gradient = nn.value_and_grad(model, loss_fn)(model, ids, lengths)
        optimizer.update(model, gradient)
        return loss

    for _, batch in zip(range(steps), draw(tokens, 6), strict=False):
        mx.eval(step(*batch), state)


def tired(path, rows, out, steps, lr, rank, scale, batch_size, seed):
    """Ends after two updates."""
    eager(path, rows, out, 2, lr, rank, scale, batch_size, seed)


def crooked(model, ids, weights):
    return nn.losses.cross_entropy(model(ids), weights, reduction="mean")


def misread(path, rows, steps, seed):
    """What its loss takes cannot be told from the names."""
    model, tokens = prepared(path, rows, seed, 8, 2.0)
    step, optimizer = nn.value_and_grad(model, crooked), optim.SGD(learning_rate=0.1)
    for _, (ids, _) in zip(range(steps), draw(tokens, 6), strict=False):
        optimizer.update(model, step(model, ids[:, :-1], ids[:, 1:])[1])


def late_seed(path, rows, steps, seed):
    """Sets its seed when the adapter has been drawn."""
    model, tokenizer = load(path)
    model.freeze()
    linear_to_lora_layers(model, -1, {"rank": 8, "scale": 2.0, "dropout": 0.0})
    mx.random.seed(seed)
    tokens = [tokenizer.encode(row["text"]) for row in rows]
    step, optimizer = nn.value_and_grad(model, loss_fn), optim.SGD(learning_rate=0.1)
    for _, batch in zip(range(steps), draw(tokens, 6), strict=False):
        optimizer.update(model, step(model, *batch)[1])


LateSeed = plugin.from_trainer(late_seed)
Eager = plugin.from_trainer(eager, batches=draw)
Accumulating = plugin.from_trainer(accumulating, batches=draw)
ClippingByItself = plugin.from_trainer(clipping_by_itself, batches=draw)
Without = plugin.from_trainer(without_value_and_grad)
Inside = plugin.from_trainer(made_inside)
Tired = plugin.from_trainer(tired)
Misread = plugin.from_trainer(misread)


def decaying(path, rows, out, steps, lr, rank, scale, batch_size, seed):
    """Decays its weights by hand, beside its optimizer."""
    original = optim.AdamW.update

    def update(self, model, gradient):
        original(self, model, gradient)
        model.update(tree_map(lambda p: p * 0.999, model.trainable_parameters()))

    with mock.patch.object(optim.AdamW, "update", update):
        eager(path, rows, out, steps, lr, rank, scale, batch_size, seed)


def two_files(path, rows, out, steps, lr, rank, scale, batch_size, seed):
    """Leaves its adapter twice, and no configuration."""
    eager(path, rows, out, steps, lr, rank, scale, batch_size, seed)
    mx.save_safetensors(f"{out}/b.safetensors", {"a": mx.zeros(1)})


@mx.compile
def compiled_early(ids):
    return STEP[0](ids)


STEP = [None]


def early(path, rows, steps, seed):
    """Its step was compiled when this module was imported."""
    model, tokens = prepared(path, rows, seed, 8, 2.0)
    value_and_grad = nn.value_and_grad(model, lambda ids: model(ids).mean())
    STEP[0] = lambda ids: value_and_grad(ids)[0]
    optimizer = optim.SGD(learning_rate=0.1)
    for _, (ids, _) in zip(range(steps), draw(tokens, 6), strict=False):
        mx.eval(compiled_early(ids))
        optimizer.update(model, value_and_grad(ids)[1])


def other(rows, batch_size):
    yield from draw(rows, batch_size)


def nothing_drawn(dataset):
    return iter(())


def another_model(model):
    return nn.Linear(2, 2)


def shapeless(dataset, batch_size):
    while True:
        yield mx.zeros((2, 3, 4), mx.int32), mx.array([[0, 3], [0, 3]])


Decaying = plugin.from_trainer(decaying, batches=draw)
TwoFiles = plugin.from_trainer(two_files, batches=draw)
Early = plugin.from_trainer(early)
WrongDraw = plugin.from_trainer(eager, name="wrong-draw", batches=other)
NothingDrawn = plugin.from_parts(batches=nothing_drawn)
AnotherModel = plugin.from_parts(wire=another_model)
Shapeless = plugin.from_parts(batches=shapeless)
