"""What rounding alone explains of a difference, measured around the reference.

A floor comes from the reference and the float64 referee, never from the subject or from the
distance between the two sides. The tolerance is `HEADROOM` times the floor.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from parity.trace import Array

HEADROOM = 9.0
"""How many floors a clean cell may be off: a floor is a few draws of an error whose other draw is the
subject's own rounding. Of the multiples that one clean cell in a thousand passes, by probe and dtype
(`reports/calibration.md`), the greatest upper 95 % bound is 7.0, of the gradient in float32. These are
cells of three tiny models; the rest is for models that were not measured so."""

EPS = {"float64": 2.0**-52, "float32": 2.0**-23, "bfloat16": 2.0**-7, "float16": 2.0**-10}
"""Distance from 1 to the next number of a dtype."""

HALF = ("bfloat16", "float16")
LOGARITHMS = ("loss", "token_loss", "completion_loss")

# Sources of a floor, by the name under which a metric lists them.
REFEREE = "float64 run"
POOLED = "float64 run, tensors alike"
PERTURBED = "inputs moved by one ulp"
SUMMATION = "sum over the vocabulary"
ULP = "one ulp of the size"
REPEATS = {"reference": "repeat of the reference", "subject": "repeat of the subject"}
COMPILED = "reference, compiled otherwise"

Sources = dict[str, Array | str]
"""Name of a source → what it explains, elementwise, or why there is no value."""


@dataclass(frozen=True)
class Noise:
    """What is known of the rounding around a reference.

    Attributes:
        exact: Bits must be equal; the rest then only explains.
        referee: The quantities in float64, by name; may be empty.
        rounded: The same from the referee's implementation in the recipe's dtype, by name.
        rounded_is_reference: Whether the reference is that implementation.
        perturbed: The reference with its inputs moved by one ulp, by name; may be empty.
        reduction: How much a running sum over the vocabulary is off: absolute for what is a
            logarithm of it (losses), relative for what is divided by it (gradients).
        dtype: What the capture declares that its values were computed in; empty: the arrays' own.
        half: Whether the model computes in 16 bits.
        repeats: One of `REPEATS` or `COMPILED` → how far that side is from itself when it is run again so,
            by name. The subject's counts as far as the reference's sources go.
        absent: Source → why it is not there.
        main: The source without which nothing diverges, empty where there is none to be expected.
        given: Name → sources that were measured elsewhere, in the place of all of these.
        why_floor: Why two paths of one framework are held to the floor and not to bits.
    """

    exact: bool
    referee: Mapping[str, Array] = field(default_factory=dict)
    rounded: Mapping[str, Array] = field(default_factory=dict)
    rounded_is_reference: bool = True
    perturbed: Mapping[str, Array] = field(default_factory=dict)
    reduction: float = 0.0
    dtype: str = ""
    half: bool = False
    repeats: Mapping[str, Mapping[str, Array]] = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)
    main: str = ""
    given: Mapping[str, Sources] = field(default_factory=dict)
    why_floor: str = ""

    def sources(self, name: str, reference: Array) -> Sources:
        """What each source explains of one tensor, elementwise, or why it is absent."""
        if name in self.given:
            return dict(self.given[name])
        rounded = reference if self.rounded_is_reference else self.rounded.get(name)
        found: Sources = {
            REFEREE: self._between(REFEREE, rounded, self.referee.get(name), reference),
            PERTURBED: self._between(PERTURBED, reference, self.perturbed.get(name), reference),
            ULP: self._epsilon(name, reference) * np.abs(reference.astype(np.float64)),
        }
        if (pooled := self._pooled(name, reference)) is not None:
            found[POOLED] = pooled
        if self.reduction:
            size = np.abs(reference.astype(np.float64))
            found[SUMMATION] = self.reduction * (np.ones_like(size) if name in LOGARITHMS else size)
        for source in (COMPILED, *REPEATS.values()):
            moved = self.repeats.get(source, {}).get(name)
            if moved is not None and moved.shape == reference.shape:
                bound = largest(found) if source == REPEATS["subject"] else np.inf
                found[source] = np.minimum(moved, bound)
            elif source in self.absent:
                found[source] = self.absent[source]
        return found

    def floor(self, name: str, reference: Array) -> float:
        """The noise floor of one tensor."""
        return largest(self.sources(name, reference))

    def lacking(self, sources: Mapping[str, Any]) -> str:
        """Why the main source is absent; empty where it is there or none is expected."""
        value = sources.get(self.main, "it was not measured") if self.main else ""
        return value if isinstance(value, str) else ""

    def _between(self, source: str, a: Array | None, b: Array | None, like: Array) -> Array | str:
        if a is None or b is None:
            return self.absent.get(source, "it holds no tensor of this name")
        if not a.shape == b.shape == like.shape:
            return f"its tensor has shape {b.shape}, the reference's {like.shape}"
        moved = np.abs(a.astype(np.float64) - b.astype(np.float64))
        return moved if np.isfinite(moved).all() else "it is not finite everywhere"

    def _epsilon(self, name: str, array: Array) -> float:
        # Losses are float32 over models of half precision.
        declared = self.dtype if name not in LOGARITHMS else ""
        # Series hold single numbers of float32 as float64.
        return max(EPS.get(declared or array.dtype.name, 0.0), EPS["float32"])

    def _pooled(self, name: str, reference: Array) -> Array | None:
        if not _kind(name):
            return None
        relative, absolute = self._pools
        shares = [relative.get(_kind(name), 0.0) * float(np.max(np.abs(reference), initial=0.0))]
        shares.append(absolute.get(_block(name), 0.0))
        return np.full(reference.shape, max(shares)) if max(shares) else None

    @cached_property
    def _pools(self) -> tuple[dict[str, float], dict[str, float]]:
        """Errors of the adapter's tensors in float64, over tensors that round alike.

        One tensor's error is a single draw. Relative to their size: tensors of one kind in all
        layers. In half precision also absolute: tensors of one block, since there the two sides
        round in different places and what cancels in one tensor was rounded at another's size.
        """
        relative: dict[str, float] = {}
        absolute: dict[str, float] = {}
        for name, value in self.rounded.items():
            other = self.referee.get(name)
            if not _kind(name) or other is None or other.shape != value.shape:
                continue
            error, size = distance(value, other), float(np.max(np.abs(value), initial=0.0))
            if not (np.isfinite(error) and size):
                continue
            relative[_kind(name)] = max(relative.get(_kind(name), 0.0), error / size)
            if self.half:
                absolute[_block(name)] = max(absolute.get(_block(name), 0.0), error)
        return relative, absolute


@lru_cache(maxsize=4096)
def _kind(name: str) -> str:
    """`layers.N.self_attn.q_proj.lora_a` of an adapter's tensor, else nothing."""
    if not name.endswith((".lora_a", ".lora_b")):
        return ""
    return re.sub(r"\blayers\.\d+\.", "layers.N.", name)


def _block(name: str) -> str:
    """`layers.3.self_attn lora_a`: the tensors of one side of the adapter in one block."""
    module, _, side = name.rpartition(".")
    return f"{module.rpartition('.')[0]} {side}"


def largest(sources: Sources) -> float:
    """The greatest value of the sources that are there."""
    return greatest(listed(sources))


def greatest(sources: Mapping[str, float | str]) -> float:
    """The greatest value of what `listed` gives."""
    return max((value for value in sources.values() if not isinstance(value, str)), default=0.0)


def listed(sources: Sources) -> dict[str, float | str]:
    """The sources as a metric holds them: the greatest value of each, or why there is none."""
    return {
        name: value if isinstance(value, str) else float(np.max(value, initial=0.0))
        for name, value in sources.items()
    }


def distance(a: Array, b: Array) -> float:
    """Greatest absolute difference, in float64."""
    if a.size == 0:
        return 0.0
    with np.errstate(invalid="ignore"):  # infinities on both sides
        return float(np.max(np.abs(a.astype(np.float64) - b.astype(np.float64))))


def perturb(array: Array, rng: np.random.Generator, dtype: str = "float32") -> Array:
    """Every element moved by one ulp of `dtype`, up or down at random; integers and bools stay."""
    if not np.issubdtype(array.dtype, np.floating):
        return array
    values = array.astype(np.float64)
    # The exponent is read, not computed: a logarithm rounds otherwise in another library.
    binade = np.where(values == 0, 0.0, np.ldexp(1.0, np.frexp(values)[1] - 1))
    signs = np.where(rng.random(array.shape) < 0.5, -1.0, 1.0)
    return np.asarray(values + signs * binade * EPS[dtype], array.dtype)


def running_sum_error(logits: Array, dtype: str) -> float:
    """How far the logarithm of a softmax's normaliser may be off that is summed one by one.

    Args:
        logits: (..., V), of any float dtype; computed with as if rounded to `dtype`.
        dtype: What the sum's logarithm is kept in. The sum itself is kept in float32, as MLX on the
            CPU does: 5e-7 at 512 entries, 5e-5 at 49,152, where a tree of sums has 1e-6.

    Returns:
        The greatest distance from the same in float64, an ulp of what is kept included.
    """
    values = logits.astype(np.float64)
    top = values.max(axis=-1, keepdims=True)
    terms = np.exp(values - top)
    exact = np.log(terms.sum(axis=-1))
    summed = np.cumsum(terms.astype(np.float32), axis=-1, dtype=np.float32)[..., -1]
    size = float(np.max(np.abs(exact + top[..., 0]), initial=0.0))
    rounding = size * max(EPS[dtype], EPS["float32"]) / 2
    return distance(np.log(summed.astype(np.float64)), exact) + rounding
