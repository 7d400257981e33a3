"""Two artefacts, by what they do to each module: scale · A · B, in float64."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from parity.adapters.artefact import Adapter, Finding
from parity.adapters.base import Base
from parity.adapters.fused import Differences, Model, is_packed
from parity.adapters.outcome import Outcome
from parity.adapters.tensors import Tensor, shown
from parity.judge.noise import EPS, HEADROOM
from parity.judge.updates import Updates, compare_updates, layers, named
from parity.names import canonical, layer_of
from parity.trace import Array

QUESTION = "Does it do the same as the other artefact, by scale · A · B of each module in float64?"


def compare_artefacts(ours: Adapter | Model, theirs: Adapter | Model, base: Base | None) -> Outcome:
    """What differs, or that nothing does.

    Args:
        ours: What is checked.
        theirs: What it is compared with.
        base: What both are for; a fused model and an adapter can only be compared with it.
    """
    if isinstance(ours, Adapter) and isinstance(theirs, Adapter):
        return _adapters(ours, theirs)
    if isinstance(ours, Model) and isinstance(theirs, Model):
        return _models(ours, theirs)
    if base is None:
        return _outcome([], "a model and an adapter can only be compared with --base")
    model, adapter = (ours, theirs) if isinstance(ours, Model) else (theirs, ours)
    assert isinstance(model, Model) and isinstance(adapter, Adapter)
    if model.changed is None:
        return _outcome([], "the weights of model and base cannot be compared")
    if is_packed(base.tensors):
        return _outcome([], "the weights are quantized: scale · A · B is not in them as it is")
    if adapter.kind != "LoRA":
        return _outcome([], f"a {adapter.kind} adapter is not compared with a model")
    return _fused(Differences(model, base), adapter.updates())


def _outcome(found: list[Finding], unchecked: str = "", note: str = "") -> Outcome:
    return Outcome("against", QUESTION, found, unchecked, note)


def _adapters(ours: Adapter, theirs: Adapter) -> Outcome:
    mine, other, found = ours.updates(), theirs.updates(), list[Finding]()
    folder = str(theirs.folder)
    if ours.kind != theirs.kind:
        text = f"{ours.kind}, the other is {theirs.kind}"
        found.append(Finding("against", "kind", text))
    if text := _sets(mine, other):
        found.append(Finding("against", sorted(mine.keys() ^ other.keys())[0], text))
    if mine.keys() & other.keys():
        metric = compare_updates("scale · A · B", mine, other)
        if not metric.verdict.green:
            size = "" if np.isnan(metric.value) else f", by up to {metric.value:.3g}"
            text = f"scale · A · B differs{size}: {metric.note}"
            found.append(Finding("against", metric.where or folder, text))
        note = f"scale · A · B of {len(mine)} modules: {metric.verdict}"
    else:
        note = "no module has A and B in both"
        if ours.kind != "full":
            found.append(Finding("against", folder, note))
    rest = _rest(ours), _rest(theirs)
    found += _tensors(*rest)
    return _outcome(found, note=note)


def _rest(adapter: Adapter) -> dict[str, Tensor]:
    """What an adapter holds beside A and B."""
    found = {
        f"{name} ({'magnitude' if part == 'm' else 'bias'})": tensor
        for name, module in adapter.modules.items()
        for part, tensor in module.tensors.items()
        if part in ("m", "bias")
    }
    return found | {canonical(name): extra.tensor for name, extra in adapter.extra.items()}


def _models(ours: Model, theirs: Model) -> Outcome:
    sides = [
        {canonical(name): tensor for name, tensor in model.files.tensors.items()}
        for model in (ours, theirs)
    ]
    return _outcome(_tensors(*sides), note=f"{len(sides[0])} tensors")


def _tensors(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> list[Finding]:
    """Tensors that are compared as they are, rounding to a smaller dtype included."""
    found = list[Finding]()
    if lone := sorted(ours.keys() ^ theirs.keys()):
        side = "here" if lone[0] in ours else "in the other"
        text = f"is {side} alone, and {len(lone) - 1} more tensors are in one of the two"
        found.append(Finding("against", shown(lone[0]), text))
    off = list[str]()
    for name in ours.keys() & theirs.keys():
        a, b = ours[name].read(), theirs[name].read()
        if a.shape != b.shape or not np.array_equal(a, b):
            off.append(name)
    if off:
        text = f"differs, as {len(off) - 1} others of {len(ours.keys() & theirs.keys())} tensors do"
        found.append(Finding("against", shown(min(off)), text))
    return found


def _sets(ours: Updates, theirs: Updates) -> str:
    """In words, which modules only one of them adapts."""
    mine, other = set(ours), set(theirs)
    if mine == other:
        return ""
    levels = [{layer_of(name) for name in names} for names in (mine, other)]
    if levels[0] != levels[1]:
        return f"adapted: {layers(mine)}; in the other: {layers(other)}"
    parts = []
    for names, where in ((mine - other, "here"), (other - mine, "in the other")):
        if names:
            parts.append(f"{len(names)} {where} ({named(sorted(names))})")
    return "modules that only one of the two adapts: " + ", ".join(parts)


def _fused(weights: Differences, updates: Updates) -> Outcome:
    """Whether a model has what an adapter adds, and nothing else."""
    found, gaps, lost = list[Finding](), dict[str, float](), list[str]()
    for name in updates:
        if name not in weights:
            if updates[name].any():
                lost.append(name)
            continue
        given, got = updates[name], weights[name]
        if got.shape == given.shape[::-1] != given.shape:
            got = got.T  # an embedding is stored the other way round
        if got.shape != given.shape:
            text = f"the weight has shape {got.shape}, the adapter's update {given.shape}"
            found.append(Finding("against", name, text))
            continue
        gap = float(np.abs(got - given).max())
        if not gap <= HEADROOM * (weights.rounding(name) + _in_float32(updates, name)):
            gaps[name] = gap
    if lost:
        text = f"{len(lost)} of {len(updates)} modules that the adapter changes have the base's weight: {named(lost)}"
        found.append(Finding("against", lost[0], text))
    if gaps:
        worst = max(gaps, key=lambda name: gaps[name])
        text = f"{len(gaps)} of {len(updates)} modules differ from base + scale · A · B, by up to {gaps[worst]:.3g}"
        text += _ratio(weights[worst], updates[worst])
        found.append(Finding("against", worst, text))
    if more := sorted(weights.keys() - updates.keys()):
        text = f"{len(more)} weights differ from the base's that the adapter does not change: {named(more)}"
        found.append(Finding("against", more[0], text))
    return _outcome(found, note=f"fused weights of {len(updates)} modules")


def _in_float32(updates: Updates, name: str) -> float:
    """What a product in float32 may be off, of which `Updates.rounding` is that in float64."""
    [bound] = updates.rounding(name).values()
    return float(np.max(bound)) * EPS["float32"] / EPS["float64"]


def _ratio(got: Array, given: Array) -> str:
    """Whether one is a multiple of the other, by least squares."""
    size = float((given * given).sum())
    if not size:
        return ""
    factor = float((got * given).sum() / size)
    left = float(np.linalg.norm(got - factor * given) / np.sqrt(size))
    return f": they have {factor:.4g} times that" if left < 1e-3 * max(abs(factor), 1e-3) else ""
