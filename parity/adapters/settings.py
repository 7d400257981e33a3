"""`adapter_config.json` as the stacks write it: which settings are read, of which type.

Other keys are allowed and not looked at. Null stands for a key that is not there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from parity.adapters.tensors import read_object, shown
from parity.errors import UsageError

CONFIG = "adapter_config.json"


class Settings(BaseModel):
    """Strict about the types of what is read."""

    model_config = ConfigDict(frozen=True, strict=True, extra="allow")


class LoraParameters(Settings):
    """What mlx-lm makes its layers from."""

    rank: int | None = None
    scale: float | None = None
    alpha: float | None = None
    dropout: float | None = None
    keys: list[str] | None = None


class MlxSettings(Settings):
    """Written by mlx-lm and unsloth-zoo; the latter repeats `lora_parameters` at the top."""

    fine_tune_type: str = "lora"
    num_layers: int | None = None
    lora_parameters: LoraParameters | None = None
    rank: int | None = None
    scale: float | None = None
    model: str | None = None
    base_model_name_or_path: str | None = None
    unsloth_mlx_lora_module_ranks: dict[str, int] | None = None
    unsloth_mlx_lora_module_scales: dict[str, float] | None = None


class PeftSettings(Settings):
    """Written by PEFT, and by TRL through it."""

    peft_type: str
    r: int | None = None
    lora_alpha: float | None = None
    use_rslora: bool | None = None
    use_dora: bool | None = None
    bias: str | None = None
    lora_bias: bool | None = None
    fan_in_fan_out: bool | None = None
    target_modules: list[str] | str | None = None
    target_parameters: list[str] | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    modules_to_save: list[str] | None = None
    base_model_name_or_path: str | None = None
    peft_version: str | None = None


Read = TypeVar("Read", bound=Settings)


def read_settings(folder: Path, kind: type[Read]) -> tuple[Read, dict[str, Any]]:
    """The settings of an adapter, and all that stands in the file.

    Raises:
        UsageError: No such file, no JSON object, or values of another type; each is named.
    """
    file = folder / CONFIG
    found = read_object(file)
    # Null means "not there" in all of these, but for keys that must be.
    given = {key: value for key, value in found.items() if value is not None}
    try:
        return kind.model_validate(given), found
    except ValidationError as error:
        wrong = dict[str, str]()
        for item in error.errors(include_url=False):
            # Of alternatives pydantic names each: one is enough.
            name = ".".join(str(part) for part in item["loc"] if not _alternative(part))
            message = item["msg"][:1].lower() + item["msg"][1:]
            got = "" if item["type"] == "missing" else f", got {_value(item['input'])}"
            wrong.setdefault(name, f"{shown(name)}: {message}{got}")
        raise UsageError(f"{file}: {'; '.join(wrong.values())}") from None


def _alternative(part: Any) -> bool:
    return isinstance(part, str) and part in ("str", "int", "list[str]", "list[int]")


def _value(value: Any) -> str:
    return shown(json.dumps(value, default=repr))
