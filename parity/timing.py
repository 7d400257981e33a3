"""Where the wall time of a command goes: spans on lanes, kept while it is profiled.

A lane is a thread of the command or a worker process. Spans of one lane may lie in each other: the
innermost counts. All times are seconds of `time.monotonic()`, one clock for all processes of a machine,
so that a worker's spans, which travel with its answers, need no shift. Without a profile a span costs
one comparison.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import os
import resource
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar, cast

Function = TypeVar("Function", bound=Callable[..., Any])

VARIABLE = "PARITY_PROFILE"
"""In the environment of a worker whose time is to be reported: when it was started."""
BORN = time.monotonic() - time.process_time()
"""When this process began, as far as its CPU time tells: for an interpreter that starts, nearly all."""

PROCESS, IMPORT, LOAD, COMPILE, CAPTURE = "process", "import", "load", "compile", "capture"
READ, COMPARE, SEARCH, WRITE, WAIT = "read", "compare", "search", "write", "wait"
KINDS = {
    PROCESS: "start and end of processes",
    IMPORT: "imports",
    LOAD: "loading of models",
    COMPILE: "JIT: CPU seconds of the compilers that a capture starts",
    CAPTURE: "captures",
    READ: "finding and reading of captures",
    COMPARE: "comparing",
    SEARCH: "searching",
    WRITE: "writing",
    WAIT: "waiting for another lane, which explains nothing",
}
"""What a lane does."""


class Span(NamedTuple):
    """What one lane did from `start` to `end`."""

    lane: str
    kind: str
    """One of `KINDS`."""
    label: str
    start: float
    end: float


class Timeline:
    """Collects spans; every thread may add to it."""

    def __init__(self, imports: bool = False) -> None:
        self.spans: list[Span] = []
        self._lock = threading.Lock()
        self._restore = _time_imports(self) if imports else lambda: None

    @contextlib.contextmanager
    def span(self, kind: str, label: str = "", lane: str = "") -> Iterator[None]:
        """Adds what is done inside the block; the lane is this thread unless it is named."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.add([Span(lane or lane_of_thread(), kind, label, start, time.monotonic())])

    def add(self, spans: Iterable[Span]) -> None:
        """Adds finished spans."""
        with self._lock:
            self.spans.extend(spans)

    def take(self) -> list[Span]:
        """The spans so far, which are then forgotten here."""
        with self._lock:
            taken, self.spans = self.spans, []
        return taken

    def close(self) -> None:
        """Imports are timed no longer."""
        self._restore()


_present: Timeline | None = None


def start(imports: bool = False) -> Timeline:
    """Begins the profile of this process; workers that it starts from now on report theirs.

    Args:
        imports: Time imports as well, by a wrapper around `__import__`.
    """
    global _present
    _present = Timeline(imports)
    os.environ[VARIABLE] = str(time.monotonic())
    return _present


def of_worker() -> Timeline | None:
    """The profile of a worker process, where the command that started it has one."""
    if not (started := os.environ.get(VARIABLE)):
        return None
    profile = start(imports=True)
    profile.add([Span(lane_of_thread(), PROCESS, "start", float(started), time.monotonic())])
    return profile


def stop() -> None:
    """Ends the profile of this process."""
    global _present
    if _present is not None:
        _present.close()
    _present = None
    os.environ.pop(VARIABLE, None)


def span(kind: str, label: str = "", lane: str = "") -> contextlib.AbstractContextManager[None]:
    """`Timeline.span` of the profile, if there is one."""
    return _present.span(kind, label, lane) if _present else contextlib.nullcontext()


@contextlib.contextmanager
def capture(method: str) -> Iterator[None]:
    """A capture; the CPU seconds of compilers that ended in it are put at its end."""
    if _present is None:
        yield
        return
    before, start = _seconds_of_children(), time.monotonic()
    with _present.span(CAPTURE, method):
        yield
    end = time.monotonic()
    if (seconds := min(_seconds_of_children() - before, end - start)) > 0:
        _present.add([Span(lane_of_thread(), COMPILE, method, end - seconds, end)])


def _seconds_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def timed(kind: str) -> Callable[[Function], Function]:
    """A decorator: each call is a span."""

    def decorated(function: Function) -> Function:
        @functools.wraps(function)
        def call(*given: Any, **named: Any) -> Any:
            with span(kind, function.__qualname__):
                return function(*given, **named)

        return cast(Function, call)

    return decorated


def report(lane: str, spans: Sequence[Sequence[Any]]) -> None:
    """Adds what a worker reported, `Span`s as JSON has them, to a lane of its own."""
    if _present:
        _present.add(Span(lane, kind, label, begin, end) for _, kind, label, begin, end in spans)


def lane_of_thread() -> str:
    """`main`, or the name of the thread."""
    thread = threading.current_thread()
    return "main" if thread is threading.main_thread() else thread.name


def _time_imports(timeline: Timeline) -> Any:
    """Makes every import of at least a millisecond a span; returns what undoes it."""
    plain, depth = builtins.__import__, threading.local()

    def timed(name: str, *rest: Any, **named: Any) -> Any:
        if getattr(depth, "inside", False):
            return plain(name, *rest, **named)
        depth.inside, begin = True, time.monotonic()
        try:
            return plain(name, *rest, **named)
        finally:
            depth.inside = False
            if (end := time.monotonic()) - begin >= 1e-3:  # seconds
                timeline.add([Span(lane_of_thread(), IMPORT, name, begin, end)])

    builtins.__import__ = timed

    def restore() -> None:
        builtins.__import__ = plain

    return restore
