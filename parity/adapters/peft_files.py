"""Adapters in the files of PEFT: `adapter_model.safetensors`, A (r, in) and B (out, r)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import isfinite, sqrt
from pathlib import Path
from typing import ClassVar

from parity.adapters.artefact import Adapter, Extra, Finding, Module, Scale, Sizes
from parity.adapters.settings import CONFIG, PeftSettings, read_settings
from parity.adapters.tensors import Tensor, shown, tensors_of
from parity.errors import UsageError
from parity.judge.updates import layers as in_words
from parity.names import canonical, layer_of
from parity.trace import Array

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
DEFAULT_RANK, DEFAULT_ALPHA = 8, 8
"""What PEFT's LoraConfig takes where the file has none."""
PARAMETERS = "target_parameters name it"
_PART = re.compile(
    r"(?P<module>.+)\.(?:lora_(?P<embedding>embedding_)?(?P<factor>[AB])(?P<weight>\.weight)?"
    r"|lora_B(?P<bias>\.bias)|lora_magnitude_vector(?:\.weight)?)"
)


def read(folder: Path) -> PeftAdapter:
    """The adapter in a folder.

    Raises:
        UsageError: A file is missing or damaged, or it is no LoRA.
    """
    settings, written = read_settings(folder, PeftSettings)
    if settings.peft_type.upper() != "LORA":
        raise UsageError(
            f"{folder / CONFIG}: peft_type is {settings.peft_type!r}: only adapters of type LORA can be "
            "checked"
        )
    _compile(folder, settings)
    tensors = tensors_of(folder / WEIGHTS)
    parts, keys, extra = dict[str, dict[str, Tensor]](), dict[str, str](), dict[str, Extra]()
    embeddings = set[str]()
    for name, tensor in tensors.items():
        match = _PART.fullmatch(name.removeprefix(PREFIX))
        if match and _of_parameters(match["module"], settings):
            extra[name] = Extra(tensor, PARAMETERS)
            continue
        # Parameters of embeddings have no `.weight`, those of other layers have.
        if (
            match is None
            or not name.startswith(PREFIX)
            or (match["factor"] and bool(match["embedding"]) == bool(match["weight"]))
            # Two names of one module after the other would hide each other.
            or keys.setdefault(canonical(match["module"]), match["module"]) != match["module"]
        ):
            extra[name] = Extra(tensor, _reason(name, settings))
            continue
        module = canonical(match["module"])
        part = (match["factor"] or ("bias" if match["bias"] else "m")).lower()
        parts.setdefault(module, {})[part] = tensor
        if match["embedding"]:
            embeddings.add(module)
    modules = {n: Module(n, keys[n], found, n in embeddings) for n, found in parts.items()}
    return PeftAdapter(folder, written, tensors, modules, extra, settings)


def _of_parameters(module: str, settings: PeftSettings) -> bool:
    """Whether a module's adapter is one of bare parameters, as those of experts, with shapes of its own."""
    module = module.replace(".base_layer", "")
    holders = [name.rpartition(".")[0] for name in settings.target_parameters or ()]
    return any(module == holder or module.endswith(f".{holder}") for holder in holders if holder)


def _compile(folder: Path, settings: PeftSettings) -> None:
    """Makes sure that what PEFT takes as regular expressions are some."""
    given = {
        "target_modules": settings.target_modules,
        "exclude_modules": settings.exclude_modules,
    }
    texts = [(key, value) for key, value in given.items() if isinstance(value, str)]
    for key, pattern in (
        ("rank_pattern", settings.rank_pattern), ("alpha_pattern", settings.alpha_pattern),
    ):  # fmt: skip
        texts += [(key, text) for text in pattern or ()]
    for key in ("modules_to_save", "layers_pattern"):
        value = getattr(settings, key)
        texts += [(key, text) for text in ([value] if isinstance(value, str) else value or ())]
    for key, text in texts:
        try:
            re.compile(text)
        except (re.error, RecursionError, OverflowError) as error:
            raise UsageError(
                f"{folder / CONFIG}: {key}: {shown(text)} is no regular expression: {error}"
            ) from None


def _reason(name: str, settings: PeftSettings) -> str:
    """Why PEFT saves a tensor that is no factor; empty where it does not."""
    if not name.startswith(PREFIX):
        return ""
    module, _, part = name.removeprefix(PREFIX).rpartition(".")
    if any(re.search(rf"(?:^|\.){m}(?:\.|$)", module) for m in settings.modules_to_save or ()):
        return "modules_to_save names it"
    if part == "bias" and settings.bias in ("all", "lora_only"):
        return f"bias is {settings.bias}"
    if part == "weight" and re.search(r"(?:^|\.)(?:embed_tokens|lm_head)(?:\.|$)", module):
        return "PEFT saves embeddings that were resized or adapted"
    return ""


@dataclass(frozen=True)
class PeftAdapter(Adapter):
    """See `Adapter`."""

    settings_read: PeftSettings

    layout: ClassVar[str] = "peft"
    orientation: ClassVar[str] = "PEFT stores A as (r, in) and B as (out, r)"

    @property
    def writer(self) -> str:
        """See `Adapter`."""
        version = self.settings_read.peft_version
        peft = f"PEFT {version}" if version else "PEFT, or what writes its files"
        try:
            card = (self.folder / "README.md").read_text(encoding="utf-8", errors="replace")
        except OSError:
            card = ""
        if re.search(r"^- trl$", card.partition("\n# ")[0], re.MULTILINE):
            return f"TRL through {peft} (its model card)"
        if (self.folder / "training_args.bin").exists():
            return f"a Trainer of transformers through {peft} (training_args.bin)"
        return f"{peft} (peft_version)" if version else f"{peft}: {CONFIG} does not say"

    @property
    def kind(self) -> str:
        """See `Adapter`."""
        return "DoRA" if self.settings_read.use_dora else "LoRA"

    @property
    def base(self) -> str:
        """See `Adapter`."""
        return self.settings_read.base_model_name_or_path or ""

    def rank(self, module: str) -> tuple[int | None, str]:
        """See `Adapter`."""
        pattern = self.settings_read.rank_pattern or {}
        if (key := self._pattern(pattern, module)) is not None:
            return pattern[key], f"rank_pattern.{key}"
        rank = self.settings_read.r
        return (DEFAULT_RANK, "r") if rank is None else (rank, "r")

    def scale(self, module: str) -> Scale:
        """See `Adapter`."""
        read, pattern = self.settings_read, self.settings_read.alpha_pattern or {}
        rank = self.rank(module)[0]
        alpha = DEFAULT_ALPHA if read.lora_alpha is None else read.lora_alpha
        source = "lora_alpha"
        if (key := self._pattern(pattern, module)) is not None:
            alpha, source = pattern[key], "alpha_pattern"
        elif read.lora_alpha is None:
            source = "PEFT's default lora_alpha"
        if rank is None or rank < 1:
            return Scale(None, f"no scale: the rank in {CONFIG} is {rank}")
        if read.use_rslora:
            return Scale(
                alpha / sqrt(rank),
                f"{source} / sqrt(r), {alpha:g} / sqrt({rank}): use_rslora is true",
            )
        return Scale(alpha / rank, f"{source} / r, {alpha:g} / {rank}")

    def _pattern(self, pattern: Iterable[str], module: str) -> str | None:
        """The entry of a pattern that a module matches, as PEFT's `get_pattern_key` chooses it."""
        key = self.modules[module].key if module in self.modules else module
        return next((p for p in pattern if re.match(rf"(.*\.)?({p})$", key)), None)

    def settings(self) -> list[Finding]:
        """See `Adapter`."""
        read, found = self.settings_read, []
        if read.r is None:
            text = f"missing: PEFT takes its default, {DEFAULT_RANK}"
            found.append(Finding("rank", "r", text))
        if read.lora_alpha is None:
            text = (
                f"missing: the scale is lost, PEFT takes its default, {DEFAULT_ALPHA}, divided by r"
            )
            found.append(Finding("scale", "lora_alpha", text))
        elif not isfinite(read.lora_alpha) or read.lora_alpha <= 0:
            text = f"{read.lora_alpha:g} is no positive number"
            found.append(Finding("scale", "lora_alpha", text))
        for key, value in (read.alpha_pattern or {}).items():
            if not isfinite(value) or value <= 0:
                text = f"{value:g} is no positive number"
                found.append(Finding("scale", f"alpha_pattern.{key}", text))
        if read.bias not in (None, "none", "all", "lora_only"):
            text = f"{read.bias!r} is not none, all or lora_only: PEFT does not load it"
            found.append(Finding("bias", "bias", text))
        if not read.target_modules and not read.target_parameters:
            text = "missing: PEFT chooses modules by the type of the model"
            found.append(Finding("modules", "target_modules", text))
        for name in read.modules_to_save or ():
            saved = rf"(?:^|\.){name}(?:\.|$)"
            if not any(re.search(saved, key.removeprefix(PREFIX)) for key in self.extra):
                text = "no tensor of it is there"
                found.append(Finding("modules", f"modules_to_save {name}", text))
        return found

    def targets(self) -> dict[str, bool]:
        """See `Adapter`."""
        given = self.settings_read.target_modules
        keys = [module.key for module in self.modules.values()]
        if given == "all-linear" or given is None:
            return {}
        if isinstance(given, str):
            return {given: any(re.fullmatch(given, key) for key in keys)}
        return {t: any(self._names(t, key) for key in keys) for t in given}

    def untargeted(self) -> list[str]:
        """See `Adapter`."""
        if self.settings_read.target_modules in (None, "all-linear"):
            return []
        return [n for n, m in self.modules.items() if not self._targeted(m.key)]

    def _names(self, target: str, module: str) -> bool:
        return module == target or module.endswith(f".{target}")

    def _targeted(self, module: str) -> bool:
        """As PEFT's `check_target_module_exists`, without layers."""
        read = self.settings_read
        for excluded in (read.exclude_modules,):
            if isinstance(excluded, str) and re.fullmatch(excluded, module):
                return False
            if isinstance(excluded, list) and any(self._names(e, module) for e in excluded):
                return False
        if any(re.match(rf"(^|.*\.){m}($|\..*)", module) for m in read.modules_to_save or ()):
            return False
        given = read.target_modules
        if isinstance(given, str):
            return bool(re.fullmatch(given, module))
        return any(self._names(t, module) for t in given or ())

    def _layers(self) -> set[int] | None:
        given = self.settings_read.layers_to_transform
        if isinstance(given, int):
            return {given}
        return set(given) if given else None

    def wanted(self, names: Iterable[str], count: int) -> set[str]:
        """As PEFT chooses modules."""
        layers = self._layers()
        return {
            name
            for name in names
            if self._targeted(name) and (layers is None or layer_of(canonical(name)) in layers)
        }

    def layer_settings(self, layers: set[int], count: int | None) -> list[Finding] | str:
        """See `Adapter`."""
        given, where = self._layers(), "layers_to_transform"
        if not layers:
            return []
        have = in_words(f"layers.{n}." for n in layers)
        if given is None:
            if count is None:
                return "layers_to_transform is not given: whether tensors are in all layers needs --base"
            return []  # modules of the base that are targeted and have no tensor are named there
        if count is not None and (over := sorted(n for n in given if not 0 <= n < count)):
            text = f"layer {over[0]} is named, the base has {count} layers"
            return [Finding("layers", where, text)]
        if given == layers:
            return []
        should = in_words(f"layers.{n}." for n in given)
        text = f"{should}, but there are tensors for {have}"
        if count is not None and {count - 1 - n for n in given} == layers:
            text += ": they were counted from the wrong end"
        return [Finding("layers", where, text)]

    def bias_settings(self) -> list[Finding]:
        """See `Adapter`."""
        read, found = self.settings_read, []
        biases = [n for n, e in self.extra.items() if n.endswith(".bias") and not e.reason]
        if biases:
            text = f"{len(biases)} biases are in the file, bias is {read.bias or 'none'}"
            found.append(Finding("bias", shown(biases[0]), text))
        own = [m for m in self.modules.values() if "bias" in m.tensors]
        if own and not read.lora_bias:
            text = f"{len(own)} modules have a bias of B, lora_bias is not true"
            found.append(Finding("bias", f"{own[0].key}.lora_B.bias", text))
        if read.lora_bias and len(own) < len(self.modules):
            text = f"true, but {len(self.modules) - len(own)} of {len(self.modules)} modules have no bias of B"
            found.append(Finding("bias", "lora_bias", text))
        return found

    def sizes(self, module: Module) -> Sizes | None:
        """See `Adapter`."""
        if not {"a", "b"} <= module.tensors.keys():
            return None
        a, b = module.tensors["a"].shape, module.tensors["b"].shape
        return Sizes(a[1], a[0], b[1], b[0]) if len(a) == len(b) == 2 else None

    def oriented(self, module: Module) -> tuple[Array, Array]:
        """See `Adapter`."""
        return module.tensors["a"].read().T, module.tensors["b"].read().T
