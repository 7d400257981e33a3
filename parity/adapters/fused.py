"""A whole model that an adapter was fused into, or that was trained in full, against its base."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from parity.adapters.artefact import Finding
from parity.adapters.base import Base, read_base
from parity.adapters.outcome import NO_BASE, Outcome
from parity.adapters.tensor_checks import values_of
from parity.adapters.tensors import Tensor, shown
from parity.judge.noise import EPS
from parity.judge.updates import ROUND
from parity.names import canonical
from parity.trace import Array

QUESTIONS = {
    "values": "Are all values finite numbers?",
    "keys": "Has it the tensors of the base, and no others?",
    "shapes": "Have the tensors the shapes of the base's?",
    "dtype": "Have the tensors the dtypes of the base's?",
    "settings": "Has its config.json the settings of the base's?",
    "effect": "Did fusing change any weight?",
}
_FREE = (
    "_name_or_path", "architectures", "bos_token_id", "dtype", "eos_token_id", "pad_token_id",
    "quantization", "quantization_config", "torch_dtype", "transformers_version", "use_cache",
)  # fmt: skip
"""Keys that say nothing of what the model computes, or are checked elsewhere."""
_LEFT = ("lora_a", "lora_b", "lora_A", "lora_B", "lora_magnitude_vector")


@dataclass(frozen=True)
class Model:
    """A folder with a model.

    Attributes:
        files: Its own names and tensors.
        changed: Canonical names of the tensors that differ from the base's; None without a base that
            they can be compared with.
    """

    files: Base
    changed: list[str] | None = None

    @property
    def folder(self) -> Path:
        """Where it is."""
        return self.files.folder


def read_model(folder: Path) -> Model:
    """The model in a folder.

    Raises:
        UsageError: A file is missing or damaged.
    """
    return Model(replace(read_base(str(folder.resolve())), source=str(folder)))


def check_model(model: Model, base: Base | None) -> tuple[Model, list[Outcome]]:
    """All that files alone can tell; with the tensors that changed."""
    ours, found = _by_name(model.files.tensors), dict[str, Outcome]()
    for check, question in QUESTIONS.items():
        found[check] = Outcome(check, question, [], NO_BASE if check != "values" else "")
    found["values"] = replace(found["values"], findings=values_of(model.files.tensors))
    left = [
        name for name in model.files.tensors if name.rpartition(".")[2] in _LEFT or ".lora_" in name
    ]
    if left:
        text = f"and {len(left) - 1} more of an adapter are in a model that should have it fused"
        found["keys"] = replace(found["keys"], findings=[Finding("keys", shown(left[0]), text)])
    if base is None:
        return model, list(found.values())
    theirs = _by_name(base.tensors)
    wrong, absent = _settings(model.files.config, base.config)
    found["settings"] = replace(found["settings"], findings=wrong, unchecked=absent)
    packed = [is_packed(files.tensors) for files in (model.files, base)]
    lone = sorted(ours.keys() ^ theirs.keys())
    if packed[0] != packed[1]:
        reason = "one of model and base is quantized: the weights cannot be compared, logits can"
        known = ("values", "settings")
        found |= {c: replace(o, unchecked=reason) for c, o in found.items() if c not in known}
        return model, list(found.values())
    found |= {c: replace(o, unchecked="") for c, o in found.items() if c != "settings"}
    if lone and not left:
        side = "the base" if lone[0] in theirs else "it"
        text = f"stands in {side} alone, as {len(lone) - 1} others do in one of the two"
        found["keys"] = replace(found["keys"], findings=[Finding("keys", shown(lone[0]), text)])
    both = [name for name in ours if name in theirs]
    shapes = [n for n in both if ours[n].shape != theirs[n].shape]
    if shapes:
        n = shapes[0]
        text = f"has shape {ours[n].shape}, the base's has {theirs[n].shape}; {len(shapes)} of {len(both)} do"
        found["shapes"] = replace(found["shapes"], findings=[Finding("shapes", shown(n), text)])
    dtypes = [n for n in both if ours[n].dtype != theirs[n].dtype]
    if dtypes:
        n = dtypes[0]
        text = f"{ours[n].dtype_name}, the base's is {theirs[n].dtype_name}; {len(dtypes)} of {len(both)} differ"
        found["dtype"] = replace(found["dtype"], findings=[Finding("dtype", shown(n), text)])
    alike = [n for n in both if ours[n].shape == theirs[n].shape]
    changed = [n for n in alike if _differs(ours[n], theirs[n])]
    if alike and not changed:
        text = (
            f"all {len(alike)} tensors are those of the base, bit for bit: the fuse changed nothing"
        )
        if dtypes:
            text = (
                f"all {len(alike)} tensors are those of the base, rounded: the fuse changed nothing"
            )
        found["effect"] = replace(
            found["effect"], findings=[Finding("effect", model.folder.name, text)]
        )
    note = f"{len(changed)} of {len(alike)} tensors differ from the base's"
    found["effect"] = replace(found["effect"], note=note)
    return replace(model, changed=changed), list(found.values())


def _settings(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> tuple[list[Finding], str]:
    """Settings of the base that a model has with another value; those that it has not."""
    kept = {k: v for k, v in theirs.items() if k not in _FREE and v is not None}
    wrong = [
        Finding("settings", shown(key), f"{_short(ours[key])}, the base has {_short(value)}")
        for key, value in kept.items()
        if key in ours and ours[key] != value
    ]
    lost = [shown(f"{key} = {_short(value)}") for key, value in kept.items() if key not in ours]
    text = f"config.json lacks {', '.join(lost)} of the base: a loader that reads it there takes a default"
    return wrong, text if lost else ""


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _by_name(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {canonical(name): tensor for name, tensor in tensors.items()}


def is_packed(tensors: Mapping[str, Tensor]) -> bool:
    """Whether MLX has quantized a model."""
    return any(name.endswith(".scales") for name in tensors)


def _differs(ours: Tensor, theirs: Tensor) -> bool:
    a, b = ours.read(), theirs.read()
    if ours.dtype == theirs.dtype or not (ours.is_float and theirs.is_float):
        return not np.array_equal(a, b, equal_nan=ours.is_float and theirs.is_float)
    # The coarser of the two dtypes; a value that it cannot hold is rounded, however small it is.
    coarser = max(ours.dtype_name, theirs.dtype_name, key=lambda name: EPS[name])
    with np.errstate(over="ignore"):
        return not np.array_equal(_rounded(a, coarser), _rounded(b, coarser), equal_nan=True)


def _rounded(values: Array, dtype: str) -> Array:
    return ROUND[dtype](values) if dtype in ROUND else values.astype(np.float32)


class Differences(Mapping[str, Array]):
    """Module → what the model's weight has that the base's has not, (out, in) in float64."""

    def __init__(self, model: Model, base: Base) -> None:
        ours, theirs = _by_name(model.files.tensors), _by_name(base.tensors)
        self._pairs = {
            name.removesuffix(".weight"): (ours[name], theirs[name])
            for name in model.changed or ()
            if name.endswith(".weight") and ours[name].is_float and theirs[name].is_float
        }

    def __getitem__(self, name: str) -> Array:
        ours, theirs = self._pairs[name]
        return ours.read().astype(np.float64) - theirs.read().astype(np.float64)

    def __iter__(self) -> Iterator[str]:
        return iter(self._pairs)

    def __len__(self) -> int:
        return len(self._pairs)

    def rounding(self, name: str) -> float:
        """An ulp of the greatest weight in the dtype that it is stored in."""
        ours, _ = self._pairs[name]
        return EPS[ours.dtype_name] * float(np.abs(ours.read().astype(np.float64)).max())
