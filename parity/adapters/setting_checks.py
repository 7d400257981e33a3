"""Checks of the settings against the tensors: type, rank, scale, modules, layers, biases, base."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from parity import resources
from parity.adapters.artefact import Adapter, Finding
from parity.adapters.base import Base, model_tensors
from parity.adapters.outcome import NO_BASE, Found, grouped, of, share
from parity.adapters.tensor_checks import is_turned
from parity.adapters.tensors import Tensor, read_object, shown
from parity.errors import UsageError
from parity.judge.updates import named
from parity.names import canonical, layer_of


def settings(adapter: Adapter, base: Base | None) -> Found:
    """Is all there that the loader of the stack reads?"""
    return of(adapter, "settings"), ""


def kind(adapter: Adapter, base: Base | None) -> Found:
    """Are the tensors those of the fine-tune type?"""
    found, modules = of(adapter, "kind"), adapter.modules
    with_m = [n for n, m in modules.items() if "m" in m.tensors]
    where = "fine_tune_type" if adapter.layout == "mlx" else "use_dora"
    if adapter.kind == "full":
        if modules:
            text = (
                f"full, but {len(modules)} modules have tensors of LoRA ({named(sorted(modules))})"
            )
            found.append(Finding("kind", where, text))
        return found, ""
    if not modules:
        first = shown(min(adapter.tensors)) if adapter.tensors else "no tensor at all"
        text = f"{adapter.kind}, but the file has no tensors of LoRA: {first}"
        found.append(Finding("kind", where, text))
    elif adapter.kind == "DoRA" and len(with_m) < len(modules):
        without = sorted(modules.keys() - set(with_m))
        text = f"DoRA, but {share(without, modules)} have no magnitude"
        found.append(Finding("kind", where, text))
    elif adapter.kind == "LoRA" and with_m:
        text = f"LoRA, but {share(with_m, modules)} have DoRA's magnitude, which would be lost"
        found.append(Finding("kind", where, text))
    return found, ""


def rank(adapter: Adapter, base: Base | None) -> Found:
    """Is the rank of the tensors the one in the settings?"""
    kinds = dict[tuple[str, str], list[str]]()
    for name, module in adapter.modules.items():
        sizes, (given, where) = adapter.sizes(module), adapter.rank(name)
        # What is stored the other way round, or cannot be multiplied, is named under shapes.
        if sizes is None or not sizes.fits or given is None or is_turned(adapter, name, sizes):
            continue
        if sizes.rank_a != given:
            kinds.setdefault((where, f"{given}, but the tensors have {sizes.rank_a}"), []).append(
                name
            )
    return of(adapter, "rank") + grouped("rank", kinds, adapter.modules), ""


def scale(adapter: Adapter, base: Base | None) -> Found:
    """Is there a scale, and only one?"""
    return of(adapter, "scale"), ""


def modules(adapter: Adapter, base: Base | None) -> Found:
    """Are the modules adapted that the settings name?"""
    found = of(adapter, "modules")
    where = "lora_parameters.keys" if adapter.layout == "mlx" else "target_modules"
    for target, matches in adapter.targets().items():
        if not matches:
            text = "matches no tensor: nothing of it is adapted"
            found.append(Finding("modules", f"{where}: {shown(target)}", text))
    if (
        adapter.layout == "mlx"
        and adapter.written.get("lora_parameters", {})
        and not adapter.targets()
    ):
        keys = adapter.written["lora_parameters"].get("keys")
        if keys == []:
            found.append(Finding("modules", where, "is an empty list: nothing is adapted"))
    if lone := adapter.untargeted():
        text = f"names no module like {share(lone, adapter.modules)}, which have tensors"
        found.append(Finding("modules", where, text))
    if base is None:
        return found, "whether modules that should have been adapted have no tensors needs --base"
    raw = {
        module.key: name
        for name, module in base.modules.items()
        if module.only in ("", adapter.layout)
    }
    linear = [key for key, name in raw.items() if not base.modules[name].embedding]
    if adapter.written.get("target_modules") == "all-linear":
        should = {name for name in map(raw.__getitem__, linear) if not name.endswith("lm_head")}
    else:
        # Whole names are those of the framework, which may call the same module otherwise.
        own = {module.key: name for name, module in adapter.modules.items() if name in base.modules}
        names = {**{key: name for key, name in raw.items() if name not in own.values()}, **own}
        should = {names[key] for key in adapter.wanted(names, base.layers)}
    # Layers that no tensor has are named under layers.
    layers = {layer_of(name) for name in adapter.modules}
    absent = sorted(name for name in should - adapter.modules.keys() if layer_of(name) in layers)
    if not adapter.layer_settings({n for n in layers if n is not None}, base.layers):
        absent = sorted(should - adapter.modules.keys())
    if absent and adapter.modules:
        verb = "have" if len(absent) > 1 else "has"
        count = f"{len(absent)} module{'s' * (len(absent) > 1)}"
        text = f"{count} of the base should be adapted and {verb} no tensors"
        found.append(Finding("modules", named(absent), text, by_names=True))
    return found, ""


def layers(adapter: Adapter, base: Base | None) -> Found:
    """Are the layers adapted that the settings count or name?"""
    found = of(adapter, "layers")
    names = [canonical(name) for name in (adapter.modules or adapter.extra)]
    have = {n for name in names if (n := layer_of(name)) is not None}
    told = adapter.layer_settings(have, base.layers if base else None)
    return (found, told) if isinstance(told, str) else (found + told, "")


def bias(adapter: Adapter, base: Base | None) -> Found:
    """Are there biases where the settings say so, and nowhere else?"""
    found, given = of(adapter, "bias") + adapter.bias_settings(), adapter.written.get("bias")
    if given not in ("all", "lora_only") or any(name.endswith(".bias") for name in adapter.extra):
        return found, ""
    if base is None:
        return (
            found,
            f"bias is {given} and none is in the file: whether the model has any needs --base",
        )
    names = base.modules if given == "all" else adapter.modules
    biased = [n for n in names if n in base.modules and base.modules[n].bias]
    if biased:
        text = f"{given}, but no bias is in the file; {share(biased, names)} of the base have one"
        found.append(Finding("bias", "bias", text))
    return found, ""


def trained_on(adapter: Adapter, base: Base | None) -> Found:
    """Is --base the model that the settings name?"""
    if base is None or not adapter.base:
        return [], NO_BASE if adapter.base else ""
    try:
        folder = Path(resources.model_dir(adapter.base))
    except UsageError:
        folder = Path(adapter.base)
    if adapter.base == base.source or folder.resolve() == base.folder.resolve():
        return [], ""
    config = folder / "config.json"
    if config.is_file():
        kinds = [found.get("model_type") for found in (read_object(config), base.config)]
        if kinds[0] != kinds[1]:
            text = f"{shown(adapter.base)}, a {kinds[0]}, but --base is a {kinds[1]}"
            return [Finding("trained_on", "base", text)], ""
        if tensors_alike(model_tensors(folder), base.tensors):
            return [], ""
    if folder.name == Path(base.source).name:
        return [], ""
    return [], f"the settings name {shown(adapter.base)}: whether that is --base cannot be told"


def tensors_alike(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    """Whether two models hold the same tensors, bit for bit."""
    return ours.keys() == theirs.keys() and all(
        (one.dtype, one.shape) == (theirs[name].dtype, theirs[name].shape)
        and np.array_equal(one.read(), theirs[name].read(), equal_nan=one.is_float)
        for name, one in ours.items()
    )
