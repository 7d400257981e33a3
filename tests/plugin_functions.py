"""What a user has: functions of a trainer, none of which knows of this package."""

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim


def padding_averaged(model, ids, lengths):
    """Masked, but divided by all positions."""
    steps = mx.arange(1, ids.shape[1])
    mask = (steps >= lengths[:, :1]) & (steps <= lengths[:, 1:])
    losses = nn.losses.cross_entropy(model(ids[:, :-1]), ids[:, 1:])
    return (losses * mask).sum() / mask.size


def padding_supervised(model, inputs, targets):
    """Every position counts, whatever stands there."""
    return nn.losses.cross_entropy(model(inputs), targets, reduction="mean")


def with_mask(model, inputs, targets, mask):
    losses = nn.losses.cross_entropy(model(inputs), targets)
    return (losses * mask).sum() / mask.sum(), mask.sum()


def adam(lr):
    """MLX's default: without bias correction."""
    return optim.Adam(learning_rate=lr)


def halved(gradient):
    from mlx.utils import tree_map

    return tree_map(lambda g: g / 2, gradient)


def no_eos(tokenizer, rows):
    return [tokenizer.encode(row["text"]) for row in rows]


def in_order(dataset, batch_size):
    """One epoch in the order of the file, padded to the longest row."""
    import numpy as np

    for start in range(0, len(dataset) - batch_size + 1, batch_size):
        rows = dataset[start : start + batch_size]
        ids = np.zeros((len(rows), max(map(len, rows)) + 1), np.int32)
        for line, row in zip(ids, rows, strict=True):
            line[: len(row)] = row
        yield mx.array(ids), mx.array([[0, len(row)] for row in rows])


def needs_a_thing(lr, gadget):
    raise AssertionError("never called")


def mask(ids, lengths):
    steps = mx.arange(1, ids.shape[1])
    return (steps >= lengths[:, :1]) & (steps <= lengths[:, 1:])


def no_prompts(model, ids, lengths):
    """As mlx-lm's, for a trainer that learns its prompts."""
    steps = mx.arange(1, ids.shape[1])
    counted = steps <= lengths[:, 1:]
    losses = nn.losses.cross_entropy(model(ids[:, :-1]), ids[:, 1:])
    return (losses * counted).sum() / counted.sum()


def plain_loop(model, optimizer, loss, batches, steps):
    """One micro-batch a step, nothing compiled."""
    value_and_grad = nn.value_and_grad(model, loss)
    model.train()
    for _, batch in zip(range(steps), batches, strict=False):
        _, gradient = value_and_grad(model, *batch)
        optimizer.update(model, gradient)
        mx.eval(model.parameters(), optimizer.state)


def save_adapter(model, folder, rank, scale, num_layers):
    """The files of mlx-lm, written by hand."""
    import json
    from pathlib import Path

    from mlx.utils import tree_flatten

    tensors = dict(tree_flatten(model.trainable_parameters()))
    mx.save_safetensors(str(Path(folder) / "adapters.safetensors"), tensors)
    lora = {"rank": rank, "scale": scale, "dropout": 0.0}
    settings = {"fine_tune_type": "lora", "num_layers": num_layers, "lora_parameters": lora}
    (Path(folder) / "adapter_config.json").write_text(json.dumps(settings))


def save_without_scale(model, folder, rank, num_layers):
    save_adapter(model, folder, rank, 20.0, num_layers)


def read_adapter(model, folder):
    """In the place of mlx-lm's, which it calls."""
    from mlx_lm.tuner.utils import load_adapters

    return load_adapters(model, folder)


def read_nothing(model):
    """The base is what it gives."""


def fuse_layers(model, dequantize):
    from mlx.utils import tree_unflatten

    layers = [
        (n, m.fuse(dequantize=dequantize)) for n, m in model.named_modules() if hasattr(m, "fuse")
    ]
    model.update_modules(tree_unflatten(layers))


def fuse_nothing(model):
    from mlx_lm.tuner.utils import remove_lora_layers

    return remove_lora_layers(model)
