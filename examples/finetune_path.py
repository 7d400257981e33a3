"""The script `finetune.py` as a path of mlx-parity."""

import finetune

from parity import plugin


def run(path, folder, out, steps, lr, rank, scale, batch_size, seed):
    finetune.train(path, folder, out, steps, lr, rank, scale, batch_size, seed)


Finetune = plugin.from_trainer(run, name="finetune", batches=finetune.batches)
