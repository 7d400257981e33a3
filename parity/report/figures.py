"""Small SVG figures, drawn here: they take the page's font and colours, light or dark, and weigh little.

Each has a sentence of what it shows; the numbers stand in a table beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, floor, inf, isfinite, log10, nan
from typing import NamedTuple

from markupsafe import escape

from parity.record import MODULE, Metric, Record

STEPS = 120
"""Columns of a heat map and points of a curve; of longer ones each stands for several steps."""
SIDE = 9  # of a cell of a heat map
LEFT = 44  # room for the names of seeds
ZONES = (
    ("zero", "equal bits"),
    ("low", "below a tenth of the noise floor"),
    ("floor", "up to the noise floor"),
    ("allowed", "up to what is allowed"),
    ("over1", "up to 10 times what is allowed"),
    ("over2", "up to 100 times"),
    ("over3", "beyond"),
    ("bare", "differs; no noise floor was measured"),
    ("none", "not a number, or no value"),
)
"""Class of a cell of a heat map and its meaning, from best to worst."""
BITS = (("zero", "equal bits"), ("over2", "bits differ"), ("none", "not a number, or no value"))
"""The same where bits are compared."""
_METRICS = {"dloss": "loss per step", "dgrad": "gradient_norm per step"}


class SeedLine(NamedTuple):
    """The numbers of one seed in a heat map."""

    seed: int
    name: str
    """Of its record."""
    largest: float
    at: int | None
    """Step of the largest, counted from 1."""
    floor: float
    allowed: float
    """At that step; NaN where the record lacks floors a step."""
    first: int | None
    """First step that decides for a divergence."""


class HeatMap(NamedTuple):
    """Differences by seed and step."""

    caption: str
    svg: str
    zones: tuple[tuple[str, str], ...]
    """Those that occur."""
    lines: tuple[SeedLine, ...]


def heat_map(records: Sequence[Record], quantity: str) -> HeatMap | None:
    """|dloss| or |dgrad| by seed and step, coloured by how far it is from the noise floor of its step.

    Args:
        records: Of one row of the grid; those without the series are left out.
        quantity: `dloss` or `dgrad`.
    """
    having = [r for r in records if r.series.get(quantity)]
    if not having:
        return None
    metrics = {r.seed: _metric(r, quantity) for r in having}
    bits = all(m is not None and m.tolerance == 0 for m in metrics.values())
    width = max(len(r.series[quantity]) for r in having)
    group = ceil(width / STEPS)
    found: list[list[str]] = []
    lines = []
    for record in having:
        metric = metrics[record.seed]
        values = [abs(v) for v in record.series[quantity]]
        floors = record.series.get(f"{quantity} floor", [])
        # Of records without floors a step, the floor at the place that the verdict names.
        flat = metric.floor if metric else nan
        floors = floors if len(floors) == len(values) else [flat] * len(values)
        times = metric.tolerance / metric.floor if metric and metric.floor > 0 else 1.0
        zones = [
            _bits(v) if bits else _zone(v, f, times) for v, f in zip(values, floors, strict=True)
        ]
        zones += ["none"] * (width - len(zones))
        found.append([_worst(zones[i : i + group]) for i in range(0, width, group)])
        at = max(range(len(values)), key=lambda i: (values[i] != values[i], values[i]))
        lines.append(SeedLine(
            record.seed, record.name, values[at], at + 1, 0.0 if bits else floors[at],
            0.0 if bits else floors[at] * times, metric.step if metric else None,
        ))  # fmt: skip
    named = BITS if bits else ZONES
    used = {zone for row in found for zone in row}
    caption = f"|{quantity}|, subject − reference, {len(having)} seed{'s' * (len(having) > 1)} "
    caption += f"by {width} steps" + (f", the worst of {group} in each cell" if group > 1 else "")
    caption += "" if bits else _floors(having, quantity)
    title = f"Heat map of {caption}"
    return HeatMap(
        caption,
        _cells(found, [line.seed for line in lines], title, group),
        tuple(zone for zone in named if zone[0] in used),
        tuple(lines),
    )


def _floors(records: Sequence[Record], quantity: str) -> str:
    """The noise floor in numbers, with what multiple of it is allowed."""
    found = [v for r in records for v in r.series.get(f"{quantity} floor", []) if isfinite(v)]
    metrics = [m for r in records if (m := _metric(r, quantity)) and m.floor > 0]
    found = found or [m.floor for m in metrics]
    if not found:
        return ""
    times = (
        f", {metrics[0].tolerance / metrics[0].floor:.3g} times that is allowed" if metrics else ""
    )
    low, high = f"{min(found):.2g}", f"{max(found):.2g}"
    return f"; noise floor {low if low == high else f'{low} to {high}'}{times}"


def _metric(record: Record, quantity: str) -> Metric | None:
    return next((m for m in record.metrics if m.name == _METRICS[quantity]), None)


def _bits(value: float) -> str:
    return "none" if not isfinite(value) else "over2" if value else "zero"


def _zone(value: float, floor: float, times: float) -> str:
    if not isfinite(value):
        return "none"
    if value and not isfinite(floor):
        return "bare"
    edges = (0, floor / 10, floor, floor * times, 10 * floor * times, 100 * floor * times, inf)
    return next(zone for edge, (zone, _) in zip(edges, ZONES, strict=False) if not value > edge)


def _worst(zones: Sequence[str]) -> str:
    order = [zone for zone, _ in ZONES]
    return max(zones, key=order.index)


def _cells(rows: Sequence[Sequence[str]], seeds: Sequence[int], title: str, group: int) -> str:
    """One path for each zone: neighbours in a row are drawn as one rectangle."""
    paths: dict[str, list[str]] = {}
    for y, row in enumerate(rows):
        start = 0
        for x in range(1, len(row) + 1):
            if x == len(row) or row[x] != row[start]:
                w = (x - start) * SIDE
                place = f"M{LEFT + start * SIDE} {y * SIDE}h{w}v{SIDE}h-{w}z"
                paths.setdefault(row[start], []).append(place)
                start = x
    across, height = LEFT + len(rows[0]) * SIDE, len(rows) * SIDE
    body = [f'<path class="z-{zone}" d="{"".join(d)}"/>' for zone, d in paths.items()]
    # Lines between the cells.
    lines = "".join(f"M{LEFT} {y * SIDE}H{across}" for y in range(1, len(rows)))
    lines += "".join(f"M{LEFT + x * SIDE} 0V{height}" for x in range(1, len(rows[0])))
    body.append(f'<path class="gap" d="{lines}"/>' if lines else "")
    body += [
        f'<text class="end" x="{LEFT - 4}" y="{y * SIDE + SIDE - 2}">{seed}</text>'
        for y, seed in enumerate(seeds)
    ]
    ticks = step_marks(len(rows[0]) * group)
    body += [
        f'<text class="mid" x="{LEFT + (step - 0.5) / group * SIDE:.0f}" y="{height + 9}">{step}</text>'
        for step in ticks
    ]
    return drawn(across + 4, height + 12, title, body)


class Profile(NamedTuple):
    """How far each module's output is from what was allowed, in the order of calls."""

    caption: str
    svg: str
    first: str
    """The first module over what was allowed; empty without one."""
    near: tuple[tuple[str, float, float], ...]
    """It and its neighbours: name, greatest |Δ|, allowed."""


def profile(record: Record) -> Profile | None:
    """The modules of a record of the logits that diverge; None where it has none."""
    found: list[tuple[str, float, float]] = [
        (name.removeprefix(MODULE), values[0], values[1])
        for name, values in record.series.items()
        if name.startswith(MODULE) and len(values) == 2
    ]
    # Where bits had to be equal there is no multiple of what is allowed: the differences themselves.
    bits = not any(allowed for _, _, allowed in found)
    ratios = [
        value if bits else value / allowed if allowed > 0 else (inf if value else 0.0)
        for _, value, allowed in found
    ]
    shown = [r for r in ratios if isfinite(r) and r > 0]
    if not shown:
        return None
    most = 0.0 if bits else 1.0
    low, high = floor(log10(min(shown))) - bits, ceil(log10(max(shown)) + 1e-9)
    low, high = (low, max(high, low + 1)) if bits else (min(low, -1), max(high, 1))
    first = next((i for i, r in enumerate(ratios) if not r <= most), None)
    w, h, left = 420, 120, 34
    step = (w - left - 4) / len(found)

    def y(ratio: float) -> float:
        place = min(max(log10(ratio), low), high) if ratio > 0 else low
        return 8 + (h - 22) * (high - place) / (high - low)

    bars: dict[str, list[str]] = {"z-floor": [], "z-over2": []}
    for i, ratio in enumerate(ratios):
        top = y(ratio if isfinite(ratio) else 10.0**high)
        place = f"M{left + i * step:.1f} {h - 14}V{top:.1f}h{max(step - 0.3, 0.4):.1f}V{h - 14}z"
        bars["z-floor" if ratio <= most else "z-over2"].append(place)
    body = [f'<path class="{zone}" d="{"".join(d)}"/>' for zone, d in bars.items() if d]
    if not bits:
        body.append(f'<path class="limit" d="M{left} {y(1.0):.1f}H{w - 4}"/>')
    for power in [low, high] if bits else sorted({low, 0, high}):
        body.append(
            f'<text class="end" x="{left - 4}" y="{y(10.0**power) + 3:.1f}">1e{power}</text>'
        )
    body.append(f'<text x="{left}" y="{h - 3}">first call</text>')
    body.append(f'<text class="end" x="{w - 4}" y="{h - 3}">last</text>')
    over = f"{sum(not r <= most for r in ratios)} of {len(found)} modules"
    caption = "Greatest |Δ| of each module's output in the order of calls, " + (
        f"where bits had to be equal: {over} differ"
        if bits
        else f"as a multiple of what is allowed (the dashed line): {over} are over it"
    )
    span = slice(max((first or 0) - 2, 0), (first or 0) + 3)
    return Profile(
        caption,
        drawn(w, h, caption, body),
        found[first][0] if first is not None else "",
        tuple(found[span]),
    )


def along(step: int, count: int, left: float, right: float) -> float:
    """Place of a step, counted from 1, between two edges."""
    return left + (right - left) * (step - 1) / max(count - 1, 1)


def step_marks(count: int) -> list[int]:
    """At most seven steps for an axis from 1 to `count`."""
    each = next(s * 10**p for p in range(9) for s in (1, 2, 5) if count / (s * 10**p) <= 6)
    return sorted({1, *range(each, count + 1, each)} - ({each} if 1 < each < 3 else set()))


def drawn(width: float, height: float, title: str, body: Sequence[str]) -> str:
    """A picture with its title for those who do not see it; it scales with the page."""
    head = f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(title)}"'
    return f'{head} style="max-width:{1.6 * width:.0f}px">{"".join(body)}</svg>'
