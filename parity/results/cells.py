"""Cells from the columns of a store: the verdict of each record, computed again from its metrics."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from parity.cells.plan import GridRow
from parity.files import loads
from parity.record import SEVERITY, Verdict
from parity.results.expected import KnownDivergence, Where, explained, matching
from parity.results.store import KEY, Store
from parity.trace import Array

MISSING, EXPECTED, STALE = "missing", "expected", "stale"
STATES = (*(str(verdict) for verdict in Verdict), EXPECTED, STALE, MISSING)
"""What a cell of the grid can hold: a verdict, `missing` where there is no record, `expected` for a
known divergence and `stale` for a cell that came out green where one was known."""
GREEN = ("identical", "agree")
NOT_RED = (*GREEN, EXPECTED, "skip")
WORST_FIRST = (
    "error", MISSING, "diverge", STALE, "inconclusive", EXPECTED, "skip", "agree", "identical",
)  # fmt: skip

_RANK = {str(verdict): rank for rank, verdict in enumerate(SEVERITY)}
_AGREE, _DIVERGE = _RANK["agree"], _RANK["diverge"]
_STATE_OF_RANK = np.array([WORST_FIRST.index(str(verdict)) for verdict in SEVERITY])


class Found(NamedTuple):
    """What the records of a store are: arrays with one entry a record, in the order of the store."""

    rows: tuple[GridRow, ...]
    row: Array
    """Index into `rows`."""
    seed: Array
    rank: Array
    """Of the verdict in `SEVERITY`."""
    state: Array
    """Index into `WORST_FIRST`."""
    excess: Array
    """Greatest value over tolerance of a metric that decides and was not accepted; infinite where bits
    had to be equal and are not."""
    expected: Array
    """Index into `texts`."""
    texts: tuple[str, ...]
    """Why a divergence is known; the first is empty."""
    contradicts: Array
    """Whether the verdict does not follow from the metrics."""
    ran: tuple[Where, ...]
    used: tuple[KnownDivergence, ...]


class Codes(dict[Any, int]):
    """Numbers for values, given as they are met."""

    def __missing__(self, value: Any) -> int:
        self[value] = len(self)
        return self[value]

    def of(self, column: Any) -> Array:
        """The number of each entry of an Arrow array of strings."""
        if not pa.types.is_dictionary(column.type):
            column = column.dictionary_encode()
        numbers = np.array([self[value] for value in column.dictionary.to_pylist()], np.int64)
        at: Array = column.indices.to_numpy(zero_copy_only=False)
        return numbers[at] if len(at) else at.astype(np.int64)


def lists(column: Any) -> tuple[Array, list[Any]]:
    """Length of each entry of an Arrow array of lists, and the columns of all their elements."""
    lengths = column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    flat = column.flatten()
    fields = flat.flatten() if pa.types.is_struct(flat.type) else [flat]
    return lengths.astype(np.int64), fields


class _Metrics(NamedTuple):
    """All metrics of a batch, and the record that each is of."""

    of: Array
    name: Array
    rank: Array
    value: Array
    tolerance: Array
    floor: Array
    accepted: Array
    gate: Array


class _Seen(NamedTuple):
    name: str
    verdict: Verdict
    value: float
    floor: float
    gate: bool


def judged(verdict: Array, metrics: _Metrics) -> tuple[Array, Array]:
    """Whether each record contradicts its metrics as `Record.contradiction` has it, and its excess."""
    n, of, value, tolerance = len(verdict), metrics.of, metrics.value, metrics.tolerance
    gate, rank = metrics.gate, metrics.rank
    possible = (value >= 0) & (value < np.inf) & (tolerance >= 0) & (tolerance < np.inf)
    differs, over = (rank == 0) & (value != 0), (value > tolerance) & ~metrics.accepted
    wrong = gate & (rank <= _AGREE) & (~possible | differs | over)
    worst = np.full(n, -1)
    np.maximum.at(worst, of[gate], rank[gate])
    none, green = worst < 0, verdict <= _AGREE
    contradicts = np.bincount(of[wrong], minlength=n).astype(bool)
    contradicts |= np.where(none, green, (green | (verdict == _DIVERGE)) & (verdict != worst))
    with np.errstate(divide="ignore", invalid="ignore"):
        times = np.where(value == 0, 0.0, value / tolerance)
    counts = gate & ~metrics.accepted
    excess = np.zeros(n)
    np.maximum.at(excess, of[counts], np.nan_to_num(times[counts], nan=np.inf, posinf=np.inf))
    return contradicts, excess


def read(store: Store, known: Sequence[KnownDivergence]) -> Found:
    """Reads what decides of every record of a store."""
    reader = _Reader(known)
    columns = (*KEY, "seed", "verdict", "versions", "metrics")
    parts = [reader.batch(batch) for _, batch in store.batches(columns)]
    arrays = [np.concatenate(of) for of in zip(*parts, strict=True)]
    if not arrays:
        empty = [np.empty(0, np.int64) for _ in range(7)]
        arrays = [*empty[:4], np.empty(0), empty[4], np.empty(0, bool)]
    row, seed, rank, state, excess, expected, contradicts = arrays
    rows = [GridRow(*key) for key in reader.rows]
    order = sorted(range(len(rows)), key=rows.__getitem__)
    back = np.empty(len(rows), np.int64)
    back[order] = np.arange(len(rows))
    return Found(
        tuple(rows[i] for i in order), back[row] if len(row) else row, seed, rank, state, excess,
        expected, tuple(reader.texts), contradicts, tuple(reader.ran), tuple(reader.used),
    )  # fmt: skip


class _Reader:
    def __init__(self, known: Sequence[KnownDivergence]) -> None:
        self.known = known
        self.codes = [Codes() for _ in (*KEY, "versions", "metric")]
        self.rows, self.places, self.texts = Codes(), Codes(), Codes()
        self.ran: list[Where] = []
        self.applying: list[list[KnownDivergence]] = []
        self.used: list[KnownDivergence] = []
        self.verdicts = Codes({str(v): i for i, v in enumerate(SEVERITY)})
        self.texts[""]

    def batch(self, batch: Any) -> tuple[Array, ...]:
        """Row, seed, rank, state, excess, expected and contradiction of the records of a batch."""
        place = self._places(batch)
        rank = self.verdicts.of(batch.column("verdict"))
        seed = batch.column("seed").to_numpy(zero_copy_only=False)
        metrics = self._metrics(batch.column("metrics"))
        contradicts, excess = judged(rank, metrics)
        expected = self._expected(place, rank, seed, metrics)
        state = _STATE_OF_RANK[rank]
        marked = expected > 0
        state[marked & (rank <= _AGREE)] = WORST_FIRST.index(STALE)
        state[marked & (rank > _AGREE)] = WORST_FIRST.index(EXPECTED)
        rows = np.array([self.rows[key[:5]] for key in self.places], np.int64)
        return (
            rows[place] if len(place) else place,
            seed,
            rank,
            state,
            excess,
            expected,
            contradicts,
        )

    def _places(self, batch: Any) -> Array:
        """The number of each record's row of the grid and versions."""
        names = (*KEY[:3], "stage", "versions")
        parts = [c.of(batch.column(n)) for c, n in zip(self.codes, names, strict=False)]
        probes = batch.column("probe").to_numpy(zero_copy_only=False)
        at = {str(n): k for n, k in zip(names, self.codes, strict=False)}
        combined = np.zeros(len(probes), np.int64)
        for part, code in zip(parts, self.codes, strict=False):
            combined = combined * max(len(code), 1) + part
        numbers, probe = np.unique(probes, return_inverse=True)
        _, first, inverse = np.unique(
            combined * max(len(numbers), 1) + probe, return_index=True, return_inverse=True
        )
        texts = {name: [*at[name]] for name in names}
        found = []
        for i in first:
            model, subject, reference, stage, versions = (
                texts[name][part[i]] for name, part in zip(names, parts, strict=True)
            )
            key = (model, subject, reference, int(probes[i]), stage, versions)
            if key not in self.places:
                sides = loads(versions)
                versions_of = (sides["subject"], sides["reference"])
                self.ran.append(Where(subject, reference, model, key[3], *versions_of))
                self.applying.append([k for k in self.known if k.applies(self.ran[-1])])
            found.append(self.places[key])
        return np.array(found, np.int64)[inverse] if found else np.empty(0, np.int64)

    def _metrics(self, column: Any) -> _Metrics:
        lengths, (name, verdict, value, tolerance, floor, accepted, gate, _) = lists(column)
        numbers = [c.to_numpy(zero_copy_only=False) for c in (value, tolerance, floor)]
        flags = [c.to_numpy(zero_copy_only=False).astype(bool) for c in (accepted, gate)]
        of = np.repeat(np.arange(len(lengths)), lengths)
        return _Metrics(of, self.codes[-1].of(name), self.verdicts.of(verdict), *numbers, *flags)

    def _expected(self, place: Array, rank: Array, seed: Array, metrics: _Metrics) -> Array:
        """Index into `texts` for each record; only those that an entry may be about are looked at."""
        expected = np.zeros(len(place), np.int64)
        about = np.array([bool(found) for found in self.applying], bool)
        if not about.any():
            return expected
        names = [*self.codes[-1]]
        starts = np.searchsorted(metrics.of, np.arange(len(place) + 1))
        candidates = about[place] & ((rank <= _AGREE) | (rank == _DIVERGE))
        for i in np.flatnonzero(candidates).tolist():
            verdict = SEVERITY[rank[i]]
            found = matching(
                self.applying[place[i]], verdict, int(seed[i]),
                () if verdict.green else self._seen(metrics, names, range(starts[i], starts[i + 1])),
            )  # fmt: skip
            expected[i] = self.texts[explained(found, verdict.green)]
            self.used += [k for k in found if k not in self.used]
        return expected

    @staticmethod
    def _seen(metrics: _Metrics, names: Sequence[str], which: Iterable[int]) -> list[_Seen]:
        return [
            _Seen(
                names[metrics.name[i]],
                SEVERITY[metrics.rank[i]],
                float(metrics.value[i]),
                float(metrics.floor[i]),
                bool(metrics.gate[i]),
            )
            for i in which
        ]
