"""Curves over the steps of training: losses, and differences with the noise floor drawn in."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, floor, isfinite, log10

from parity.record import Record
from parity.report.figures import STEPS, along, drawn, step_marks

WIDTH, HEIGHT, LEFT, TOP, LOW = 420, 150, 34, 8, 134


def losses(records: Sequence[Record]) -> str:
    """Losses of both sides over the steps, a line a seed; empty without any."""
    having = [r for r in records if r.series.get("loss subject")]
    values = [
        v for r in having for side in ("subject", "reference")
        for v in r.series.get(f"loss {side}", []) if isfinite(v)
    ]  # fmt: skip
    if not values:
        return ""
    count = max(len(r.series["loss subject"]) for r in having)
    top = max(*values, 1e-9)
    w, h, left, low = WIDTH, HEIGHT, LEFT, LOW
    body = []
    for value in _marks(top):
        y = low - (low - 8) * value / top
        body.append(f'<path class="rule" d="M{left} {y:.1f}H{w - 4}"/>')
        body.append(f'<text class="end" x="{left - 4}" y="{y + 3:.1f}">{value:g}</text>')
    for step in step_marks(count):
        x = along(step, count, left, w - 8)
        body.append(f'<text class="mid" x="{x:.0f}" y="{h - 4}">{step}</text>')
    for side in ("reference", "subject"):
        for record in having:
            points = record.series.get(f"loss {side}", [])
            every = ceil(len(points) / STEPS)
            line = [
                f"{along(i + 1, count, left, w - 8):.1f} {low - (low - 8) * v / top:.1f}"
                for i, v in list(enumerate(points))[::every] if isfinite(v)
            ]  # fmt: skip
            if line:
                body.append(f'<path class="line {side}" d="M{"L".join(line)}"/>')
    title = f"Losses of subject and reference over {count} steps, {len(having)} seeds"
    return drawn(w, h, title, body)


def differences(records: Sequence[Record], quantity: str) -> str:
    """|dloss| or |dgrad| over the steps on a log scale, a line a seed; empty where all is 0.

    The band is the noise floor, from the lowest to the highest of the seeds, the dashed line the
    highest that is allowed.
    """
    having = [r for r in records if r.series.get(quantity)]
    series = [[abs(v) for v in r.series[quantity]] for r in having]
    floors = [
        f for r, s in zip(having, series, strict=True)
        if len(f := r.series.get(f"{quantity} floor", [])) == len(s)
    ]  # fmt: skip
    times = [
        m.tolerance / m.floor for r in having for m in r.metrics
        if m.name.startswith({"dloss": "loss", "dgrad": "gradient_norm"}[quantity])
        and m.floor > 0 and isfinite(m.tolerance)
    ]  # fmt: skip
    shown = [v for s in (*series, *floors) for v in s if isfinite(v) and v > 0]
    if not any(v > 0 for s in series for v in s):
        return ""
    allowed = max(times, default=1.0)
    low, high = floor(log10(min(shown))), ceil(log10(max(shown) * 1.0001))
    if floors:
        high = max(high, ceil(log10(max(map(max, floors)) * allowed or 1e-300)))
    count = max(map(len, series))

    def at(step: int, value: float) -> str:
        place = min(max(log10(value), low), high) if value > 0 else low
        y = LOW - (LOW - TOP) * (place - low) / max(high - low, 1)
        return f"{along(step, count, LEFT, WIDTH - 8):.1f} {y:.1f}"

    body = []
    for power in range(low, high + 1, max(1, ceil((high - low) / 5))):
        y = LOW - (LOW - TOP) * (power - low) / max(high - low, 1)
        body.append(f'<path class="rule" d="M{LEFT} {y:.1f}H{WIDTH - 4}"/>')
        body.append(f'<text class="end" x="{LEFT - 4}" y="{y + 3:.1f}">1e{power}</text>')
    for step in step_marks(count):
        x = along(step, count, LEFT, WIDTH - 8)
        body.append(f'<text class="mid" x="{x:.0f}" y="{HEIGHT - 4}">{step}</text>')
    every = ceil(count / STEPS)
    if floors:
        steps = [i for i in range(0, count, every) if any(i < len(f) for f in floors)]
        lows = [at(i + 1, min(f[i] for f in floors if i < len(f))) for i in steps]
        tops = [at(i + 1, max(f[i] for f in floors if i < len(f))) for i in steps]
        most = [at(i + 1, allowed * max(f[i] for f in floors if i < len(f))) for i in steps]
        body.append(f'<path class="band" d="M{"L".join([*tops, *lows[::-1]])}z"/>')
        body.append(f'<path class="limit" d="M{"L".join(most)}"/>')
    for values in series:
        # Of several steps the greatest, so that no peak is lost.
        points = [
            at(i + 1, max(part))
            for i in range(0, len(values), every)
            if (part := [v for v in values[i : i + every] if isfinite(v)])
        ]
        if points:
            body.append(f'<path class="line subject" d="M{"L".join(points)}"/>')
    title = f"|{quantity}| over {count} steps on a log scale, {len(having)} seeds"
    return drawn(WIDTH, HEIGHT, title, body)


def _marks(top: float) -> list[float]:
    each = next(
        float(f"{s}e{p}") for p in range(floor(log10(top)) - 1, floor(log10(top)) + 2)
        for s in (1, 2, 5) if top / float(f"{s}e{p}") <= 5
    )  # fmt: skip
    return [each * i for i in range(int(top / each) + 1)]
