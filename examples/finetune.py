"""A script that fine-tunes a model with LoRA. It knows nothing of mlx-parity."""

import json
import random
import sys
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm import load
from mlx_lm.tuner.utils import linear_to_lora_layers


def batches(rows, batch_size, seed):
    order = random.Random(seed)
    while True:
        picked = [rows[index] for index in order.sample(range(len(rows)), batch_size)]
        ids = np.zeros((batch_size, max(map(len, picked)) + 1), np.int32)
        for line, row in zip(ids, picked, strict=True):
            line[: len(row)] = row
        yield mx.array(ids), mx.array([[0, len(row)] for row in picked])


def loss_fn(model, ids, lengths):
    steps = mx.arange(1, ids.shape[1])
    mask = (steps >= lengths[:, :1]) & (steps <= lengths[:, 1:])
    losses = nn.losses.cross_entropy(model(ids[:, :-1]), ids[:, 1:])
    return (losses * mask).mean()


def train(model_path, data, out, steps=100, lr=1e-3, rank=8, scale=2.0, batch_size=6, seed=0):
    mx.random.seed(seed)
    model, tokenizer = load(model_path)
    model.freeze()
    linear_to_lora_layers(model, -1, {"rank": rank, "scale": scale, "dropout": 0.0})
    lines = Path(data, "train.jsonl").read_text().splitlines()
    rows = [[*tokenizer.encode(json.loads(x)["text"]), tokenizer.eos_token_id] for x in lines]
    optimizer = optim.AdamW(learning_rate=lr, weight_decay=0.0)
    state, loss_and_grad = [model.state, optimizer.state], nn.value_and_grad(model, loss_fn)

    @partial(mx.compile, inputs=state, outputs=state)
    def step(ids, lengths):
        loss, gradient = loss_and_grad(model, ids, lengths)
        optimizer.update(model, gradient)
        return loss

    for number, batch in zip(range(steps), batches(rows, batch_size, seed), strict=False):
        loss = step(*batch)
        mx.eval(state, loss)
        print(number + 1, loss.item())
    adapter = dict(tree_flatten(model.trainable_parameters()))
    mx.save_safetensors(f"{out}/adapters.safetensors", adapter)


if __name__ == "__main__":
    train(*sys.argv[1:])
