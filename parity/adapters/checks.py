"""What is asked of an adapter's files: each check is a function with findings or a reason to give none.

A check that could not be made says why: it is no evidence that nothing is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from parity import resources
from parity.adapters.artefact import Adapter, Finding, Module, Sizes
from parity.adapters.base import Base, BaseModule, model_tensors
from parity.adapters.tensors import Tensor, read_object, shown
from parity.errors import UsageError
from parity.judge.updates import named
from parity.names import canonical, layer_of

NO_BASE = "needs --base"


@dataclass(frozen=True)
class Outcome:
    """What came of one check.

    Attributes:
        check: Its name.
        question: What it asks.
        findings: What is wrong.
        unchecked: What could not be told, and why; empty where all was.
        note: What was seen, in words.
    """

    check: str
    question: str
    findings: list[Finding] = field(default_factory=list)
    unchecked: str = ""
    note: str = ""


Found = tuple[list[Finding], str]
"""Findings, and what could not be told."""
Check = Callable[[Adapter, Base | None], Found]


def settings(adapter: Adapter, base: Base | None) -> Found:
    """Is all there that the loader of the stack reads?"""
    return _of(adapter, "settings"), ""


def kind(adapter: Adapter, base: Base | None) -> Found:
    """Are the tensors those of the fine-tune type?"""
    found, modules = _of(adapter, "kind"), adapter.modules
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
        text = f"DoRA, but {_share(without, modules)} have no magnitude"
        found.append(Finding("kind", where, text))
    elif adapter.kind == "LoRA" and with_m:
        text = f"LoRA, but {_share(with_m, modules)} have DoRA's magnitude, which would be lost"
        found.append(Finding("kind", where, text))
    return found, ""


def rank(adapter: Adapter, base: Base | None) -> Found:
    """Is the rank of the tensors the one in the settings?"""
    kinds = dict[tuple[str, str], list[str]]()
    for name, module in adapter.modules.items():
        sizes, (given, where) = adapter.sizes(module), adapter.rank(name)
        # What is stored the other way round, or cannot be multiplied, is named under shapes.
        if sizes is None or not sizes.fits or given is None or _is_turned(adapter, name, sizes):
            continue
        if sizes.rank_a != given:
            kinds.setdefault((where, f"{given}, but the tensors have {sizes.rank_a}"), []).append(
                name
            )
    return _of(adapter, "rank") + _grouped("rank", kinds, adapter.modules), ""


def scale(adapter: Adapter, base: Base | None) -> Found:
    """Is there a scale, and only one?"""
    return _of(adapter, "scale"), ""


def modules(adapter: Adapter, base: Base | None) -> Found:
    """Are the modules adapted that the settings name?"""
    found = _of(adapter, "modules")
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
        text = f"names no module like {_share(lone, adapter.modules)}, which have tensors"
        found.append(Finding("modules", where, text))
    if base is None:
        return found, "whether modules that should have been adapted have no tensors needs --base"
    raw = {module.key: name for name, module in base.modules.items()}
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
        text = f"{len(absent)} modules of the base should be adapted and have no tensors"
        found.append(Finding("modules", named(absent), text, by_names=True))
    return found, ""


def layers(adapter: Adapter, base: Base | None) -> Found:
    """Are the layers adapted that the settings count or name?"""
    found = _of(adapter, "layers")
    names = [canonical(name) for name in (adapter.modules or adapter.extra)]
    have = {n for name in names if (n := layer_of(name)) is not None}
    told = adapter.layer_settings(have, base.layers if base else None)
    return (found, told) if isinstance(told, str) else (found + told, "")


def bias(adapter: Adapter, base: Base | None) -> Found:
    """Are there biases where the settings say so, and nowhere else?"""
    found, given = _of(adapter, "bias") + adapter.bias_settings(), adapter.written.get("bias")
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
        text = f"{given}, but no bias is in the file; {_share(biased, names)} of the base have one"
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
        text = f"the base has no such module: {_share(lone, adapter.modules)}"
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
    found = _grouped("shapes", kinds, adapter.modules)
    for name, extra in adapter.extra.items():
        theirs = base.tensors.get(name.removeprefix("base_model.model.")) if base else None
        if theirs is not None and extra.reason and theirs.shape != extra.tensor.shape:
            text = f"has shape {extra.tensor.shape}, the base's has {theirs.shape}"
            found.append(Finding("shapes", shown(name), text))
    if base is None:
        return found, "whether they fit the modules needs --base"
    if unknown:
        return found, f"the widths of {_share(unknown, adapter.modules)} are packed in the base"
    return found, ""


def _shape(adapter: Adapter, name: str, module: Module, target: BaseModule | None) -> str:
    if not {"a", "b"} <= module.tensors.keys():
        return ""
    a, b = module.tensors["a"].shape, module.tensors["b"].shape
    sizes = adapter.sizes(module)
    if sizes is None:
        return f"A of shape {a} and B of shape {b} are no matrices of an adapter"
    if _is_turned(adapter, name, sizes):
        return f"A {a} and B {b} are stored the other way round: {adapter.orientation}"
    if not sizes.fits:
        return f"A {a} and B {b} cannot be multiplied: {adapter.orientation}"
    m = module.tensors.get("m")
    # Of an embedding there is one for each entry of the vocabulary.
    wide = sizes.inputs if module.embedding or (target and target.embedding) else sizes.outputs
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


def _is_turned(adapter: Adapter, name: str, sizes: Sizes) -> bool:
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
        text = f"A·B is zero in {_share(idle, adapter.modules)}: only the magnitudes can have an effect"
    elif len(idle) == len(adapter.modules):
        text = f"A·B is zero in all {len(idle)} modules: the adapter has no effect"
    else:
        text = f"A·B is zero in {_share(idle, adapter.modules)}: they have no effect"
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


CHECKS: tuple[Check, ...] = (
    settings, trained_on, kind, rank, scale, modules, layers, bias, keys, shapes, dtype, values, effect,
)  # fmt: skip


def check_files(adapter: Adapter, base: Base | None) -> list[Outcome]:
    """All that files alone can tell.

    Raises:
        UsageError: The base takes none of the modules.
    """
    if base is not None:
        _check_fit(adapter, base)
    outcomes = []
    for check in CHECKS:
        found, unchecked = check(adapter, base)
        question = (check.__doc__ or "").strip()
        outcomes.append(Outcome(check.__name__, question, found, unchecked))
    return outcomes


def _check_fit(adapter: Adapter, base: Base) -> None:
    names = set(adapter.modules) or (set(adapter.extra) if adapter.kind == "full" else set())
    theirs = base.modules if adapter.modules else base.tensors
    if not names:
        return
    known = [name for name in names if name in theirs]
    if not known:
        raise UsageError(
            f"--base {base.source}: it has none of the {len(names)} modules of {adapter.folder} "
            f"({named(sorted(names))}): give the model that the adapter was trained on"
        )
    widths = [
        (sizes, base.modules[name])
        for name in known
        if adapter.modules and (sizes := adapter.sizes(adapter.modules[name])) and sizes.fits
        and not _is_turned(adapter, name, sizes)
    ]  # fmt: skip
    fits = [
        module for sizes, module in widths
        if None in (module.inputs, module.outputs)
        or (sizes.inputs, sizes.outputs) == (module.inputs, module.outputs)
    ]  # fmt: skip
    if widths and not fits:
        sizes, module = widths[0]
        raise UsageError(
            f"--base {base.source}: none of the {len(widths)} modules of {adapter.folder} fits it: "
            f"{module.key} is {module.inputs} → {module.outputs}, the adapter's is "
            f"{sizes.inputs} → {sizes.outputs}: give the model that the adapter was trained on"
        )


def _of(adapter: Adapter, check: str) -> list[Finding]:
    return [finding for finding in adapter.settings() if finding.check == check]


def _share(some: Iterable[str], total: Mapping[str, object]) -> str:
    names = sorted(some)
    whole = "all " if len(names) == len(total) else ""
    count = f"{len(names)}" if whole else f"{len(names)} of {len(total)}"
    return f"{whole}{count} modules ({named(names)})"


def _grouped(
    check: str, kinds: Mapping[tuple[str, str], list[str]], total: Mapping[str, object]
) -> list[Finding]:
    """One finding for each text, with the modules that it is said of."""
    return [
        Finding(check, where or sorted(names)[0], f"{_share(names, total)}: {text}")
        for (where, text), names in kinds.items()
    ]
