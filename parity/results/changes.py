"""What is other than in an earlier run, cell by cell, and which package moved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from parity.cells.plan import GridRow
from parity.results.cells import EXPECTED, WORST_FIRST

if TYPE_CHECKING:
    import pandas as pd

    from parity.results.aggregate import Aggregate

FAILS, FIXED, STILL, GONE, ADDED, OTHER = KINDS = (
    "newly failing",
    "newly fixed",
    "still failing",
    "no longer run",
    "not run before",
    "otherwise green",
)
"""A cell fails where it keeps a run from being green. `otherwise green`: from one state that does not
to another, as from `identical` to `agree`."""
_UNCHANGED = len(KINDS)


@dataclass(frozen=True)
class Changes:
    """The cells of two runs side by side."""

    counts: dict[str, int]
    """Number of cells of each kind that occurs."""
    rows: pd.DataFrame
    """A line for each row of the grid with a change: the fields of `GridRow`, the number of cells of each
    kind, and `failing`, the number of new cells that fail."""
    cells: pd.DataFrame
    """A line for each cell that changed or still fails, in the order of `KINDS`, row and seed: the fields
    of `GridRow`, `seed`, `before` and `after` (states, empty without the cell) and `kind`."""
    versions: tuple[str, ...]
    """What ran in other versions: `mlx-lm of mlx: 0.32.1 before, 0.32.2 now`."""

    @property
    def sentence(self) -> str:
        """`2 newly failing, 1 newly fixed`, or that nothing changed."""
        found = ", ".join(f"{n:,} {kind}" for kind, n in self.counts.items())
        return found or "every cell is as before"


def changes(now: Aggregate, before: Aggregate) -> Changes:
    """What is other now; a cell is the same one where model, pair, probe and seed are."""
    import pandas as pd

    grid = sorted({*now.grid, *before.grid})
    number = {row: i for i, row in enumerate(grid)}

    def frame(of: Aggregate, name: str) -> pd.DataFrame:
        rows = np.array([number[row] for row in of.grid], np.int64)
        return pd.DataFrame({
            "row": rows[of.cells["row"].to_numpy()],
            "seed": of.cells["seed"].to_numpy(),
            name: of.cells["state"].cat.codes.to_numpy().astype(np.int64),
        })  # fmt: skip

    both = frame(before, "before").merge(frame(now, "after"), how="outer", on=["row", "seed"])
    old, new = (both[name].fillna(-1).to_numpy(np.int64) for name in ("before", "after"))
    limit = WORST_FIRST.index(EXPECTED)  # states before it keep a run from being green
    failed, fails = (old >= 0) & (old < limit), (new >= 0) & (new < limit)
    kind = np.select(
        [new < 0, old < 0, fails & ~failed, failed & ~fails, fails, new != old],
        [KINDS.index(name) for name in (GONE, ADDED, FAILS, FIXED, STILL, OTHER)],
        _UNCHANGED,
    )
    both = both.assign(kind=kind, before=old, after=new, failing=(old < 0) & fails)
    both = both[both["kind"] < _UNCHANGED].sort_values(["kind", "row", "seed"], kind="stable")
    fields = pd.DataFrame(grid, columns=[*GridRow._fields]).iloc[both["row"]].reset_index(drop=True)
    states = pd.Series([*WORST_FIRST, ""])  # the last for -1
    cells = fields.assign(
        seed=both["seed"].to_numpy(),
        before=states.to_numpy()[both["before"]],
        after=states.to_numpy()[both["after"]],
        kind=np.array(KINDS)[both["kind"]],
    )
    counts = np.bincount(both["kind"], minlength=len(KINDS))
    return Changes(
        {name: int(n) for name, n in zip(KINDS, counts, strict=True) if n},
        _rows(grid, both),
        cells,
        tuple(_versions(before.versions, now.versions)),
    )


def _rows(grid: list[GridRow], both: pd.DataFrame) -> pd.DataFrame:
    import pandas as pd

    which = np.unique(both["row"])
    frame = pd.DataFrame([grid[i] for i in which], columns=[*GridRow._fields])
    for index, name in enumerate(KINDS):
        frame[name] = np.bincount(both["row"][both["kind"] == index], minlength=len(grid))[which]
    frame["failing"] = np.bincount(both["row"][both["failing"]], minlength=len(grid))[which]
    return frame


def _versions(
    before: Mapping[str, Mapping[str, tuple[str, ...]]],
    now: Mapping[str, Mapping[str, tuple[str, ...]]],
) -> Iterator[str]:
    for path in sorted(before.keys() & now.keys()):
        for name in sorted(before[path].keys() | now[path].keys()):
            old, new = (" and ".join(of[path].get(name, ())) or "none" for of in (before, now))
            if old != new:
                yield f"{name} of {path}: {old} before, {new} now"
