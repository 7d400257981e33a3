"""A recipe as TRL takes it: options of SFTConfig; and its defaults as factors."""

from __future__ import annotations

import tempfile
from typing import Any

from parity.paths.documentation import documented
from parity.paths.hf.live import Batch, device
from parity.recipe import Recipe

OPTIONS = {
    "adam_epsilon": "optim.eps",
    "weight_decay": "optim.weight_decay",
    "lr_scheduler_type": "optim.schedule",
    "warmup_steps": "optim.warmup_steps",
    "max_grad_norm": "optim.clip_value",
    "gradient_accumulation_steps": "train.accumulation",
    "gradient_checkpointing": "train.gradient_checkpointing",
    "bf16": "train.autocast",
    "max_length": "data.max_length",
}
"""Options of SFTConfig → factors."""


def shipped() -> dict[str, Any]:
    """Factors as the live SFTConfig has them by default."""
    from trl import SFTConfig

    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(output_dir=folder, use_cpu=device().type == "cpu")
    clip = {"optim.clip_value": args.max_grad_norm} if args.max_grad_norm else {}
    return {
        "optim.name": "adamw" if str(args.optim.value).startswith("adamw") else args.optim,
        "optim.betas": (args.adam_beta1, args.adam_beta2),
        "optim.eps": args.adam_epsilon,
        "optim.weight_decay": args.weight_decay,
        "optim.bias_correction": True,
        "optim.schedule": args.lr_scheduler_type.value,
        "optim.warmup_steps": int(args.warmup_steps),
        "optim.clip": "norm" if clip else "none",
        **clip,
        "train.accumulation": args.gradient_accumulation_steps,
        "train.accumulation_weighting": "token",
        "train.gradient_checkpointing": args.gradient_checkpointing,
        "train.autocast": "bfloat16" if args.bf16 else "none",
        "mask.prompt": bool(args.completion_only_loss),
        "mask.start_shift": 0,
        "mask.end_shift": 0,
        "data.max_length": args.max_length,
        "data.pad_multiple": args.pad_to_multiple_of or 1,
        "data.pad_extra": 0,
        "data.append_eos": True,
        # As in its examples, which name a checkpoint: seed, load, adapt.
        "seed.placement": "before_load",
    }


def documents() -> dict[str, Any]:
    """Factors as the docstring of SFTConfig gives them, else that of what it is made from."""
    from transformers import TrainingArguments
    from trl import SFTConfig

    texts = [SFTConfig.__doc__, TrainingArguments.__doc__]
    found = documented(texts, OPTIONS)
    betas = documented(texts, {"adam_beta1": "0", "adam_beta2": "1"})
    if len(betas) == 2:
        found["optim.betas"] = tuple(betas.values())
    if "train.autocast" in found:
        found["train.autocast"] = "bfloat16" if found["train.autocast"] is True else "none"
    return found


def arguments(recipe: Recipe, batches: list[Batch] | None, early: bool) -> dict[str, Any]:
    """SFTConfig: every option that matters is named, none left to a default."""
    o, t, d = recipe.optim, recipe.train, recipe.data
    handed: dict[str, Any] = {
        "per_device_train_batch_size": len(batches[0][0]),
        "train_sampling_strategy": "sequential",
        "pad_to_multiple_of": None,
        "dataset_kwargs": {"skip_prepare_dataset": True},
    } if batches else {"per_device_train_batch_size": t.batch_size}  # fmt: skip
    return {
        "use_cpu": device().type == "cpu",
        "bf16": t.autocast == "bfloat16",
        "gradient_checkpointing": t.gradient_checkpointing,
        "max_steps": t.steps,
        "gradient_accumulation_steps": t.accumulation,
        # Not the fused kernel, which rounds differently.
        "optim": "sgd" if o.name == "sgd" else "adamw_torch",
        "learning_rate": o.lr,
        "adam_beta1": o.betas[0],
        "adam_beta2": o.betas[1],
        "adam_epsilon": o.eps,
        "weight_decay": o.weight_decay,
        "lr_scheduler_type": "constant_with_warmup" if o.schedule == "constant" else o.schedule,
        "warmup_steps": o.warmup_steps,
        "max_grad_norm": o.clip_value if o.clip == "norm" else 0.0,
        "seed": recipe.seed.value,
        "data_seed": recipe.seed.data,
        "max_length": d.max_length,
        "pad_to_multiple_of": d.pad_multiple if d.pad_multiple > 1 else None,
        "completion_only_loss": recipe.mask.prompt,
        "packing": False,
        "model_init_kwargs": {
            "dtype": recipe.model.dtype,
            "attn_implementation": "eager",
            "device_map": None,
        }
        if early
        else None,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        **handed,
    }
