"""Conversion between the files of mlx-lm and of PEFT: ours, where no stack ships one.

A is transposed, B too; scale = alpha / r. Names of modules are taken as they stand: they are the same in
both stacks for models whose layers are at `model.layers`.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from parity.adapters import check, mlx_files, peft_files
from parity.adapters.artefact import Adapter
from parity.adapters.fused import Model
from parity.adapters.settings import CONFIG
from parity.errors import UsageError
from parity.judge.updates import named
from parity.names import layer_of
from parity.trace import Array

LAYOUTS = {"peft": "peft", "mlx-lm": "mlx"}
"""What a user calls the files, and what `Adapter.layout` does."""


def convert(folder: Path, layout: str, out: Path) -> Adapter:
    """Writes the adapter of `folder` as `peft` or `mlx` files into `out`, and reads them back.

    Values keep their bits; bfloat16 becomes float32.

    Raises:
        UsageError: `folder` holds none, or one that the other files cannot hold; `out` exists.
    """
    adapter = check.read(folder)
    if isinstance(adapter, Model):
        raise UsageError(f"{folder} is a whole model, no adapter: there is nothing to convert")
    _check(adapter, layout)
    tensors, settings = _to_peft(adapter) if layout == "peft" else _to_mlx(adapter)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} exists: give a folder that does not, or an empty one")
    from safetensors.numpy import save_file

    out.mkdir(parents=True, exist_ok=True)
    kept = {name: np.ascontiguousarray(values) for name, values in tensors.items()}
    # transformers and mlx-lm look at this word.
    metadata = {"format": "pt" if layout == "peft" else "mlx"}
    weights = peft_files.WEIGHTS if layout == "peft" else mlx_files.WEIGHTS
    save_file(kept, out / weights, metadata)
    (out / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    written = check.read(out)
    assert isinstance(written, Adapter)
    return written


def _check(adapter: Adapter, layout: str) -> None:
    """Makes sure that the other files can hold all of it."""
    where = adapter.folder
    if adapter.layout == layout:
        raise UsageError(f"{where} holds files of {layout} already")
    if adapter.kind == "full" or not adapter.modules:
        raise UsageError(f"{where}: {adapter.kind}: no pair of A and B to convert")
    if adapter.extra:
        held = named(sorted(adapter.extra))
        raise UsageError(f"{where}: only A, B and DoRA's magnitude can be converted, it has {held}")
    for name, module in adapter.modules.items():
        sizes = adapter.sizes(module)
        if sizes is None or not sizes.fits or sizes.experts or "bias" in module.tensors:
            raise UsageError(f"{where}: {name}: no plain pair of A and B")
        if module.embedding or name.rpartition(".")[2] == "embed_tokens":
            raise UsageError(f"{where}: {name}: adapters of embeddings are not converted")
        if adapter.scale(name).value is None:
            raise UsageError(f"{where}: {name}: {adapter.scale(name).source}")
        if not all(tensor.is_float for tensor in module.tensors.values()):
            raise UsageError(f"{where}: {name}: its tensors are no floats")
        if ("m" in module.tensors) != (adapter.kind == "DoRA"):
            raise UsageError(f"{where}: {name}: {adapter.kind}, and a magnitude does not fit that")


class _Module(NamedTuple):
    """What a module has: its name in the file, `a`, `b` and `m`, rank and scale."""

    key: str
    values: dict[str, Array]
    rank: int
    scale: float


def _modules(adapter: Adapter) -> list[_Module]:
    found = list[_Module]()
    for name, module in adapter.modules.items():
        a, b = adapter.oriented(module)
        values = {"a": a, "b": b}
        if "m" in module.tensors:
            values["m"] = module.tensors["m"].read()
        scale = float(adapter.scale(name).value or 0.0)
        found.append(_Module(module.key, values, a.shape[1], scale))
    return found


def _to_peft(adapter: Adapter) -> tuple[dict[str, Array], dict[str, Any]]:
    tensors, modules = dict[str, Array](), _modules(adapter)
    for module in modules:
        stem = f"{peft_files.PREFIX}{module.key}"
        tensors[f"{stem}.lora_A.weight"] = module.values["a"].T
        tensors[f"{stem}.lora_B.weight"] = module.values["b"].T
        if "m" in module.values:
            tensors[f"{stem}.lora_magnitude_vector"] = module.values["m"]
    rank = Counter(m.rank for m in modules).most_common(1)[0][0]
    alpha = Counter(m.rank * m.scale for m in modules).most_common(1)[0][0]
    lora = adapter.written.get("lora_parameters") or {}
    return tensors, {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": lora.get("dropout") or 0.0,
        "bias": "none",
        "use_dora": adapter.kind == "DoRA",
        "use_rslora": False,
        # Whole names: layers need not be named beside them.
        "target_modules": sorted(m.key for m in modules),
        "rank_pattern": {m.key: m.rank for m in modules if m.rank != rank},
        "alpha_pattern": {m.key: m.rank * m.scale for m in modules if m.rank * m.scale != alpha},
    }


def _to_mlx(adapter: Adapter) -> tuple[dict[str, Array], dict[str, Any]]:
    modules = _modules(adapter)
    ranks, scales = {m.rank for m in modules}, {m.scale for m in modules}
    for what, several in (("rank", ranks), ("scale", scales)):
        if len(several) > 1:
            listed = ", ".join(f"{value:g}" for value in sorted(several))
            raise UsageError(
                f"{adapter.folder}: mlx-lm's files hold one {what} for all modules, it has {listed}"
            )
    tensors = {
        f"{module.key}.{_NAMES[part]}": array
        for module in modules
        for part, array in module.values.items()
    }
    layers = {n for name in adapter.modules if (n := layer_of(name)) is not None}
    return tensors, {
        "fine_tune_type": "dora" if adapter.kind == "DoRA" else "lora",
        "model": adapter.base,
        # Whole names choose the layers; mlx-lm still wants a number.
        "num_layers": max(len(layers), 1),
        "lora_parameters": {
            "rank": ranks.pop(),
            "scale": scales.pop(),
            "dropout": adapter.written.get("lora_dropout") or 0.0,
            "keys": sorted(module.key for module in modules),
        },
    }


_NAMES = {"a": "lora_a", "b": "lora_b", "m": "m"}
