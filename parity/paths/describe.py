"""Describing what runs, for all frameworks: the process, and values read back from it."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import platform
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from parity import resources
from parity.names import is_factor, layer_of
from parity.recipe import Recipe
from parity.trace import Array

VARIABLES = (
    "MLX_", "OMP_NUM", "OPENBLAS_", "VECLIB_", "PARITY_TORCH", "HF_HUB_OFFLINE", "PYTORCH_",
    "CUBLAS_", "CUDA_VISIBLE", "NVIDIA_TF32",
)  # fmt: skip
"""Beginnings of variables that change what the frameworks compute, where, or what is loaded."""


def describe_process(packages: tuple[str, ...]) -> dict[str, Any]:
    """Versions, platform, BLAS libraries mapped and relevant variables of this process."""
    versions: dict[str, str | None] = {}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "versions": versions,
        "blas": _blas(packages),
        "variables": {k: v for k, v in sorted(os.environ.items()) if k.startswith(VARIABLES)},
    }


def _blas(packages: tuple[str, ...]) -> list[str]:
    """BLAS libraries this process has mapped; another BLAS rounds differently.

    Of those that lie in installed packages only the path's own count: scipy's and other frameworks'
    come and go with what else is imported.
    """
    if sys.platform == "darwin":
        return ["Accelerate"]
    maps = Path("/proc/self/maps")
    text = maps.read_text(encoding="utf-8") if maps.exists() else ""
    own = tuple(package.replace("-", "_") for package in packages)
    found = set()
    for file in {line[line.index("/") :] for line in text.splitlines() if "/" in line}:
        _, installed, below = file.rpartition("-packages/")
        name = file.rpartition("/")[2].lower()
        if ("blas" in name or "mkl" in name) and (not installed or below.startswith(own)):
            found.add(file.rpartition("/")[2])
    return sorted(found)


def single(values: set[Any]) -> Any:
    """The one value, or the sorted list where modules disagree."""
    return next(iter(values)) if len(values) == 1 else sorted(values)


def row_digests(ids: Array, lengths: Array) -> list[str]:
    """A short content key of each unpadded row of a batch."""
    return [
        hashlib.sha256(np.asarray(row[:n], np.int64).tobytes()).hexdigest()[:8]
        for row, (_, n) in zip(ids, lengths, strict=True)
    ]


def embedded(recipe: Recipe) -> dict[str, int]:
    """`embedded`: how many tokens the configuration of a model in a folder has; nothing where it says none."""
    file = Path(resources.model_dir(recipe.model.source), "config.json")
    if not file.is_file():
        return {}
    config = json.loads(file.read_text("utf-8"))
    size = config.get("text_config", config).get("vocab_size", config.get("vocab_size"))
    return {"embedded": size} if isinstance(size, int) else {}


def defaults(function: Any) -> dict[str, Any]:
    """The default of each parameter of a function or class."""
    return {k: p.default for k, p in inspect.signature(function).parameters.items()}


def model_key(recipe: Recipe) -> tuple[str, ...]:
    """What a loaded model depends on."""
    source, factors = resources.model_dir(recipe.model.source), recipe.model.model_dump_json()
    # Knobs may decide what a loader makes.
    knobs = "".join(recipe.knobs(kind).model_dump_json() for kind in recipe.knob_types())
    return source, factors, resources.fingerprint(source), knobs


def trained(names: Iterable[str]) -> dict[str, Any]:
    """What is trained, in which layers and modules, from the canonical names of trainable tensors."""
    tensors = {name: name.rpartition(".") for name in names}
    adapted = {module for name, (module, _, _) in tensors.items() if is_factor(name)}
    rest = [(m, last) for name, (m, _, last) in tensors.items() if not is_factor(name)]
    if not adapted:
        kind = "full" if rest else "nothing"
    elif any(last != "m" or module not in adapted for module, last in rest):
        kind = "LoRA and other weights"
    else:
        kind = "dora" if rest else "lora"
    return {
        "kind": kind,
        "layers": sorted({n for name in tensors if (n := layer_of(name)) is not None}),
        "modules": sorted({module.rpartition(".")[2] for module, _, _ in tensors.values()}),
    }


def without_adapter(parameters: Iterable[str], recipe: Recipe) -> list[str]:
    """Modules that a recipe names, in layers with an adapter, and that have none.

    A name such as `down_proj` stands for modules of several kinds, experts among them.

    Args:
        parameters: Canonical names of all parameters of the live model.
        recipe: Whose targets are looked for.
    """
    if recipe.lora.kind == "full":
        return []
    names = set(parameters)
    adapted = {name.rpartition(".")[0] for name in names if is_factor(name)}
    first = min((n for name in adapted if (n := layer_of(f"{name}.")) is not None), default=0)
    return sorted(
        module
        for module, _, last in (name.rpartition(".") for name in names)
        if last == "weight"
        and module.rpartition(".")[2] in recipe.lora.target_modules
        and module not in adapted
        and (layer_of(f"{module}.") or 0) >= first
    )
