"""Worker processes: one serves all paths that run on the same libraries and leave them as they found them."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from parity.capture.capacity import Jobs
from parity.capture.footprint import in_words
from parity.capture.worker import Worker
from parity.errors import CaptureError
from parity.paths.protocol import TrainingPath

OWN = __name__.partition(".")[0]
START = 1.0  # seconds that a process on MLX takes to start


class Group(NamedTuple):
    """What paths must have in common to be served by one process.

    Attributes:
        python: The interpreter.
        framework: It decides the environment variables.
        hidden: Packages that the process cannot import.
        modules: Top-level modules of the paths' code outside this package: who edits a trainer of
            their own does not make captures of other paths run again.
        alone: The one path that is served, where it changes what others would find.
    """

    python: str
    framework: str
    hidden: tuple[str, ...]
    modules: tuple[str, ...]
    alone: str = ""


def group_of(spec: str, kind: type[TrainingPath], python: str, alone: bool = False) -> Group:
    """The group of a path.

    Args:
        spec: The path.
        kind: Its class.
        python: Interpreter to run it in.
        alone: Whether it gets a process of its own, whatever it says.
    """
    modules = {member.__module__.partition(".")[0] for member in kind.made_of()} - {OWN}
    only = spec if alone or kind.alone() else ""
    return Group(python, kind.framework, kind.hidden, tuple(sorted(modules)), only)


class Pool:
    """Lends workers, starts them and ends those that have been idle longest.

    Args:
        cache: Folder that workers share.
        log_dir: Folder of their logs.
        stale: Whether what a worker has loaded (a manifest, an interpreter) was edited since.
        notice: Called with a sentence when a path is moved to a process of its own.
        jobs: How many workers may be at work at once, and how many stay alive.
    """

    def __init__(
        self,
        cache: Path,
        log_dir: Path,
        stale: Callable[[str, str], bool],
        notice: Callable[[str], None],
        jobs: Jobs,
    ) -> None:
        self._cache, self._log_dir, self._stale, self._notice = cache, log_dir, stale, notice
        self.jobs = jobs
        self._idle: list[Worker] = []  # the one used last comes last
        self._lent: Counter[Group] = Counter()
        self._waited: defaultdict[Group, float] = defaultdict(float)  # seconds
        self._working: dict[Worker, int] = {}  # with the thread that uses it
        self._stopped = False
        self._alone: dict[str, str] = {}
        self._numbers = itertools.count(1)  # of logs
        self._returned = threading.Condition()

    @contextlib.contextmanager
    def worker(self, spec: str, kind: type[TrainingPath], python: str) -> Iterator[Worker]:
        """A worker that no one else uses meanwhile.

        Args:
            spec: The path that it is to serve.
            kind: Its class.
            python: Interpreter to run it in.
        """
        group = group_of(spec, kind, python, spec in self._alone)
        worker = self._take(spec, group)
        with self._returned:
            self._working[worker] = threading.get_ident()
        try:
            if self._stopped:
                worker.kill()
            self._refuse_if_stopped()
            yield worker
        except Exception:
            raise
        except BaseException:  # its answer will never be read
            worker.kill()
            raise
        finally:
            self._give_back(spec, worker)

    def warm(self, spec: str, kind: type[TrainingPath], python: str) -> None:
        """Starts a worker unless there is one, whatever is at work: it imports its libraries by itself."""
        group = group_of(spec, kind, python, spec in self._alone)
        with self._returned:
            there = self._lent[group] or any(worker.group == group for worker in self._idle)
            if there or self._stopped:
                return
            self._idle.append(self._new(group))
            ended = self._excess()
        for worker in ended:
            worker.close()

    def close(self) -> None:
        """Ends all workers."""
        with self._returned:
            ended, self._idle = self._idle, []
        for worker in ended:
            worker.finish()
        for worker in ended:
            worker.close()

    def stop(self) -> None:
        """Kills all workers, also those at work; whoever waits for one or asks for another gets an error."""
        with self._returned:
            self._stopped = True
            idle, self._idle = self._idle, []
            for worker in (*idle, *self._working):
                worker.kill()
            self._returned.notify_all()
        for worker in idle:  # who uses one of the others gives it back
            worker.close()

    def drop(self, thread: int) -> None:
        """Kills the worker that a thread uses, if any: nobody wants its answer any more."""
        with self._returned:
            for worker, user in self._working.items():
                if user == thread:
                    worker.kill()

    def _refuse_if_stopped(self) -> None:
        if self._stopped:
            raise CaptureError("stopped before it was captured")

    def _take(self, spec: str, group: Group) -> Worker:
        ended: list[Worker] = []
        with self._returned:
            self._returned.wait_for(lambda: self._stopped or self._may_work(group))
            self._wait_for_one(group)
            self._refuse_if_stopped()
            found = self._fitting(spec, group, ended)
            self._lent[group] += 1
            if not found:
                ended += self._excess()
        for worker in ended:
            worker.close()
        if found:
            return found
        try:
            return self._new(group)
        except BaseException:
            with self._returned:
                self._lent[group] -= 1
                self._returned.notify_all()
            raise

    def _new(self, group: Group) -> Worker:
        name = "-".join([group.alone or group.framework, *group.modules])
        log = f"{name.replace(':', '_').replace('/', '_')}-{os.getpid()}-{next(self._numbers)}.log"
        forks = group.framework not in self.jobs.gpu
        return Worker(group, self._cache, self._log_dir / log, forks)

    def _wait_for_one(self, group: Group) -> None:
        """Waits for a process of a group that is at work, as long as another would take to start.

        That is all the waiting for one group together: then another one is worth its start.
        """

        def settled() -> bool:
            busy = [w for w in self._working if w.group == group and w.loaded]
            idle = any(worker.group == group for worker in self._idle)
            return self._stopped or (self._may_work(group) and (idle or not busy))

        began = time.monotonic()
        left = START - self._waited[group]
        if not self._returned.wait_for(settled, timeout=max(left, 0.0)):
            self._returned.wait_for(lambda: self._stopped or self._may_work(group))
        self._waited[group] += time.monotonic() - began

    def _may_work(self, group: Group) -> bool:
        """Whether another worker of a group may be at work now."""
        if self._lent.total() >= self.jobs.busy:
            return False
        on_gpu = (count for lent, count in self._lent.items() if lent.framework in self.jobs.gpu)
        return group.framework not in self.jobs.gpu or sum(on_gpu) < self.jobs.on_gpu

    def _fitting(self, spec: str, group: Group, ended: list[Worker]) -> Worker | None:
        """An idle worker of a group, if there is one; those that are dead or stale are to be ended."""
        mine = [worker for worker in self._idle if worker.group == group]
        # The one that served this path last still has its model.
        mine.sort(key=lambda worker: worker.spec == spec)
        while mine:
            self._idle.remove(worker := mine.pop())
            if worker.alive and not (worker.loaded and self._stale(worker.loaded, group.python)):
                return worker
            ended.append(worker)
        return None

    def _excess(self) -> list[Worker]:
        """Idle workers above those that stay alive, which are to be ended; the oldest first."""
        excess = len(self._idle) + self._lent.total() - self.jobs.alive
        return [self._idle.pop(0) for _ in range(min(max(excess, 0), len(self._idle)))]

    def _give_back(self, spec: str, worker: Worker) -> None:
        ended: list[Worker] = []
        with self._returned:
            self._lent[worker.group] -= 1
            del self._working[worker]
            if worker.changed and not worker.group.alone:
                # The call itself was served by a process that nobody had changed.
                self._alone[spec] = in_words(worker.changed)
                self._notice(
                    f"{spec} changes {self._alone[spec]}: it gets a process of its own from here on"
                )
                worker.group = worker.group._replace(alone=spec)
            (self._idle if worker.alive else ended).append(worker)
            ended += self._excess()
            self._returned.notify_all()
        for worker in ended:
            worker.close()
