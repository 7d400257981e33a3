"""A recipe as unsloth-zoo takes it: arguments of its loader, its adapter wiring, its trainer."""

from __future__ import annotations

from typing import Any

from parity import resources
from parity.errors import Unsupported
from parity.paths.describe import defaults
from parity.paths.documentation import documented
from parity.paths.unsloth.knobs import UnslothKnobs
from parity.paths.unsloth.library import PACKAGE, Library
from parity.recipe import Recipe

# What a release does that lacks one of the newer fields.
ABSENT: dict[str, Any] = {
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "append_eos": True,
    "completion_only_loss": False,
    "cast_norm_output_to_input_dtype": False,
}


def loading(recipe: Recipe) -> dict[str, Any]:
    """Arguments of `FastMLXModel.from_pretrained`."""
    return {
        "model_name": resources.model_dir(recipe.model.source),
        "max_seq_length": recipe.data.max_length,
        "dtype": recipe.model.dtype,
        "load_in_4bit": recipe.knobs(UnslothKnobs).load_in_4bit,
        "text_only": True,
        "patch_mode": recipe.knobs(UnslothKnobs).patch_mode,
        "random_state": recipe.seed.value,
    }


def wiring(recipe: Recipe) -> dict[str, Any]:
    """Arguments of `FastMLXModel.get_peft_model`.

    All are passed whatever its signature says: one that a release ignores is a finding.
    """
    lora = recipe.lora
    return {
        "r": lora.rank,
        "target_modules": list(lora.target_modules),
        "lora_alpha": lora.scale * lora.rank,
        "lora_dropout": lora.dropout,
        "use_dora": lora.kind == "dora",
        "use_gradient_checkpointing": recipe.train.gradient_checkpointing,
        "random_state": recipe.seed.value,
        "max_seq_length": recipe.data.max_length,
        "finetune_last_n_layers": None if lora.num_layers < 0 else lora.num_layers,
    }


def training(found: Library, recipe: Recipe, folder: str) -> Any:
    """The live `MLXTrainingConfig` of a recipe."""
    o, t, seed = recipe.optim, recipe.train, recipe.seed
    wanted: dict[str, Any] = {
        "per_device_train_batch_size": t.batch_size,
        "gradient_accumulation_steps": t.accumulation,
        "max_steps": t.steps,
        "num_train_epochs": -1,
        "warmup_steps": o.warmup_steps,
        "learning_rate": o.lr,
        "lr_scheduler_type": _schedule(found, recipe),
        "optim": o.name,
        "weight_decay": o.weight_decay,
        "seed": seed.value if seed.data is None else seed.data,
        "logging_steps": 1,
        "output_dir": folder,
        "report_to": "none",
        "save_steps": 0,
        "eval_steps": 0,
        "max_seq_length": recipe.data.max_length,
        "use_cce": recipe.knobs(UnslothKnobs).use_cce,
        "compile": t.compile,
        "patch_mode": recipe.knobs(UnslothKnobs).patch_mode,
        "gradient_checkpointing": t.gradient_checkpointing,
        "append_eos": recipe.data.append_eos,
        "completion_only_loss": recipe.mask.prompt,
        **clipping(found, recipe),
    }
    if recipe.model.dtype != "float32":
        wanted["cast_norm_output_to_input_dtype"] = recipe.knobs(UnslothKnobs).cast_norm_output
    if o.name != "sgd":
        wanted |= {"adam_beta1": o.betas[0], "adam_beta2": o.betas[1], "adam_epsilon": o.eps}
    offered = found.options()
    for name in wanted.keys() - offered.keys():
        value = wanted.pop(name)
        if name not in ABSENT or value != ABSENT[name]:
            raise Unsupported(f"{PACKAGE} {found.version} has no {name}, asked for {value!r}")
    return found.trainer.MLXTrainingConfig(**wanted)


def clipping(found: Library, recipe: Recipe) -> dict[str, Any]:
    """The clip options; an explicit 0.0 is off, one that is left out has the release's default."""
    kind, limit = recipe.optim.clip, recipe.optim.clip_value
    knob = {"value": "max_grad_value", "norm": "max_grad_norm"}
    if not recipe.knobs(UnslothKnobs).explicit_clip:
        return {knob[kind]: limit} if kind != "none" else {}
    named = dict.fromkeys(knob.values(), 0.0)
    return named | ({knob[kind]: limit} if kind != "none" else {})


def _schedule(found: Library, recipe: Recipe) -> str:
    """Its name of a schedule; where plain `constant` ignores the warm-up, another one has it."""
    name = str(recipe.optim.schedule)
    known = getattr(found.trainer, "SUPPORTED_MLX_LR_SCHEDULERS", ())
    if name == "constant" and recipe.optim.warmup_steps and "constant_with_warmup" in known:
        return "constant_with_warmup"
    return name


DOCUMENTED = {
    "r": "lora.rank",
    "lora_dropout": "lora.dropout",
    "finetune_last_n_layers": "lora.num_layers",
    "weight_decay": "optim.weight_decay",
    "optim": "optim.name",
    "adam_epsilon": "optim.eps",
    "lr_scheduler_type": "optim.schedule",
    "warmup_steps": "optim.warmup_steps",
    "append_eos": "data.append_eos",
    "gradient_accumulation_steps": "train.accumulation",
    "compile": "train.compile",
    "gradient_checkpointing": "train.gradient_checkpointing",
    "load_in_4bit": "unsloth.load_in_4bit",
    "use_cce": "unsloth.use_cce",
}
"""What its documentation calls them → factors."""


def documents(found: Library) -> dict[str, Any]:
    """Factors as the docstrings of a release give their defaults."""
    model, config = found.loader.FastMLXModel, found.trainer.MLXTrainingConfig
    texts = [config.__doc__, model.get_peft_model.__doc__, model.from_pretrained.__doc__]
    return documented(texts, DOCUMENTED)


def shipped(found: Library, optimizer: Any) -> dict[str, Any]:
    """Factors as the release's signatures and its `MLXTrainingConfig` have them.

    Args:
        found: The release.
        optimizer: The optimizer that a trainer with all defaults makes.
    """
    model = found.loader.FastMLXModel
    peft, load, config = defaults(model.get_peft_model), defaults(model.from_pretrained), found
    option = config.options()
    last = peft.get("finetune_last_n_layers")
    return {
        "unsloth.load_in_4bit": load["load_in_4bit"],
        "unsloth.patch_mode": load["patch_mode"],
        "unsloth.use_cce": option["use_cce"],
        "unsloth.cast_norm_output": option.get("cast_norm_output_to_input_dtype", False),
        "unsloth.explicit_clip": False,
        "lora.rank": peft["r"],
        "lora.scale": peft["lora_alpha"] / peft["r"],
        "lora.dropout": float(peft["lora_dropout"]),
        "lora.num_layers": -1 if last is None else last,
        "optim.name": option["optim"],
        "optim.betas": [float(b) for b in optimizer.betas],
        "optim.eps": float(optimizer.eps),
        "optim.weight_decay": float(option["weight_decay"]),
        "optim.bias_correction": bool(optimizer.bias_correction),
        "optim.schedule": option["lr_scheduler_type"],
        "optim.warmup_steps": option["warmup_steps"],
        "optim.clip": "none",
        "mask.end_shift": found.end_shift(),
        "data.append_eos": option.get("append_eos", True),
        "data.pad_multiple": 32,
        "data.pad_extra": 1,
        "train.accumulation": option["gradient_accumulation_steps"],
        "train.accumulation_weighting": "token",
        "train.compile": option["compile"],
        "train.gradient_checkpointing": option["gradient_checkpointing"],
    }
