"""Small SVG figures that go into the page: they take its font and its colours, light or dark."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from parity.cells.plan import GridRow
from parity.derived import kept
from parity.results.aggregate import Aggregate
from parity.results.series import Curve
from parity.trace import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Steps = list[Any]
"""Mappings, the lines of `Aggregate.steps`."""
SIZE = 4.3, 2.3  # inches
SEEDS = 60  # drawn, those farthest over their tolerance
# Matplotlib cannot write CSS variables: it draws in placeholder colours, replaced afterwards.
_INK, _SUBJECT, _REFERENCE, _BAD = "#010101", "#020202", "#030303", "#040404"
_VARIABLES = {
    _INK: "currentColor",
    _SUBJECT: "var(--subject)",
    _REFERENCE: "var(--reference)",
    _BAD: "var(--bad)",
}


class Figure(NamedTuple):
    """A figure and what it shows; no SVG where there is nothing to draw."""

    caption: str
    svg: str


def figures(result: Aggregate) -> dict[GridRow, list[Figure]]:
    """For each row with step series: the losses, then |dloss| and |dgrad| over the steps."""
    found: dict[GridRow, list[Figure]] = {}
    for row in dict.fromkeys(curve.row for curve in result.curves):
        steps: Steps = result.steps(row, SEEDS).to_dict("records")
        curves = {curve.quantity: curve for curve in result.curves if curve.row == row}
        found[row] = [_losses(steps, row)]
        found[row] += [
            _difference(steps, row, curves[quantity])
            for quantity in ("dloss", "dgrad")
            if quantity in curves
        ]
    return found


def _losses(steps: Steps, row: GridRow) -> Figure:
    seeds = _by_seed(steps)

    def draw(axes: Axes) -> None:
        for seed in seeds:
            step, ours, theirs = (
                _column(seed, name) for name in ("step", "loss_subject", "loss_reference")
            )
            axes.plot(step, theirs, color=_REFERENCE, lw=3.2, alpha=0.45)
            axes.plot(step, ours, color=_SUBJECT, lw=1)
        axes.set_ylim(bottom=0)

    n = len(seeds)
    each = f"one line a seed, {n} seeds" if n > 1 else "one seed"
    caption = f"Loss: subject ({row.subject}) thin on reference ({row.reference}) broad; {each}"
    return Figure(caption, _svg(draw, f"{row} loss", steps))


def _difference(steps: Steps, row: GridRow, curve: Curve) -> Figure:
    name = curve.quantity
    values = np.abs(_column(steps, name))
    if not (values > 0).any():
        why = "0 at every step of every seed" if not np.isnan(values).any() else "not measured"
        return Figure(f"{name}: {why}", "")

    def draw(axes: Axes) -> None:
        for seed in _by_seed(steps):
            d = np.abs(_column(seed, name))
            alone = "." if (d > 0).sum() < 2 else ""  # a single point makes no line
            shown = np.where(d > 0, d, np.nan)
            axes.plot(_column(seed, "step"), shown, color=_SUBJECT, lw=1, marker=alone)
        axes.set_yscale("log")
        axes.set_xlim(axes.get_xlim()[0], _column(steps, "step").max() + 0.5)
        if curve.first_step is not None:
            axes.axvline(curve.first_step, color=_BAD, lw=1, ls="--")

    over = f"; over the tolerance from step {curve.first_step}" if curve.first_step else ""
    return Figure(
        f"|{name}| a step, subject − reference, log scale{over}",
        _svg(draw, f"{row} {name}", (curve.first_step, steps)),
    )


def _by_seed(steps: Steps) -> list[Steps]:
    found: dict[int, Steps] = defaultdict(list)
    for step in steps:
        found[step["seed"]].append(step)
    return [found[seed] for seed in sorted(found)]


def _column(steps: Steps, name: str) -> Array:
    return np.array([step[name] for step in steps], np.float64)


def _svg(draw: Callable[[Axes], None], salt: str, content: object) -> str:
    """One figure, the same bytes for the same data; drawn once for the same `content`."""
    code = Path(__file__).read_bytes()
    parts = version("matplotlib"), hashlib.sha256(code).hexdigest(), salt, content
    return kept("figures", parts, lambda: _drawn(draw, salt))


def _drawn(draw: Callable[[Axes], None], salt: str) -> str:
    from io import StringIO

    import matplotlib
    from matplotlib.figure import Figure as Canvas
    from matplotlib.ticker import MaxNLocator

    style: dict[Any, Any] = {"svg.hashsalt": salt, "svg.fonttype": "none", "font.size": 9}
    style |= dict.fromkeys(
        ("xtick.color", "ytick.color", "axes.edgecolor", "axes.labelcolor"), _INK
    )
    text = StringIO()
    with matplotlib.rc_context(style):
        canvas = Canvas(figsize=SIZE, layout="constrained")
        axes = canvas.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("step")
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        canvas.savefig(text, format="svg", transparent=True, metadata=metadata)
    return _inline(text.getvalue())


def _inline(svg: str) -> str:
    """Only the element, scaling with the page, without ids that would occur twice in it."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg)  # figure_1, axes_1, matplotlib.axis_1
    svg = re.sub(r" font-family: [^;]*;", "", svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    return re.sub(r"\n\s*", "\n", svg).strip()
