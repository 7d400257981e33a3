"""Where the wall time of a command went, as a table, a page with a Gantt picture, and JSON."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from parity.files import to_json, write_atomically
from parity.report.html import templates
from parity.timing import CAPTURE, KINDS, WAIT, Span

SCHEMA = 1
TEMPLATE = "profile.html.j2"
WIDTH, ROW = 1000.0, 22  # of the picture, in its own units; ROW is a lane's height
_FINEST = 0.4  # width below which a bar is not drawn


@dataclass(frozen=True)
class Profile:
    """Spans of a command that took from `begin` to `end`, in seconds of one clock."""

    begin: float
    end: float
    pieces: tuple[Span, ...]
    """What each lane did, innermost spans alone, in the order of their start."""

    @property
    def wall(self) -> float:
        """Seconds from begin to end."""
        return self.end - self.begin

    @property
    def lanes(self) -> list[str]:
        """The lanes in the order in which they began."""
        return [*dict.fromkeys(piece.lane for piece in self.pieces)]

    def by_kind(self) -> dict[str, float]:
        """Wall seconds by kind; a moment in which several lanes work is divided among them.

        The sum is what is explained: what is missing to `wall` no lane can tell.
        """
        events: list[tuple[float, int, str]] = []
        for piece in self.pieces:
            if piece.kind != WAIT:
                events += [(piece.start, 1, piece.kind), (piece.end, -1, piece.kind)]
        events.sort()
        working, found = defaultdict[str, int](int), dict.fromkeys(KINDS, 0.0)
        for (now, change, kind), (then, _, _) in pairwise([*events, (self.end, 0, "")]):
            working[kind] += change
            if total := sum(working.values()):
                for name, count in working.items():
                    found[name] += (then - now) * count / total
        return {kind: seconds for kind, seconds in found.items() if seconds}

    def explained(self) -> float:
        """The share of the wall time in which some lane worked."""
        return sum(self.by_kind().values()) / self.wall if self.wall else 1.0

    def seconds(self, of: Callable[[Span], tuple[str, str] | None]) -> dict[str, dict[str, float]]:
        """Seconds of lanes' time by what `of` gives for a piece; what it gives nothing for is left out."""
        found: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        for piece in self.pieces:
            if place := of(piece):
                found[place[0]][place[1]] += piece.end - piece.start
        return {row: dict(columns) for row, columns in found.items()}

    def by_lane(self) -> dict[str, dict[str, float]]:
        """Lane to kind to seconds."""
        return self.seconds(lambda piece: (piece.lane, piece.kind))

    def captures(self) -> dict[str, dict[str, float]]:
        """Method to lane to the seconds that it captured, without loading, imports and JIT."""
        return self.seconds(lambda p: (p.label, p.lane) if p.kind == CAPTURE else None)


def profile(spans: Iterable[Span], begin: float, end: float) -> Profile:
    """The profile of a command from what its lanes reported."""
    lanes: dict[str, list[Span]] = defaultdict(list)
    for span in spans:
        start, stop = max(span.start, begin), min(span.end, end)
        if stop > start:
            lanes[span.lane].append(span._replace(start=start, end=stop))
    pieces = [piece for found in lanes.values() for piece in _innermost(found)]
    return Profile(begin, end, tuple(sorted(pieces, key=lambda piece: (piece.start, piece.lane))))


def _innermost(spans: Sequence[Span]) -> list[Span]:
    """Spans of one lane without overlaps: at each moment the one that began last."""
    edges = sorted({edge for span in spans for edge in (span.start, span.end)})
    waiting = sorted(spans, key=lambda span: (span.start, -span.end), reverse=True)
    active: list[Span] = []
    found: list[Span] = []
    for start, end in pairwise(edges):
        while waiting and waiting[-1].start <= start:
            active.append(waiting.pop())
        active = [span for span in active if span.end > start]
        if not active:
            continue
        top = active[-1]
        if found and found[-1][:3] == top[:3] and found[-1].end == start:
            found[-1] = found[-1]._replace(end=end)
        else:
            found.append(top._replace(start=start, end=end))
    return found


def save(folder: Path, found: Profile) -> list[Path]:
    """Writes profile.json and profile.html."""
    spans = [
        [p.lane, p.kind, p.label, round(p.start - found.begin, 6), round(p.end - found.begin, 6)]
        for p in found.pieces
    ]
    data = {
        "schema_version": SCHEMA,
        "wall": found.wall,
        "explained": found.explained(),
        "kinds": found.by_kind(),
        "lanes": found.by_lane(),
        "captures": found.captures(),
        "spans": spans,
    }
    page = templates().get_template(TEMPLATE).render(
        found=found,
        rows=rows(found),
        kinds=KINDS,
        lanes=table(found.by_lane(), [k for k in KINDS if any(k in v for v in found.by_lane().values())]),
        captures=table(found.captures(), found.lanes),
        bars=bars(found),
        width=WIDTH,
        row=ROW,
        ticks=ticks(found.wall),
    )  # fmt: skip
    files = {folder / "profile.json": to_json(data), folder / "profile.html": page.encode()}
    for file, content in files.items():
        write_atomically(file, content)
    return list(files)


def rows(found: Profile) -> list[tuple[str, float, float]]:
    """What the time went into, seconds and share of the wall time, the greatest first."""
    parts = sorted(found.by_kind().items(), key=lambda item: -item[1])
    wall = found.wall or 1.0
    listed = [(KINDS[kind], seconds, seconds / wall) for kind, seconds in parts]
    rest = found.wall - sum(seconds for _, seconds, _ in listed)
    return [*listed, ("not explained", rest, rest / wall)]


def text(found: Profile) -> str:
    """The rows for a terminal."""
    lines = [f"wall time {found.wall:.1f} s, explained {found.explained():.1%}"]
    lines += [f"  {name:<58} {seconds:7.2f} s {share:6.1%}" for name, seconds, share in rows(found)]
    return "\n".join(lines)


def table(
    values: Mapping[str, Mapping[str, float]], columns: Sequence[str]
) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Heads and rows of a table of seconds; columns without any are left out."""
    heads = [column for column in columns if any(column in row for row in values.values())]
    body = [
        (name, [f"{row[head]:.2f}" if head in row else "" for head in heads])
        for name, row in values.items()
    ]
    return heads, body


def bars(found: Profile) -> dict[str, list[tuple[float, float, str, str]]]:
    """Lane to its bars: left edge, width, kind and what it was; neighbours of a kind are one bar."""
    scale = WIDTH / (found.wall or 1.0)
    drawn: dict[str, list[tuple[float, float, str, str]]] = {lane: [] for lane in found.lanes}
    for piece in found.pieces:
        left, width = (piece.start - found.begin) * scale, (piece.end - piece.start) * scale
        lane, name = drawn[piece.lane], f"{KINDS[piece.kind]}: {piece.label}"
        if lane and lane[-1][2] == piece.kind and left - lane[-1][0] - lane[-1][1] < _FINEST:
            start, _, kind, first = lane[-1]
            more = first if first.endswith("…") or first == name else f"{first}, …"
            lane[-1] = (start, left + width - start, kind, more)
        else:
            lane.append((left, width, piece.kind, name))
    return {lane: [bar for bar in found if bar[1] >= _FINEST] for lane, found in drawn.items()}


def ticks(wall: float) -> list[tuple[float, str]]:
    """Places and seconds of at most ten marks of the axis."""
    step = next(
        (s for power in range(-2, 6) for s in (10.0**power, 2 * 10.0**power, 5 * 10.0**power) if wall / s <= 10),
        wall or 1.0,
    )  # fmt: skip
    return [
        (WIDTH * n * step / (wall or 1.0), f"{n * step:g} s") for n in range(int(wall / step) + 1)
    ]
