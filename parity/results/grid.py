"""The grid: one record for each cell, the cells that are missing, and how many are in each state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from parity.cells.plan import GridRow, Plan, PlannedRow
from parity.record import SEVERITY, Record
from parity.results.cells import EXPECTED, GREEN, MISSING, STALE, STATES, WORST_FIRST, Found
from parity.results.statistics import wilson
from parity.results.store import Store
from parity.trace import Array

if TYPE_CHECKING:
    import pandas as pd


def kept_of(store: Store, found: Found) -> tuple[Array, list[str]]:
    """Positions of one record for each cell, by row and seed, and what was said twice.

    Of several the worst counts; of two that diverge, the one that is not a known divergence.
    """
    honest = np.flatnonzero(~found.contradicts)
    order = np.lexsort((
        honest, found.expected[honest] > 0, -found.rank[honest],
        found.seed[honest], found.row[honest],
    ))  # fmt: skip
    honest = honest[order]
    row, seed = found.row[honest], found.seed[honest]
    first = np.ones(len(honest), bool)
    first[1:] = (row[1:] != row[:-1]) | (seed[1:] != seed[:-1])
    lines: dict[int, dict[int, list[int]]] = {}
    group = np.cumsum(first) - 1
    several = np.bincount(group, minlength=1)[group] > 1 if len(group) else first
    for r, s, p in zip(row[several], seed[several], honest[several], strict=True):
        lines.setdefault(int(r), {}).setdefault(int(s), []).append(int(p))
    return honest[first], [_doubled(store, found, *item) for item in sorted(lines.items())]


def _doubled(store: Store, found: Found, number: int, by_seed: Mapping[int, Sequence[int]]) -> str:
    """What is said of the cells of a row that have several records."""
    seeds, row = [*by_seed], found.rows[number]
    shown = ", ".join(map(str, seeds[:3])) + f" and {len(seeds) - 3} more" * (len(seeds) > 3)
    verdicts = sorted({str(SEVERITY[found.rank[p]]) for of in by_seed.values() for p in of})
    text = (
        f"{row.title}, {row.pair}, seed{'s' * (len(seeds) > 1)} {shown}: "
        f"{max(map(len, by_seed.values()))} records for one cell ({', '.join(verdicts)}), the worst counts"
    )
    one, *others = store.records(by_seed[seeds[0]])
    differ = {name for other in others for name in _factors(one, other)}
    of = f"; they are of different recipes ({', '.join(sorted(differ)[:3])})"
    return text + of * bool(differ)


def _factors(one: Record, other: Record) -> Iterable[str]:
    """Factors in which two records were run otherwise."""
    for a, b in ((one.subject, other.subject), (one.reference, other.reference)):
        for name in a.recipe.keys() | b.recipe.keys():
            if a.recipe.get(name) != b.recipe.get(name):
                yield name


def cells_of(
    found: Found, kept: Array, plan: Plan | None
) -> tuple[tuple[GridRow, ...], pd.DataFrame]:
    """The rows of the grid and the frame of its cells, the missing ones included."""
    import pandas as pd

    planned = _planned(plan, found.rows)
    grid = tuple(sorted({*planned, *found.rows}))
    number = {row: i for i, row in enumerate(grid)}
    row = np.array([number[r] for r in found.rows], np.int64)[found.row[kept]]
    seed = found.seed[kept]
    free = [i for i, r in enumerate(found.rows) if r not in planned]
    seeds_of_free = np.unique(found.seed[np.isin(found.row, free)])
    planned |= {found.rows[i]: seeds_of_free for i in free}
    bounds = np.searchsorted(row, np.arange(len(grid) + 1))
    gaps = {
        number[r]: np.setdiff1d(seeds, seed[bounds[number[r]] : bounds[number[r] + 1]])
        for r, seeds in planned.items()
    }
    absent = sum(map(len, gaps.values()))
    codes = np.append(found.state[kept], np.full(absent, WORST_FIRST.index(MISSING)))
    kinds = pd.CategoricalDtype([*WORST_FIRST], ordered=True)
    frame = pd.DataFrame({
        "row": np.concatenate([row, *(np.full(len(s), r) for r, s in gaps.items())]).astype(np.int64),
        "seed": np.concatenate([seed, *gaps.values()]).astype(np.int64),
        "state": pd.Categorical.from_codes(codes.tolist(), dtype=kinds),
        "excess": np.append(found.excess[kept], np.full(absent, np.nan)),
        "position": np.append(kept, np.full(absent, -1)).astype(np.int64),
    })  # fmt: skip
    return grid, frame.sort_values(["row", "seed"], kind="stable", ignore_index=True)


def _planned(plan: Plan | None, seen: Sequence[GridRow]) -> dict[GridRow, Array]:
    """The seeds of the rows of a plan; a probe has the stage name that records or this tool give it."""
    from parity.stages import ON_DEMAND, STAGES

    names = {stage.number: stage.name for stage in (*STAGES, *ON_DEMAND)}
    stages: dict[PlannedRow, list[str]] = {}
    for r in seen:
        stages.setdefault(PlannedRow(*r[:4]), []).append(r.stage)
    return {
        GridRow(*row, stage): np.array(sorted(seeds), np.int64)
        for row, seeds in (plan.rows.items() if plan else ())
        for stage in stages.get(row, [names.get(row.probe, "unknown")])
    }


def rows_of(grid: Sequence[GridRow], cells: pd.DataFrame) -> pd.DataFrame:
    """A line for each row: see `Aggregate.rows`."""
    import pandas as pd

    n = len(WORST_FIRST)
    codes = cells["state"].cat.codes.to_numpy().astype(np.int64)
    at = cells["row"].to_numpy() * n + codes
    counts = np.bincount(at, minlength=len(grid) * n).reshape(len(grid), n)
    frame = pd.DataFrame([*grid], columns=[*GridRow._fields])
    frame["seeds"] = counts.sum(axis=1)
    for name in STATES:
        frame[name] = counts[:, WORST_FIRST.index(name)]
    green = frame[[*GREEN, STALE]].sum(axis=1).astype(np.int64)
    frame["decided"] = green + frame["diverge"] + frame[EXPECTED]
    intervals = [
        wilson(int(g), int(d)) if d else None for g, d in zip(green, frame["decided"], strict=True)
    ]
    frame["pass_rate"] = green / frame["decided"].where(frame["decided"] > 0)
    for end in ("low", "high"):
        frame[end] = [float(getattr(ci, end)) if ci else np.nan for ci in intervals]
    worst = [WORST_FIRST[int(np.argmax(row > 0))] if row.any() else MISSING for row in counts]
    frame["state"] = pd.Categorical(worst, categories=[*WORST_FIRST], ordered=True)
    return frame
