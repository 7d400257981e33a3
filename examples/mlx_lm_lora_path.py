"""The SFT command of mlx-lm-lora as a path: `pip install --no-deps mlx-lm-lora`."""

import types
from functools import partial
from unittest import mock

from parity import plugin


def run(path, folder, out, batches, seed, rank, scale, dropout, num_layers, prompt, lr, optim_name, betas,
        eps, weight_decay, bias_correction, steps, accumulation, batch_size, max_length,
        gradient_checkpointing):  # fmt: skip
    import mlx.core as mx
    from mlx_lm_lora import train

    adam = {"betas": betas, "eps": eps, "bias_correction": bias_correction}
    adam |= {"weight_decay": weight_decay} if optim_name == "adamw" else {}
    options = train.CONFIG_DEFAULTS | {
        "model": path, "data": folder, "adapter_path": out, "train": True, "fuse": False, "wandb": None,
        "lora_parameters": {"rank": rank, "scale": scale, "dropout": dropout}, "num_layers": num_layers,
        "optimizer": optim_name, "optimizer_config": {optim_name: adam}, "learning_rate": lr, "seed": seed,
        "iters": steps * accumulation, "gradient_accumulation_steps": accumulation, "val_batches": 0,
        "batch_size": batch_size, "max_seq_length": max_length, "mask_prompt": prompt,
        "grad_checkpoint": gradient_checkpointing}  # fmt: skip
    handed = {"iterate_batches": lambda **_: batches} if batches else {}
    sft = mock.patch.object(train, "train_sft", partial(train.train_sft, **handed))
    # It sets a limit for Metal's memory, which a machine without Metal does not report.
    device = {"max_recommended_working_set_size": 0} | mx.device_info()
    with sft, mock.patch.object(mx, "device_info", lambda: device):
        train.run(types.SimpleNamespace(**options))


MlxLmLora = plugin.from_trainer(run, name="mlx-lm-lora", packages=("mlx-lm-lora",))
