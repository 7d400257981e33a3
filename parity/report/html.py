"""The report as one HTML file that loads nothing: failures first, a filter box, both themes."""

from __future__ import annotations

from collections.abc import Mapping
from math import isnan
from pathlib import Path
from typing import Any

from parity.capture.machine import PASSING
from parity.cells.plan import GridRow, row_of
from parity.record import Metric, Record
from parity.report import labels
from parity.report.figures import figures
from parity.report.text import headline
from parity.results.aggregate import Aggregate, FirstFailure, state
from parity.results.cells import GREEN

OPEN = 3  # failures shown unfolded
SHOWN = 300  # failures shown, and as many records that are none
SIDES = ("subject", "reference")
TEMPLATE = "report.html.j2"


def render(result: Aggregate) -> str:
    """The page."""
    environment = templates()
    environment.filters |= {"number": labels.number, "tolerance": tolerance, "excess": excess}
    environment.globals |= {"labels": labels, "headline": headline, "environment": environment_of}
    environment.globals |= {
        "differing": differing,
        "row_of": row_of,
        "state": state,
        "side_off": side_off,
        "side_off_of_pair": side_off_of_pair,
    }
    failures, rest = result.failures(SHOWN), result.green(SHOWN)
    shown = {(row_of(record), record.seed): record for record in (*failures, *rest)}
    page: str = environment.get_template(TEMPLATE).render(
        result=result,
        grids=_by_pair(result, shown),
        failures=failures,
        rest=rest,
        figures=figures(result),
        symbols=labels.SYMBOLS,
        green=GREEN,
        open=OPEN,
        about=_about(result),
    )
    return page


def templates() -> Any:
    """The environment of the templates in this folder: every value is escaped, an unknown name raises."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def tolerance(metric: Metric) -> str:
    """What was allowed: `equal` where bits must be, `not gated` where the verdict does not depend on it."""
    if not metric.gate or isnan(metric.tolerance):
        return "not gated"
    return labels.number(metric.tolerance) if metric.tolerance else "equal"


def excess(metric: Metric) -> str:
    """The value as a multiple of the tolerance, where it is exceeded."""
    if not metric.gate or not metric.tolerance > 0 or metric.value <= metric.tolerance:
        return ""
    return f"{metric.value / metric.tolerance:,.3g}×"


def side_off(record: Record) -> str:
    """Which side is off, by the first metric with a referee, and how far from float64 both are."""
    for metric in record.metrics:
        if metric.off and not metric.verdict.green:
            errors = zip(SIDES, (metric.error_subject, metric.error_reference), strict=True)
            far = (f"{side} {labels.number(e)}" for side, e in errors if e is not None)
            return f"{metric.off}, by {metric.name} (distance from float64: {', '.join(far)})"
    return ""


def side_off_of_pair(result: Aggregate, first: FirstFailure) -> str:
    """The same for a pair, by its first probe with a referee."""
    for row in (first.row, *first.later):
        cells = result.red()
        cells = cells[(cells["row"] == result.grid.index(row)) & (cells["position"] >= 0)]
        for record in result.records(cells["position"].head(5)):
            if side := side_off(record):
                return side if row == first.row else f"{side} in probe {row.title}"
    return ""


def environment_of(record: Record) -> list[tuple[str, str, str, bool]]:
    """Key, subject's value, reference's value, whether they differ: differing ones first."""
    sides = [_flat(side.environment) for side in (record.subject, record.reference)]
    keys = sorted({*sides[0], *sides[1]})
    rows = [(k, sides[0].get(k, "–"), sides[1].get(k, "–")) for k in keys]
    return sorted(((*row, row[1] != row[2]) for row in rows), key=lambda row: not row[3])


def differing(record: Record) -> list[tuple[str, Any, Any]]:
    """Factors in which the sides' recipes differ."""
    subject, reference = record.subject.recipe, record.reference.recipe
    values = {k: (subject.get(k), reference.get(k)) for k in sorted({*subject, *reference})}
    return [(name, a, b) for name, (a, b) in values.items() if a != b]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        elif f"{prefix}{key}" not in PASSING:
            flat[prefix + key] = (
                ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            )
    return flat


def _by_pair(
    result: Aggregate, shown: Mapping[tuple[GridRow, int], Record]
) -> dict[str, dict[GridRow, dict[int, tuple[str, Record | None]]]]:
    """Pair to its rows; seed to state and record, where that is shown."""
    found: dict[str, dict[GridRow, dict[int, tuple[str, Record | None]]]] = {}
    for row in result.grid:
        by_seed = result.states(row).items()
        cells = {seed: (state, shown.get((row, seed))) for seed, state in by_seed}
        found.setdefault(row.pair, {})[row] = cells
    return found


def _about(result: Aggregate) -> str:
    """Versions of the tool, platforms, and the number of records."""
    records = int((result.cells["position"] >= 0).sum())
    return " · ".join([*result.about, f"{records:,} records"])
