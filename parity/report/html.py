"""The report as one HTML file that loads nothing: verdict, changes, causes, matrix, pairs, cells."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import isnan
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from parity.cells.plan import GridRow, row_of
from parity.record import Metric, Record, Verdict
from parity.report import curves, figures, labels, view
from parity.report.text import headline
from parity.results.aggregate import Aggregate, FirstFailure, state
from parity.results.cells import GREEN
from parity.results.details import PassRates
from parity.results.series import Curve
from parity.results.statistics import Interval, wilson

OPEN = 1  # failures shown unfolded
METRICS = 60  # of a record
DETAIL = 6_000  # characters of the output of a process that failed
SIDES = ("subject", "reference")
TEMPLATE, CELL = "report.html.j2", "cell.html.j2"


class Section(NamedTuple):
    """What is drawn of one pair."""

    pair: view.Pair
    heats: tuple[tuple[figures.HeatMap, str], ...]
    """Each with its curves; empty where all is 0."""
    losses: str
    curves: tuple[Curve, ...]
    passes: tuple[PassRates, ...]
    profiles: tuple[tuple[Record, figures.Profile], ...]
    settings: tuple[view.Setting, ...]
    others: tuple[str, ...]
    """Sentences on settings that name no two values."""
    environment: tuple[tuple[str, str, str, bool], ...]
    seen: int
    """Records that the environments are read from."""
    left_out: str
    """What of the pair is not drawn; empty where all is."""


def render(result: Aggregate) -> str:
    """The page."""
    environment = templates()
    environment.filters |= {
        "number": labels.number, "tolerance": tolerance, "excess": excess, "percent": percent,
    }  # fmt: skip
    environment.globals |= {
        "labels": labels, "headline": headline, "row_of": row_of, "state": state, "view": view,
        "differing": view.differing, "interval": interval, "side_off": side_off,
        "side_off_of_pair": side_off_of_pair, "symbols": labels.SYMBOLS, "green": GREEN,
        "most_metrics": METRICS, "most_detail": DETAIL, "intact": intact, "observed": observed,
    }  # fmt: skip
    shown, cells = _cells(result, environment.get_template(CELL))
    names = {(row_of(record), record.seed): record.name for record in shown}
    listed = view.pairs(result, names)
    samples = view.samples(result, listed)
    sections = [_section(result, pair, samples) for pair in listed[: view.PAIRS]]
    page: str = environment.get_template(TEMPLATE).render(
        result=result,
        listed=listed,
        matrix=view.matrix(listed),
        sections=sections,
        anchors={pair.anchor for pair in listed[: view.PAIRS]},
        samples=samples,
        cells=cells,
        on_page={*names.values()},
        shown=len(shown),
        total=_records(result),
        about=_about(result),
    )
    return page


def templates() -> Any:
    """The environment of the templates in this folder: every value is escaped, an unknown name raises."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    from parity.report.compiled import Compiled

    return Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        bytecode_cache=Compiled(),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _cells(result: Aggregate, template: Any) -> tuple[list[Record], list[Markup]]:
    """Records in full and their sections, failures first, as many as fit."""
    shown: list[Record] = []
    drawn: list[Markup] = []
    room = view.BYTES
    for record in _worst_first(result):
        unfolded = len(shown) < OPEN and record.verdict not in GREEN
        text = Markup(template.render(record=record, unfolded=unfolded))
        room -= len(text.encode())
        if room < 0 or len(shown) >= view.RECORDS:
            break
        shown.append(record)
        drawn.append(text)
    return shown, drawn


def _worst_first(result: Aggregate) -> Iterator[Record]:
    failures = result.failures(view.RECORDS)
    yield from failures
    yield from result.green(view.RECORDS - len(failures))


def _section(
    result: Aggregate, pair: view.Pair, samples: Mapping[GridRow, Sequence[Record]]
) -> Section:
    heats: list[tuple[figures.HeatMap, str]] = []
    losses, profiles = "", []
    settings: list[view.Setting] = []
    others: list[str] = []
    seen: list[Record] = []
    left_out = []
    for row in pair.rows:
        records = samples[row.row]
        seen += records
        if maps := [
            (m, curves.differences(records, q))
            for q in ("dloss", "dgrad")
            if (m := figures.heat_map(records, q))
        ]:
            heats += maps
            losses = curves.losses(records)
            if row.total > len(records):
                left_out.append(
                    f"curves of {len(records)} of {row.total} seeds are drawn, the worst"
                )
        diverging = [r for r in records if r.verdict is Verdict.DIVERGE]
        profiles += [(r, p) for r in diverging if (p := figures.profile(r))][:1]
        if row.row.stage == "config" and records:
            settings, others = view.settings(records[0])
    cut = [row for row in pair.rows if row.total > len(row.cells)]
    if cut:
        which = "each probe" if len(cut) == len(pair.rows) else ", ".join(r.row.title for r in cut)
        most = max(row.total for row in cut)
        left_out.append(f"{view.SEEDS} of {most} seeds of {which} are listed, the worst")
    rows = {row.row for row in pair.rows}
    return Section(
        pair,
        tuple(heats),
        losses,
        tuple(c for c in result.curves if c.row in rows),
        tuple(p for p in result.passes if p.row in rows),
        tuple(profiles),
        tuple(settings),
        tuple(others),
        tuple(view.environments(seen)),
        len(seen),
        "; ".join(left_out),
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


def observed(first: FirstFailure) -> list[str]:
    """What its record observed: the first bad module, which side repeats itself, and the like."""
    findings = first.record.findings if first.record else []
    return [text for text in findings if not text.startswith("as shipped")][:3]


def percent(share: float) -> str:
    """A share of 1 as a length in CSS."""
    return f"{100 * share:.1f}%"


def interval(passed: int, n: int) -> Interval | None:
    """Wilson's interval of a pass rate; None without any seed."""
    return wilson(passed, n) if n else None


def intact(text: str) -> str:
    """The end of a long text, which says why a process failed."""
    return text if len(text) <= DETAIL else f"…\n{text[-DETAIL:]}"


def side_off(record: Record) -> str:
    """Which side is off, by the first metric with a referee, and how far from float64 both are."""
    for metric in record.metrics:
        if metric.off and not metric.verdict.green:
            errors = zip(SIDES, (metric.error_subject, metric.error_reference), strict=True)
            far = (f"{side} {labels.number(e)}" for side, e in errors if e is not None)
            return f"{metric.off}, by {metric.name} (distance from float64: {', '.join(far)})"
    return ""


def side_off_of_pair(samples: Mapping[GridRow, Sequence[Record]], first: FirstFailure) -> str:
    """The same for a pair, by its first probe with a referee."""
    for row in (first.row, *first.later):
        for record in samples.get(row, ()):
            if side := side_off(record):
                return side if row == first.row else f"{side} in probe {row.title}"
    return ""


def _about(result: Aggregate) -> str:
    """Versions of the tool, platforms, and the number of records."""
    return " · ".join([*result.about, f"{_records(result):,} records"])


def _records(result: Aggregate) -> int:
    return int((result.cells["position"] >= 0).sum())
