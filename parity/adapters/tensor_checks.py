"""Checks of the tensors: names, shapes, dtypes, values, and whether they do anything."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from parity.adapters.artefact import Adapter, Finding, Module, Sizes
from parity.adapters.base import Base, BaseModule
from parity.adapters.outcome import NO_BASE, Found, grouped, share
from parity.adapters.tensors import Tensor, shown


def keys(adapter: Adapter, base: Base | None) -> Found:
    """Is each tensor one of the adapter, and is there a module of the base that takes it?"""
    found = list[Finding]()
    strange = [
        name
        for name, extra in adapter.extra.items()
        if not extra.reason and not (name.endswith(".bias") and adapter.layout == "peft")
    ]
    if strange:
        more = f", and {len(strange) - 1} more" if len(strange) > 1 else ""
        text = f"is no tensor of an adapter{more}"
        if adapter.layout == "peft" and all(not n.startswith("base_model.model.") for n in strange):
            text += ": PEFT takes only names that start with base_model.model."
        found.append(Finding("keys", shown(strange[0]), text))
    for name, module in adapter.modules.items():
        if lost := [part.upper() for part in "ab" if part not in module.tensors]:
            other = next(iter(module.tensors.values()))
            found.append(Finding("keys", name, f"has no {lost[0]} beside {shown(other.name)}"))
    if base is None:
        return found, NO_BASE
    lone = sorted(adapter.modules.keys() - base.modules.keys())
    if lone:
        text = f"the base has no such module: {share(lone, adapter.modules)}"
        found.append(Finding("keys", lone[0], text, by_names=True))
    if adapter.kind == "full" and (absent := sorted(adapter.extra.keys() - base.tensors.keys())):
        text = f"the base has no such tensor: {len(absent)} of {len(adapter.extra)}"
        found.append(Finding("keys", shown(absent[0]), text))
    return found, ""


def shapes(adapter: Adapter, base: Base | None) -> Found:
    """Have the tensors the shape and orientation that the module takes?"""
    kinds, unknown = dict[tuple[str, str], list[str]](), list[str]()
    for name, module in adapter.modules.items():
        target = base.modules.get(name) if base else None
        if target is not None and None in (target.inputs, target.outputs):
            unknown.append(name)
        if text := _shape(adapter, name, module, target):
            kinds.setdefault(("", text), []).append(name)
    found = grouped("shapes", kinds, adapter.modules)
    for name, extra in adapter.extra.items():
        theirs = base.tensors.get(name.removeprefix("base_model.model.")) if base else None
        if theirs is not None and extra.reason and theirs.shape != extra.tensor.shape:
            text = f"has shape {extra.tensor.shape}, the base's has {theirs.shape}"
            found.append(Finding("shapes", shown(name), text))
    if base is None:
        return found, "whether they fit the modules needs --base"
    if bare := [n for n, e in adapter.extra.items() if e.reason.startswith("target_parameters")]:
        return found, f"{len(bare)} tensors of target_parameters are not looked into"
    if unknown:
        return found, f"the widths of {share(unknown, adapter.modules)} are packed in the base"
    return found, ""


def _shape(adapter: Adapter, name: str, module: Module, target: BaseModule | None) -> str:
    if not {"a", "b"} <= module.tensors.keys():
        return ""
    a, b = module.tensors["a"].shape, module.tensors["b"].shape
    sizes = adapter.sizes(module)
    if sizes is None:
        return f"A of shape {a} and B of shape {b} are no matrices of an adapter"
    if is_turned(adapter, name, sizes):
        return f"A {a} and B {b} are stored the other way round: {adapter.orientation}"
    if not sizes.fits:
        return f"A {a} and B {b} cannot be multiplied: {adapter.orientation}"
    m = module.tensors.get("m")
    # mlx-lm has one for each entry of an embedding, PEFT for each of its widths.
    entries = adapter.layout == "mlx" and target is not None and target.embedding
    wide = sizes.inputs if entries else sizes.outputs
    if m is not None and m.shape != (wide,):
        return f"the magnitude has shape {m.shape}, it should be ({wide},)"
    if target is None or target.inputs is None or target.outputs is None:
        return ""
    if (sizes.inputs, sizes.outputs, sizes.experts) != (
        target.inputs,
        target.outputs,
        target.experts,
    ):
        wants = f"{target.inputs} → {target.outputs}" + (
            f", {target.experts} experts" * bool(target.experts)
        )
        # Where all widths are equal nothing tells the orientation, and nothing differs either.
        return f"A {a} and B {b} are {sizes.inputs} → {sizes.outputs}, the module of the base is {wants}"
    return ""


def is_turned(adapter: Adapter, name: str, sizes: Sizes) -> bool:
    """Whether both fit only the other way round: with each other, and with the rank that is set."""
    given, turned = adapter.rank(name)[0], sizes.turned
    return turned.fits and turned.rank_a == given and not (sizes.fits and sizes.rank_a == given)


def dtype(adapter: Adapter, base: Base | None) -> Found:
    """Are all tensors floats of one dtype?"""
    census = dict[str, list[str]]()
    for name, tensor in adapter.tensors.items():
        census.setdefault(tensor.dtype_name, []).append(name)
    found = list[Finding]()
    for odd, names in census.items():
        if not adapter.tensors[names[0]].is_float:
            text = f"{len(names)} of {len(adapter.tensors)} tensors are {odd}, which is no float of an adapter"
            found.append(Finding("dtype", shown(names[0]), text))
    factors = dict[str, list[str]]()
    for module in adapter.modules.values():
        for part in "ab":
            if (t := module.tensors.get(part)) is not None and t.is_float:
                factors.setdefault(t.dtype_name, []).append(t.name)
    if len(factors) > 1:
        rare, *_, common = sorted(factors, key=lambda kind: len(factors[kind]))
        text = f"{len(factors[rare])} tensors are {rare}, {len(factors[common])} are {common}"
        found.append(Finding("dtype", shown(factors[rare][0]), text))
    return found, ""


def values(adapter: Adapter, base: Base | None) -> Found:
    """Are all values finite numbers?"""
    return values_of(adapter.tensors), ""


def values_of(tensors: Mapping[str, Tensor]) -> list[Finding]:
    """Tensors with values that are no numbers, or with none at all."""
    kinds = dict[str, list[str]]()
    for name, tensor in tensors.items():
        if not tensor.size:
            kinds.setdefault(f"has shape {tensor.shape}: no values", []).append(name)
        elif tensor.is_float and (wrong := int((~np.isfinite(tensor.read())).sum())):
            text = f"{wrong} of {tensor.size} values are NaN or infinite"
            kinds.setdefault(text, []).append(name)
    return [
        Finding("values", shown(names[0]), text + f", and {len(names) - 1} more" * (len(names) > 1))
        for text, names in kinds.items()
    ]


def effect(adapter: Adapter, base: Base | None) -> Found:
    """Does the adapter change what its modules compute?"""
    idle = list[str]()
    for name, module in adapter.modules.items():
        factors = [module.tensors[part] for part in "ab" if part in module.tensors]
        if any(t.is_float and t.size and not t.read().any() for t in factors):
            idle.append(name)
    if adapter.kind == "full":
        return _trained(adapter, base)
    if not idle:
        return [], ""
    if adapter.kind == "DoRA":
        text = (
            f"A·B is zero in {share(idle, adapter.modules)}: only the magnitudes can have an effect"
        )
    elif len(idle) == len(adapter.modules):
        text = f"A·B is zero in all {len(idle)} modules: the adapter has no effect"
    else:
        text = f"A·B is zero in {share(idle, adapter.modules)}: they have no effect"
    parts = adapter.modules[idle[0]].tensors
    where = next(t.name for p in "ba" if (t := parts.get(p)) is not None and not t.read().any())
    return [Finding("effect", shown(where), text)], ""


def _trained(adapter: Adapter, base: Base | None) -> Found:
    """Whether weights that were trained in full differ from the base's."""
    if base is None:
        return [], "whether the weights differ from the base's needs --base"
    pairs = [(e.tensor, base.tensors[n]) for n, e in adapter.extra.items() if n in base.tensors]
    if not pairs:
        return [], "the base has no weights of these names"
    if any(not np.array_equal(ours.read(), theirs.read()) for ours, theirs in pairs):
        return [], ""
    text = f"all {len(pairs)} weights are those of the base: training changed nothing"
    return [Finding("effect", shown(pairs[0][0].name), text)], ""
