"""A recipe as the mlx-lm command line takes it: a checkpoint and a YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from parity import resources
from parity.paths import quantized
from parity.paths.mlx import live as _mlx
from parity.paths.mlx.quantized import make
from parity.paths.mlx.settings import fine_tuning, lr_schedule, optimizer_config
from parity.recipe import Recipe


def checkpoint(recipe: Recipe, cache: Path) -> str:
    """The model's folder, its weights stored in the recipe's dtype, quantized if it says so.

    The CLI computes in the dtype of the checkpoint; another one takes a converted copy, kept
    in the cache, and so do quantized weights.
    """
    if recipe.model.quantization != "stored":
        made = quantized.folder(recipe, cache)
        if not made.exists():
            make(*quantized.words(recipe), made)
        return str(made)
    return _cast(recipe, cache)


def _cast(recipe: Recipe, cache: Path) -> str:
    import mlx.core as mx

    source = resources.model_dir(recipe.model.source)
    wanted = getattr(mx, recipe.model.dtype)
    files = sorted(Path(source).glob("*.safetensors"))
    if not files or all(
        value.dtype == wanted or not mx.issubdtype(value.dtype, mx.floating)
        for file in files
        for value in _mlx.load_arrays(file).values()
    ):
        return source
    key = f"{resources.fingerprint(source)}-{recipe.model.dtype}"
    copy = cache / "checkpoints" / key
    if not (copy / "complete").exists():
        copy.mkdir(parents=True, exist_ok=True)
        for file in Path(source).iterdir():
            if file.suffix == ".safetensors":
                tensors = {
                    name: value.astype(wanted)
                    if mx.issubdtype(value.dtype, mx.floating)
                    else value  # packed weights
                    for name, value in _mlx.load_arrays(file).items()
                }
                mx.save_safetensors(str(copy / file.name), tensors)
            elif file.is_file():
                (copy / file.name).write_bytes(file.read_bytes())
        (copy / "complete").touch()
    return str(copy)


def arguments(
    recipe: Recipe, model: Any, checkpoint: str, folder: str, resume: str | None = None
) -> dict[str, Any]:
    """The CLI's YAML: every option named, none left to a default."""
    t = recipe.train
    return {
        "model": checkpoint,
        "train": True,
        "data": str(resources.data_dir(recipe.data.source)),
        "seed": recipe.seed.value,
        **fine_tuning(recipe, model),
        "batch_size": t.batch_size,
        "iters": t.steps * t.accumulation,
        "grad_accumulation_steps": t.accumulation,
        "grad_checkpoint": t.gradient_checkpointing,
        "learning_rate": recipe.optim.lr,
        "lr_schedule": lr_schedule(recipe),
        "optimizer": recipe.optim.name,
        "optimizer_config": {recipe.optim.name: optimizer_config(recipe)},
        "mask_prompt": recipe.mask.prompt,
        "max_seq_length": recipe.data.max_length,
        "adapter_path": folder,
        "resume_adapter_file": resume,
        "steps_per_report": 1,
        "steps_per_eval": t.steps * t.accumulation + 1,
        "save_every": t.steps * t.accumulation + 1,
        # Validation draws from the generator that orders the training data.
        "val_batches": 0,
    }
