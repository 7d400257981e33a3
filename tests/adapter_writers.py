"""Adapters written by the real savers of mlx-lm, unsloth-zoo, PEFT and TRL, on the tiny Gemma 3.

`written()` runs this module once for MLX and once for torch, and keeps what they leave in the cache.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import runpy
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
from filelock import FileLock

from parity import resources
from parity.capture.worker import environment

MODEL = "tiny-gemma3"
LAYERS, RANK = 4, 8
STACKS = {
    "mlx": (
        "mlx-lm",
        "mlx-lm-dora",
        "mlx-lm-full",
        "mlx-lm-embedding",
        "unsloth",
        "unsloth-as-peft",
        "fused",
    ),
    "torch": (
        "peft",
        "peft-rslora",
        "peft-dora",
        "peft-patterns",
        "peft-head",
        "peft-embedding",
        "trl",
        "merged",
    ),
}
PACKAGES = ("mlx", "mlx-lm", "peft", "transformers", "trl")


def written() -> Path:
    """The folder that holds a folder of each of them."""
    words = [Path(__file__).read_bytes(), *(version(p).encode() for p in PACKAGES)]
    key = hashlib.sha256(b"\n".join(words)).hexdigest()[:12]
    folder = resources.cache() / "test-adapters" / key
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / "done").exists():
            shutil.rmtree(folder, ignore_errors=True)
            for framework in STACKS:
                subprocess.run(
                    [sys.executable, "-m", "tests.adapter_writers", framework, str(folder)],
                    # What a step computes is not asked here: compiling its kernels takes a minute.
                    env=environment(framework, resources.cache()) | {"MLX_DISABLE_COMPILE": "1"},
                    check=True, capture_output=True,
                )  # fmt: skip
            (folder / "done").touch()
    return folder


def by_the_command_line(folder: Path) -> None:
    """mlx-lm's `lora` and `fuse`."""
    model = resources.model_dir(MODEL)
    for name, kind in (("mlx-lm", "lora"), ("mlx-lm-dora", "dora"), ("mlx-lm-full", "full")):
        words = ["lora", "--model", model, "--train", "--fine-tune-type", kind]
        words += ["--data", str(resources.data_dir("hello")), "--iters", "2", "--batch-size", "2"]
        words += ["--num-layers", str(LAYERS), "--learning-rate", "1e-2", "--val-batches", "0"]
        _mlx_lm(*words, "--adapter-path", str(folder / name))
    embedding = {
        "rank": RANK, "scale": 2.0, "dropout": 0.0, "keys": ["model.embed_tokens", "self_attn.q_proj"],
    }  # fmt: skip
    (folder / "embedding.yaml").write_text(json.dumps({"lora_parameters": embedding}))
    words[words.index("--fine-tune-type") + 1] = "dora"
    config = ["-c", str(folder / "embedding.yaml")]
    _mlx_lm(*words, *config, "--adapter-path", str(folder / "mlx-lm-embedding"))
    adapter = str(folder / "mlx-lm")
    _mlx_lm(
        "fuse", "--model", model, "--adapter-path", adapter, "--save-path", str(folder / "fused")
    )


def _mlx_lm(*words: str) -> None:
    """As `python -m mlx_lm`, in this process: imports cost more than all else here."""
    sys.argv = ["mlx_lm", *words]
    runpy.run_module("mlx_lm", run_name="__main__")


def by_a_path(name: str, folder: Path) -> None:
    """What a path of the harness saves with its real saver, of an adapter whose B is not zero."""
    from parity.paths.registry import resolve
    from parity.recipe import Recipe
    from parity.trace import Trace

    recipe = Recipe().override({"lora.num_layers": LAYERS})
    path, rng = resolve(name)(resources.cache()), np.random.default_rng(0)
    adapter = path.lora_init(recipe, Trace()).group("adapter")
    for tensor, values in adapter.items():
        if tensor.endswith("lora_b"):
            adapter[tensor] = rng.normal(0, 0.05, values.shape).astype(np.float32)

    def see(model: object) -> None:
        if name == "unsloth":
            from unsloth_zoo.mlx.utils import save_lora_adapters

            save_lora_adapters(model, str(folder / "unsloth-as-peft"), adapter_format="peft")

    with path.saved(recipe, adapter, see) as saved:
        shutil.copytree(saved, folder / name)


def by_peft(folder: Path) -> None:
    """PEFT's `save_pretrained`, and a model that it has merged its adapter into."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    variants = {
        "peft": {},
        "peft-rslora": {"use_rslora": True},
        "peft-dora": {"use_dora": True},
        "peft-patterns": {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"v_proj": 2}},
        "peft-head": {"modules_to_save": ["lm_head"]},
        "peft-embedding": {
            "target_modules": ["q_proj", "embed_tokens"],
            "layers_to_transform": None,
            "use_dora": True,
        },
    }
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    for name, settings in variants.items():
        base = AutoModelForCausalLM.from_pretrained(resources.model_dir(MODEL))
        layers = list(range(18 - LAYERS, 18))
        common = {"target_modules": names, "layers_to_transform": layers}
        config = LoraConfig(r=RANK, lora_alpha=16, **(common | settings))
        model = get_peft_model(base, config)
        torch.manual_seed(0)
        for tensor, parameter in model.named_parameters():
            if "lora_B" in tensor or "lora_embedding" in tensor:
                parameter.data.normal_(0, 0.05)
        model.save_pretrained(folder / name)
        if name == "peft":
            model.merge_and_unload().save_pretrained(folder / "merged")


if __name__ == "__main__":
    framework, target = sys.argv[1], Path(sys.argv[2])
    target.mkdir(exist_ok=True)
    if framework == "mlx":
        by_the_command_line(target)
        if importlib.util.find_spec("unsloth_zoo"):
            by_a_path("unsloth", target)
    else:
        by_peft(target)
        by_a_path("trl", target)
