"""Where a search inside a stage ends: one module, tensor or step, and what was seen on the way."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from parity.judge.noise import HEADROOM
from parity.record import Metric, Verdict


@dataclass(frozen=True)
class Mark:
    """What a walk saw at one module.

    Attributes:
        name: Canonical name of the module.
        value: Greatest |Δ| there.
        floor: What rounding explains.
        differs: Whether the difference is beyond the tolerance.
        off: Whether the module is off by itself, given what the reference has around it.
    """

    name: str
    value: float
    floor: float
    differs: bool
    off: bool = False


@dataclass
class Place:
    """The place in words, by name, and the walk that led there in its order."""

    sentence: str = ""
    name: str = ""
    kind: str = ""
    """`forward`, `backward`, `step` or `cache`."""
    walk: list[Mark] = field(default_factory=list)


def differs(metric: Metric | None) -> bool:
    """Whether a metric is there and diverges."""
    return metric is not None and metric.verdict is Verdict.DIVERGE


def stands_out(metric: Metric | None) -> bool:
    """Whether a metric diverges by more than rounding explains, also where bits decide."""
    return metric is not None and differs(metric) and not metric.value <= HEADROOM * metric.floor


def how_much(metric: Metric) -> str:
    """A difference against its floor, and the side that is off where the referee tells."""
    off = f", the {metric.off} is off" if metric.off in ("subject", "reference") else ""
    return f"greatest |Δ| {metric.value:.3g}, rounding explains {metric.floor:.2g}{off}"


def counted(names: Iterable[str], layers: int) -> str:
    """Modules by kind: `mlp.up_proj in 1 of 18 layers (7), norm`."""
    kinds: Counter[str] = Counter()
    where: dict[str, list[str]] = {}
    for name in names:
        match = re.match(r"layers\.(\d+)(?:\.(.+))?$", name)
        kind = (match[2] or "the layer itself") if match else name
        kinds[kind] += 1
        where.setdefault(kind, []).extend([match[1]] if match else [])
    words = []
    for kind, count in kinds.most_common(3):
        only = f" ({', '.join(sorted(where[kind], key=int))})" if count <= 3 else ""
        words.append(f"{kind} in {count} of {layers} layers{only}" if where[kind] else kind)
    return ", ".join(words) + (f" and {len(kinds) - 3} other kinds" if len(kinds) > 3 else "")
