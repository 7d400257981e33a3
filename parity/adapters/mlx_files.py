"""Adapters in the files of mlx-lm: `adapters.safetensors`, A (in, r) and B (r, out).

unsloth-zoo writes the same files with more settings.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from math import isclose, isfinite
from pathlib import Path
from typing import ClassVar

from parity.adapters.artefact import Adapter, Extra, Finding, Module, Scale, Sizes
from parity.adapters.settings import CONFIG, LoraParameters, MlxSettings, read_settings
from parity.adapters.tensors import Tensor, tensors_of
from parity.judge.updates import layers as in_words
from parity.names import canonical, layer_of
from parity.trace import Array

WEIGHTS = "adapters.safetensors"
DEFAULT_SCALE = 20.0
"""That of mlx-lm's command line."""
_PARTS = {"lora_a": "a", "lora_b": "b", "m": "m"}


def read(folder: Path) -> MlxAdapter:
    """The adapter in a folder.

    Raises:
        UsageError: A file is missing or damaged.
    """
    settings, written = read_settings(folder, MlxSettings)
    tensors = tensors_of(folder / WEIGHTS)
    parts, keys, extra = dict[str, dict[str, Tensor]](), dict[str, str](), dict[str, Extra]()
    full = settings.fine_tune_type == "full"
    kept = written.get("full_state_modules")
    states = tuple(f"{path}." for path in kept) if isinstance(kept, dict) else ()
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        # Two names of one module after the other would hide each other.
        if part in _PARTS and module and keys.setdefault(canonical(module), module) == module:
            parts.setdefault(canonical(module), {})[_PARTS[part]] = tensor
        else:
            reason = "fine_tune_type is full" if full else ""
            if states and name.startswith(states):
                reason = "full_state_modules name it"
            extra[name] = Extra(tensor, reason)
    modules = {name: Module(name, keys[name], found) for name, found in parts.items()}
    return MlxAdapter(folder, written, tensors, modules, extra, settings)


@dataclass(frozen=True)
class MlxAdapter(Adapter):
    """See `Adapter`."""

    settings_read: MlxSettings

    layout: ClassVar[str] = "mlx"
    orientation: ClassVar[str] = "mlx-lm stores A as (in, r) and B as (r, out)"

    @cached_property
    def parameters(self) -> LoraParameters:
        """`lora_parameters`, empty where there are none."""
        return self.settings_read.lora_parameters or LoraParameters()

    @property
    def writer(self) -> str:
        """See `Adapter`."""
        if own := next((k for k in self.written if "unsloth" in k), None):
            return f"unsloth-zoo ({own} in {CONFIG})"
        if "iters" in self.written:
            return f"mlx-lm's command line (its options are in {CONFIG})"
        return f"mlx-lm, or what writes its files: {CONFIG} does not say"

    @property
    def kind(self) -> str:
        """See `Adapter`."""
        return {"dora": "DoRA", "full": "full"}.get(self.settings_read.fine_tune_type, "LoRA")

    @property
    def base(self) -> str:
        """See `Adapter`."""
        return self.settings_read.base_model_name_or_path or self.settings_read.model or ""

    def rank(self, module: str) -> tuple[int | None, str]:
        """See `Adapter`."""
        own = self.settings_read.unsloth_mlx_lora_module_ranks or {}
        if (key := self._key(module)) in own:
            return own[key], f"unsloth_mlx_lora_module_ranks.{key}"
        if self.parameters.rank is None and self.settings_read.rank is not None:
            return self.settings_read.rank, "rank"
        return self.parameters.rank, "lora_parameters.rank"

    def scale(self, module: str) -> Scale:
        """See `Adapter`."""
        own, read = self.settings_read.unsloth_mlx_lora_module_scales or {}, self.settings_read
        if (key := self._key(module)) in own:
            return Scale(own[key], f"unsloth_mlx_lora_module_scales in {CONFIG}")
        if self.parameters.scale is not None:
            default = ", mlx-lm's default" if self.parameters.scale == DEFAULT_SCALE else ""
            return Scale(self.parameters.scale, f"lora_parameters.scale in {CONFIG}{default}")
        if read.scale is not None:
            return Scale(read.scale, f"scale in {CONFIG}")
        return Scale(None, f"no scale in {CONFIG}")

    def _key(self, module: str) -> str:
        return self.modules[module].key if module in self.modules else module

    def settings(self) -> list[Finding]:
        """See `Adapter`."""
        read, lora = self.settings_read, self.parameters
        if self.kind == "full":
            return []
        found = []
        if read.fine_tune_type not in ("lora", "dora"):
            found.append(
                Finding(
                    "kind", "fine_tune_type",
                    f"{read.fine_tune_type!r} is not lora, dora or full: mlx-lm takes it as lora",
                )
            )  # fmt: skip
        for check, where, value, reader in (
            ("layers", "num_layers", read.num_layers, "mlx-lm"),
            ("rank", "lora_parameters.rank", lora.rank, "mlx-lm"),
            ("settings", "lora_parameters.dropout", lora.dropout, "mlx-lm"),
        ):
            if value is None:
                found.append(Finding(check, where, f"missing: {reader}'s loader stops without it"))
        if lora.dropout is not None and not 0 <= lora.dropout < 1:
            text = f"{lora.dropout:g} is no probability under 1: mlx-lm's loader stops"
            found.append(Finding("settings", "lora_parameters.dropout", text))
        for what, ours, theirs in (
            ("rank", lora.rank, read.rank),
            ("scale", lora.scale, read.scale),
        ):
            if ours is not None and theirs is not None and ours != theirs:
                text = f"{ours:g} in lora_parameters.{what}, {theirs:g} in {what}"
                found.append(Finding(what, what, text))
        return found + self._scale_findings()

    def _scale_findings(self) -> list[Finding]:
        lora, where = self.parameters, "lora_parameters.scale"
        alpha, rank, scale = lora.alpha, lora.rank, lora.scale
        ratio = alpha / rank if alpha is not None and rank else None
        if scale is None:
            text = "missing: mlx-lm's loader stops without it, mlx-lm's training default is 20"
            if alpha is not None:
                text += f"; alpha is {alpha:g}, which mlx-lm does not read"
                text += f" (alpha / rank would be {ratio:g})" if ratio is not None else ""
            return [Finding("scale", where, text)]
        found = []
        if not isfinite(scale) or scale <= 0:
            found.append(Finding("scale", where, f"{scale:g} is no positive number"))
        if ratio is not None and not isclose(ratio, scale, rel_tol=1e-6):
            own = ", it is alpha itself" if scale == alpha else ""
            text = f"{scale:g}, but alpha / rank is {alpha:g} / {rank} = {ratio:g}{own}"
            found.append(Finding("scale", where, text))
        return found

    def targets(self) -> dict[str, bool]:
        """See `Adapter`."""
        return {
            key: any(self._names(key, m.key) for m in self.modules.values())
            for key in self.parameters.keys or ()
        }

    def untargeted(self) -> list[str]:
        """See `Adapter`."""
        keys = self.parameters.keys
        if keys is None:
            return []
        return [n for n, m in self.modules.items() if not any(self._names(k, m.key) for k in keys)]

    def _names(self, key: str, module: str) -> bool:
        """Whether an entry of `keys` names a module: by its whole name, or by that in its layer."""
        inside = re.search(r"(?:^|\.)layers\.\d+\.(.+)$", module)
        return key == module or bool(inside and inside[1] == key)

    def wanted(self, names: Iterable[str], count: int) -> set[str]:
        """As mlx-lm's `linear_to_lora_layers` chooses: by name in the last layers, by whole name in all."""
        read, keys = self.settings_read, self.parameters.keys
        if read.num_layers is None:
            return set()
        # [-0:] is all of them.
        last = range(count)[-max(read.num_layers, 0) :]
        found = set[str]()
        for name in names:
            layer = layer_of(canonical(name))
            if keys is None:
                named = layer in last
            else:
                named = name in keys or (layer in last and any(self._names(k, name) for k in keys))
            if named:
                found.add(name)
        return found

    def layer_settings(self, layers: set[int], count: int | None) -> list[Finding] | str:
        """See `Adapter`."""
        number, keys = self.settings_read.num_layers, self.parameters.keys
        whole = set(keys or ()) & {m.key for m in self.modules.values()}
        if number is not None and count is not None and number > count:
            return [Finding("layers", "num_layers", f"{number}, but the base has {count} layers")]
        if number is None or whole or not layers:
            return []  # missing is named elsewhere; whole names choose the layers by themselves
        have = in_words(f"layers.{n}." for n in layers)
        if count is None:
            if 0 < number < len(layers):
                return [
                    Finding("layers", "num_layers", f"{number}, but there are tensors for {have}")
                ]
            return f"num_layers, {number}, counts from the last layer; how many the model has needs --base"
        last = set(range(count)[-max(number, 0) :])
        if layers == last:
            return []
        should = in_words(f"layers.{n}." for n in last)
        text = f"{number} counts from the last layer and means {should} of {count}, but there are tensors for {have}"
        if layers == set(range(number)):
            text += ": they were counted from the wrong end"
        return [Finding("layers", "num_layers", text)]

    def bias_settings(self) -> list[Finding]:
        """mlx-lm adapts no biases: a tensor of one is an unknown key."""
        return []

    def sizes(self, module: Module) -> Sizes | None:
        """See `Adapter`."""
        if not {"a", "b"} <= module.tensors.keys():
            return None
        a, b = module.tensors["a"].shape, module.tensors["b"].shape
        if len(a) == len(b) == 2:
            return Sizes(a[0], a[1], b[0], b[1])
        if len(a) == len(b) == 3 and a[0] == b[0]:
            return Sizes(a[2], a[1], b[2], b[1], a[0])
        return None

    def oriented(self, module: Module) -> tuple[Array, Array]:
        """See `Adapter`."""
        return module.tensors["a"].read(), module.tensors["b"].read()
