"""What an adapter adds to each module, scale · A · B in float64, and in words how two of them differ."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from parity.judge.compare import compare, compare_exact, compare_group, nothing
from parity.judge.noise import EPS, Noise, Sources
from parity.names import is_factor, layer_of
from parity.record import Metric, Verdict
from parity.trace import Array

NAMED = 3  # modules that a sentence names
PRODUCTS = "products in float64"


class Updates(Mapping[str, Array]):
    """Module → scale · A · B as (out, in) or (experts, out, in), in float64.

    Multiplied when it is looked up: all of them together are as large as the model. Tensors that are no
    factors (DoRA's magnitudes, weights that are trained themselves) stand beside these as they are.
    """

    def __init__(self, adapter: Mapping[str, Array], scales: float | Mapping[str, float]) -> None:
        self._adapter = adapter
        names = {name.rpartition(".")[0] if is_factor(name) else name for name in adapter}
        if not isinstance(scales, Mapping):
            scales = dict.fromkeys(names, scales)
        # A module without a scale has no update: not a number is never green.
        self.scales = {
            name: 1.0 if name in adapter else scales.get(name, float("nan"))
            for name in sorted(names)
        }

    def factors(self, name: str) -> tuple[Array, Array]:
        """A and B of a module."""
        return self._adapter[f"{name}.lora_a"], self._adapter[f"{name}.lora_b"]

    def only(self, names: Iterable[str]) -> Updates:
        """The same of some of the modules."""
        wanted = {key for name in names for key in (name, *(f"{name}.{f}" for f in _FACTORS))}
        return Updates({k: v for k, v in self._adapter.items() if k in wanted}, self.scales)

    def __getitem__(self, name: str) -> Array:
        if name in self._adapter:
            return self._adapter[name].astype(np.float64)
        a, b = (factor.astype(np.float64) for factor in self.factors(name))
        with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is compared as such
            return self.scales[name] * (b @ a if a.ndim == 3 else (a @ b).T)

    def __iter__(self) -> Iterator[str]:
        return iter(self.scales)

    def __len__(self) -> int:
        return len(self.scales)

    def rounding(self, name: str) -> Sources:
        """How far a product in float64 may be off: Higham (2002), equation 3.13.

        |A|·|B| there is bounded by the greatest norms of what is multiplied.
        """
        if name in self._adapter:
            return {PRODUCTS: np.zeros(())}
        a, b = (factor.astype(np.float64) for factor in self.factors(name))
        unit = (a.shape[1] + 1) * EPS["float64"] / 2  # the rank, and the scale
        norms = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=-1 if b.ndim == 3 else 0)
        size = abs(self.scales[name]) * float(norms[0].max() * norms[1].max())
        return {PRODUCTS: np.array(unit / (1 - unit) * size)}


_FACTORS = ("lora_a", "lora_b")


def compare_modules(name: str, loaded: Updates, given: Updates, note: str = "") -> Metric:
    """Which modules have an adapter, against those that should."""
    lone = sorted(loaded.keys() ^ given.keys())
    count = np.array([len(lone)])
    metric = compare_exact(name, count, np.zeros_like(count), note=note)
    total = len(loaded.keys() | given.keys())
    metric = metric.model_copy(update={"total": total, "mismatched": len(lone)})
    if lone:
        words = _modules(given.keys(), loaded.keys())
        metric = metric.model_copy(update={"where": lone[0], "note": words})
    return metric


def compare_updates(name: str, loaded: Updates, given: Updates) -> Metric:
    """What each module that both have adds to its weight, in float64."""
    common = [module for module in given if module in loaded]
    if not common:
        return nothing(name)
    noise = Noise(False, given={module: given.rounding(module) for module in common})
    metric = compare_group(name, loaded.only(common), given.only(common), noise)
    if metric.verdict is Verdict.DIVERGE:
        off = [
            module
            for module in common
            if compare(module, loaded[module], given[module], noise).verdict is Verdict.DIVERGE
        ]
        note = _differences(off, len(common), given, loaded)
        metric = metric.model_copy(update={"note": note})
    return metric


def _modules(given: Iterable[str], loaded: Iterable[str]) -> str:
    """In words, which modules should have an adapter and which have."""
    wanted, found = set(given), set(loaded)
    if not found:
        return f"none has an adapter after loading, {len(wanted)} were handed over"
    have, should = layers(found), layers(wanted)
    if have != should:
        return f"adapted after loading: {have}; handed over: {should}"
    parts = []
    for names, what in ((wanted - found, "have none after loading"), (found - wanted, "have one")):
        if names:
            parts.append(f"{len(names)} {what} ({named(sorted(names))})")
    return f"of {len(wanted)} modules that were handed over with one, " + ", ".join(parts)


def layers(modules: Iterable[str]) -> str:
    """In words, the layers of these modules: `layers 14 to 17`, `layer 17`."""
    numbers = sorted({n for name in modules if (n := layer_of(name)) is not None})
    if not numbers:
        return "no layers"
    run = numbers == list(range(numbers[0], numbers[-1] + 1)) and len(numbers) > 1
    shown = f"{numbers[0]} to {numbers[-1]}" if run else ", ".join(map(str, numbers))
    return f"layer{'s' if len(numbers) > 1 else ''} {shown}"


def named(modules: list[str]) -> str:
    """The first few of these modules, by name."""
    return ", ".join(modules[:NAMED]) + (", …" if len(modules) > NAMED else "")


def _differences(off: list[str], total: int, given: Updates, loaded: Updates) -> str:
    """In words, how the updates of these modules differ; each part is read or computed again."""
    kinds: dict[str, list[str]] = {}
    for module in off:
        kinds.setdefault(_difference(module, given, loaded), []).append(module)
    parts = []
    for what, modules in kinds.items():
        some = f"{len(modules)} of {total} modules ({named(modules)})"
        parts.append(f"{f'all {total} modules' if len(modules) == total else some}: {what}")
    return "; ".join(parts)


def _difference(module: str, given: Updates, loaded: Updates) -> str:
    ours, wanted = loaded.factors(module), given.factors(module)
    ranks = ours[0].shape[1], wanted[0].shape[1]
    zero = [name for name, factor in zip("AB", ours, strict=True) if not factor.any()]
    rounded = [k for k, to in ROUND.items() if _same(ours, (to(wanted[0]), to(wanted[1])))]
    others = [name for name in _siblings(module, given) if _same(ours, given.factors(name))]
    words = []
    if ranks[0] != ranks[1]:
        words.append(f"rank {ranks[0]} in the place of {ranks[1]}")
    if zero:
        words.append(f"{' and '.join(zero)} is zero")
    elif _same(ours, wanted):
        words.append("A and B are the same")
    elif rounded:
        words.append(f"A and B are rounded to {rounded[0]}")
    elif others:
        away = (layer_of(others[0]) or 0) - (layer_of(module) or 0)
        words.append(f"A and B are those of the layer {away:+d} away")
    else:
        pairs = zip("AB", ours, wanted, strict=True)
        changed = [name for name, x, y in pairs if not np.array_equal(x, y)]
        words.append(f"{' and '.join(changed)} differ{'s' * (len(changed) == 1)}")
    found, scale = loaded.scales[module], given.scales[module]
    if found != scale:
        words.append(f"scale {found:g} in the place of {scale:g}, {_times(found, scale, ranks[1])}")
    return ", ".join(words)


def _times(found: float, scale: float, rank: int) -> str:
    if np.isclose(found, scale * rank, rtol=1e-9):
        return f"times the rank, {rank}"
    if np.isclose(found * rank, scale, rtol=1e-9):
        return f"divided by the rank, {rank}"
    return f"times {found / scale:.4g}" if scale else "which is 0"


def _same(ours: tuple[Array, Array], theirs: tuple[Array, Array]) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(ours, theirs, strict=True))


def _siblings(module: str, given: Updates) -> Iterator[str]:
    """Modules of the same name in other layers."""
    layer = layer_of(module)
    for name in given if layer is not None else ():
        if name.replace(f"layers.{layer_of(name)}.", f"layers.{layer}.", 1) == module != name:
            yield name


def _bfloat16(values: Array) -> Array:
    """Rounded to the nearest bfloat16, ties to even; NumPy has no such type."""
    bits = values.astype(np.float32).view(np.uint32)
    kept = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return kept.astype(np.uint32).view(np.float32)


def _float16(values: Array) -> Array:
    return values.astype(np.float16).astype(np.float32)


ROUND = {"bfloat16": _bfloat16, "float16": _float16}
"""Half dtypes to what rounds float32 to them, held as float32."""
