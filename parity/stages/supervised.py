"""Stage 09: which targets each path's real loss supervises, on batches given and on its own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from parity.errors import Unsupported
from parity.judge.compare import nothing
from parity.names import each
from parity.record import Metric, Verdict
from parity.stages.context import Comparison, Context
from parity.stages.targets import (
    SHOWN,
    Target,
    TargetDifference,
    TrainingRow,
    patterns,
    rows_that_fill,
    sentence,
)
from parity.trace import Trace

ROWS = 6  # distinct rows of the recipe that are handed over
LONG, CUT = 24, 17  # tokens of a row, and the width at which it is cut
MOST = 1024  # micro-batches that are drawn from a path at most
PASSES = 2  # over the rows, at least
MISSED = 1e-4  # chance that shuffling alone leaves out some row in every pass


class SupervisedPositions:
    """The mask on batches handed over, then what each path makes of the rows by itself."""

    number: ClassVar[int] = 9
    name: ClassVar[str] = "supervised_positions"
    question: ClassVar[str] = "Do both train on the same targets?"

    def run(self, context: Context) -> Comparison:
        """Compares sets of (row, token, id); there is no rounding here."""
        texts = Trace(scalars={"texts": [], "conversations": []})
        tokens = context.given("tokenization", texts)
        offsets = each(tokens.arrays, "offset")
        known = [
            TrainingRow(tuple(ids.tolist()), max(int(offset), 1), f"training row {index}")
            for index, (ids, offset) in enumerate(
                zip(each(tokens.arrays, "row"), offsets, strict=True)
            )
        ]
        result = Comparison()
        # A path that is to learn its prompts is not asked what it makes of one.
        prompts = any(context.recipes[s].mask.prompt for s in ("subject", "reference"))
        handed, inputs = batches(known, prompts)
        a, b = context.both("supervised_positions", context.recipes, inputs)
        for index, (what, rows) in enumerate(handed):
            differences = [TargetDifference(row) for row in rows]
            for difference, ours, theirs in zip(
                differences, *(_by_row(t, index, len(rows)) for t in (a, b)), strict=True
            ):
                _fill(difference, {ours}, {theirs})
            _conclude(result, f"supervised tokens, {what}", differences, a, b)
        agreed = all(metric.verdict.green for metric in result.metrics)
        self._own(context, known, agreed, result)
        return result

    def _own(
        self, context: Context, known: list[TrainingRow], agreed: bool, result: Comparison
    ) -> None:
        """Rows of the paths' own batches, matched by content: order and width do not matter."""
        sizes = {context.recipes[side].train.batch_size for side in ("subject", "reference")}
        passes, count = draws(len(known), min(sizes))
        inputs = Trace(scalars={"count": min(count, MOST)})
        try:
            a, b = context.both("supervised_positions", context.recipes, inputs)
        except Unsupported as error:
            note = f"the paths' own batches were not compared: {error}"
            result.findings.append(note)
            missing = nothing("supervised tokens, own batches")
            result.metrics.append(missing.model_copy(update={"note": note, "gate": False}))
            return
        found = [matched(trace, known) for trace in (a, b)]
        for side, (rows, strangers) in zip(("subject", "reference"), found, strict=True):
            if strangers:
                result.metrics.append(_strangers(side, strangers, sum(map(len, rows.values()))))
        ours, theirs = (rows for rows, _ in found)
        drawn = f"{passes} passes over {len(known)} rows, {count} micro-batches"
        if count > MOST:
            drawn = f"{MOST} micro-batches, fewer than the {count} of {passes} passes"
        even = len(sizes) == 1 and len(known) % min(sizes) == 0
        result.metrics.append(_visits(known, (ours, theirs), drawn, even, count <= MOST))
        if never := [row for row in _distinct(known) if row not in ours and row not in theirs]:
            result.findings.append(
                f"neither side trains on {len(never)} of {len(_distinct(known))} distinct rows in "
                f"{drawn}: {_titles(never)}"
            )
        differences = [TargetDifference(row) for row in ours if row in theirs]
        for difference in differences:
            _fill(difference, set(ours[difference.row]), set(theirs[difference.row]))
        _conclude(result, "supervised tokens, own batches", differences, a, b)
        if agreed and (filled := rows_that_fill(differences, a, b)):
            result.facts["rows that fill their batch"] = filled


def draws(rows: int, size: int) -> tuple[int, int]:
    """Passes over the rows, and their micro-batches, after which every row should have come.

    Some paths drop the last, incomplete batch of a pass. Where the order is shuffled anew each pass, a
    row is dropped in all of n passes with probability (rest / rows) ** n; passes are added until that
    is below `MISSED` for all rows together.
    """
    rest, passes = rows % size, PASSES
    while rest and rows * (rest / rows) ** passes > MISSED and rows > size:
        passes += 1
    return passes, passes * max(1, -(-rows // size))


def _distinct(known: list[TrainingRow]) -> list[TrainingRow]:
    """Rows without repetition, the first of equal ones, as `matched` knows them."""
    return list({row.ids: row for row in reversed(known)}.values())[::-1]


def _titles(rows: list[TrainingRow]) -> str:
    shown = ", ".join(row.title for row in rows[:SHOWN])
    return shown + (f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else "")


def _visits(
    known: list[TrainingRow],
    seen: tuple[Mapping[TrainingRow, list[frozenset[Target]]], ...],
    drawn: str,
    even: bool,
    complete: bool,
) -> Metric:
    """How often each row comes on each side.

    A row that one side never trains on diverges, and so does one that comes more often in one side's
    batches.

    Args:
        known: The training rows.
        seen: Of subject and reference, each row with what is supervised at each time it comes.
        drawn: What was drawn, in words.
        even: Rows fill their batches, so that each must come equally often. Elsewhere one path may drop
            the last batch of a pass and another keep it, and shares of all rows are compared.
        complete: Enough was drawn for every row to come.
    """
    name, rows = "rows trained on", _distinct(known)
    if not any(seen):
        return nothing(name)
    counts = {row: tuple(len(side.get(row, ())) for side in seen) for row in rows}
    sums = [max(1, sum(len(side.get(row, ())) for row in rows)) for side in seen]

    def uneven(row: TrainingRow) -> bool:
        a, b = counts[row]
        shares = sorted((a / sums[0], b / sums[1]))
        return a != b if even else abs(a - b) > 1 and shares[1] > 1.5 * shares[0]

    parts = []
    alone = {row for row in rows if (counts[row][0] == 0) != (counts[row][1] == 0)}
    for at, (side, other) in enumerate((("subject", "reference"), ("reference", "subject"))):
        if lone := [row for row in rows if row in alone and counts[row][at]]:
            parts.append(
                f"the {other} never trains on {len(lone)} of {len(rows)} distinct rows, which the "
                f"{side} trains on: {_titles(lone)}"
            )
    often = [row for row in rows if row not in alone and uneven(row)]
    parts += [
        f"{row.title} comes {counts[row][0]} times in the subject's batches and {counts[row][1]} times "
        "in the reference's"
        for row in often[:SHOWN]
    ]
    bad = len(alone) + len(often)
    verdict, note = Verdict.IDENTICAL, drawn
    if bad:
        verdict, note = Verdict.DIVERGE, f"{'; '.join(parts)} (in {drawn})"
    elif not complete:
        verdict, note = Verdict.INCONCLUSIVE, f"not every row was drawn: {drawn}"
    return Metric(
        name=name,
        verdict=verdict,
        value=float(bad),
        tolerance=0.0,
        minimum_required_tolerance=float(bad),
        mismatched=bad,
        total=len(rows),
        where=name if bad else "",
        note=note,
    )


def batches(
    known: list[TrainingRow], prompts: bool
) -> tuple[list[tuple[str, list[TrainingRow]]], Trace]:
    """Three batches made of the recipe's rows: named rows, and inputs of both paths.

    With and without padding behind the longest row; then rows of one token and more, and a row cut at
    the width.

    Args:
        known: The training rows.
        prompts: Whether prompts are masked: then there are rows whose prompt ends anywhere, in padding
            too.
    """
    own = _distinct(known)[:ROWS]
    long = [token for row in own for token in row.ids]
    long = (long * (LONG // len(long) + 1))[:LONG]

    def part(length: int, offset: int) -> TrainingRow:
        cut = f"row of {length} tokens" + (f", prompt of {offset}" if offset else "")
        return TrainingRow(tuple(long[:length]), max(offset, 1), cut)

    odd, what = [part(n, 0) for n in (CUT, 1, 2, CUT - 1, 9)], "short and cut rows"
    if prompts:
        ends = [(9, 1), (9, 4), (9, 8), (9, 9), (9, 12), (CUT, 6), (CUT, CUT)]
        odd, what = [*odd, *(part(*end) for end in ends)], "short, cut and masked rows"
    longest = max(len(row.ids) for row in own)
    handed = [
        ("padded rows", own, longest + 1),
        ("rows without padding", own, longest),
        (what, odd, CUT),
    ]
    inputs = Trace()
    for index, (_, rows, width) in enumerate(handed):
        ids = np.zeros((len(rows), max(2, width)), np.int32)
        for line, row in zip(ids, rows, strict=True):
            line[: len(row.ids)] = row.ids
        # 0 and 1 both say that all of a row is learned; rows of plain text say 0.
        pairs = [(row.start if row.start > 1 else 0, len(row.ids)) for row in rows]
        inputs.arrays[f"batches/ids.{index}"] = ids
        inputs.arrays[f"batches/lengths.{index}"] = np.array(pairs, np.int32)
    return [(what, rows) for what, rows, _ in handed], inputs


def matched(
    trace: Trace, known: list[TrainingRow]
) -> tuple[dict[TrainingRow, list[frozenset[Target]]], list[tuple[int, ...]]]:
    """What is supervised in each known row of a path's batches, and rows that are not known.

    A row is known by its tokens, not by the length that the path says it has.
    """
    rows = sorted({row.ids: row for row in reversed(known)}.values(), key=lambda r: -len(r.ids))
    found: dict[TrainingRow, list[frozenset[Target]]] = defaultdict(list)
    strangers = []
    for index, ids in enumerate(each(trace.arrays, "ids")):
        supervised = _by_row(trace, index, len(ids))
        for line, targets in zip(ids.tolist(), supervised, strict=True):
            row = next((r for r in rows if tuple(line[: len(r.ids)]) == r.ids), None)
            # A batch that is too narrow cuts its rows.
            row = row or next((r for r in rows if r.ids[: len(line)] == tuple(line)), None)
            if row is None:
                strangers.append(tuple(line))
            else:
                found[row].append(targets)
    return dict(found), strangers


def _by_row(trace: Trace, index: int, rows: int) -> list[frozenset[Target]]:
    by_row: list[set[Target]] = [set() for _ in range(rows)]
    for row, position, target in trace.arrays[f"supervised.{index}"].tolist():
        by_row[row].add((position + 1, target))
    return [frozenset(targets) for targets in by_row]


def _fill(
    difference: TargetDifference, ours: set[frozenset[Target]], theirs: set[frozenset[Target]]
) -> None:
    mine, other = set().union(*ours), set().union(*theirs)
    difference.subject, difference.reference = mine - other, other - mine
    difference.both = mine & other
    difference.mixed = ours != theirs


def _conclude(
    result: Comparison, name: str, differences: list[TargetDifference], a: Trace, b: Trace
) -> None:
    """One metric of all rows; the first divergence also leaves a sentence and facts."""
    bad = [difference for difference in differences if difference.count]
    total = sum(len(d.both) + len(d.subject) + len(d.reference) for d in differences)
    if not total:
        result.metrics.append(nothing(name))
        return
    count = sum(difference.count for difference in bad)
    words = sentence(differences, {**b.scalars["pieces"], **a.scalars["pieces"]}) if bad else ""
    first = min(bad[0].subject | bad[0].reference, default=(0, 0))[0] if bad else 0
    result.metrics.append(
        Metric(
            name=name,
            verdict=Verdict.DIVERGE if bad else Verdict.IDENTICAL,
            value=float(count),
            tolerance=0.0,
            minimum_required_tolerance=float(count),
            mismatched=count,
            total=total,
            where=f"{bad[0].row.title}, token {first}" if bad else "",
            note=words or f"{len(differences)} rows",
        )
    )
    if bad:  # of the first that diverges
        result.facts = result.facts or patterns(differences)


def _strangers(side: str, strangers: list[tuple[int, ...]], rest: int) -> Metric:
    count = len(strangers)
    return Metric(
        name=f"rows of the {side}'s batches",
        verdict=Verdict.DIVERGE,
        value=float(count),
        tolerance=0.0,
        minimum_required_tolerance=float(count),
        mismatched=count,
        total=count + rest,
        where=f"rows of the {side}'s batches",
        note=f"{count} rows of the {side}'s batches are none of the training rows, the first "
        f"{list(strangers[0][:SHOWN])}…",
    )
