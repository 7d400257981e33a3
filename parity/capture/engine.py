"""Captures from worker processes and bundles, kept by content so that none is run twice."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from filelock import FileLock

from parity import resources, timing
from parity.capture import capacity, keys, machine, storage
from parity.capture.bundle import is_bundle, opened
from parity.capture.capacity import Jobs
from parity.capture.checks import not_installed
from parity.capture.environments import UnavailableVersion, pinned
from parity.capture.growth import Growth, full
from parity.capture.loaded import Check
from parity.capture.pool import Pool
from parity.capture.worker import openblas
from parity.errors import CaptureError, DiskFull, UsageError
from parity.factors import Knobs
from parity.paths import protocol, registry
from parity.paths.contract import METHODS
from parity.paths.registry import registered, resolve
from parity.recipe import PINNED, Recipe, kind_of
from parity.trace import Trace

TIMEOUT = 600.0  # seconds a capture may take
AGAIN = "-again"
"""The attempt that shows whether a path repeats itself; whoever asks that shares it."""


class Source(Protocol):
    """Answers captures of one path: worker processes, or a bundle."""

    def __call__(self, method: str, recipe: Recipe, inputs: Trace, attempt: str = "") -> Trace:
        """See `Engine.capture`."""


class Declared(NamedTuple):
    """What a path says of itself (see `TrainingPath`), be it a class or a bundle of its captures."""

    name: str
    framework: str
    operations: Mapping[str, str]
    knobs: Mapping[str, Any]
    """Factors that only it has, with their defaults."""
    own_factors: tuple[str, ...] = ()
    """Factors that its own code decides, whatever a recipe has."""
    absent: Mapping[str, str] = MappingProxyType({})
    """Methods that it does not implement, each with what it says when it is called."""


class Engine:
    """Owns the workers and the cache of captures.

    Args:
        cache: Folder of captures, kernels and converted checkpoints.
        timeout: Seconds a capture may take.
        log_dir: Folder of the workers' logs.
        notice: Called with a sentence when something starts.
        jobs: Processes that may be at work at once; by default what this machine has room for.
    """

    def __init__(
        self,
        cache: Path | None = None,
        timeout: float = TIMEOUT,
        log_dir: Path | None = None,
        notice: Callable[[str], None] | None = None,
        jobs: Jobs | None = None,
    ) -> None:
        self.cache = cache or resources.cache()
        self.timeout = timeout
        self.log_dir = log_dir or self.cache / "logs"
        self.notice = notice or (lambda _: None)
        storage.check_writable(self.cache)
        openblas()  # what the variable names is looked for before any work
        self.growth = Growth(self.shared)
        self._use = contextlib.ExitStack()
        self._use.enter_context(storage.in_use(self.cache))
        self.captured = 0  # captures that were run, not found in the cache
        # Manifests of the captures that were used, to their interpreters.
        self.loaded: dict[str, str] = {}
        self.jobs = jobs or capacity.jobs(capacity.here())
        # Both sides of as many cells as processes can be busy with.
        self._threads = ThreadPoolExecutor(2 * self.jobs.busy, thread_name_prefix="capture")
        self._check = Check(self.shared)
        self._pool = Pool(
            self.shared.resolve(),
            self.log_dir,
            lambda manifest, python: not self._check.holds(manifest, python),
            self.notice,
            self.jobs,
        )
        self._interpreters: dict[str, tuple[str, str]] = {}
        # The environment that captures of a path must come from; None: of the next one that is run.
        self._present: dict[str, Mapping[str, Any] | None] = {}

    @property
    def shared(self) -> Path:
        """Folder of what all workers share: kernels, converted checkpoints, manifests."""
        return self.cache

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and not issubclass(kind, Exception):
            self.stop()
        else:
            self.close()

    def stop(self) -> None:
        """Ends all workers at once, also those at work (Ctrl-C); what they were doing is lost."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._pool.stop()
        self._use.close()

    def drop(self, thread: int) -> None:
        """Ends what a thread captures now; there it is an error."""
        self._pool.drop(thread)

    def close(self) -> None:
        """Ends all workers."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        with timing.span(timing.PROCESS, "end"):
            self._pool.close()
        self._use.close()
        # On a full disk what was captured is kept all the same.
        with timing.span(timing.WRITE, "cache"), contextlib.suppress(OSError):
            self.growth.settle()

    def source(self, spec: str, path: str = "") -> Source:
        """What answers captures of a path, or of another `path` whose captures a bundle holds."""
        if is_bundle(spec):
            found = opened(spec)
            return partial(found.capture, self.cache, path or found.path)
        return partial(self.capture, path or spec)

    def capture(
        self, spec: str, method: str, recipe: Recipe, inputs: Trace, attempt: str = ""
    ) -> Trace:
        """Runs one method of one path, or finds what it gave before.

        Args:
            spec: The path, as `registry.resolve` takes it.
            method: One of its methods.
            recipe: What it is to carry out.
            inputs: What the method is handed.
            attempt: Another word than before asks for another run of the same.

        Raises:
            Unsupported: The path cannot do it.
            UnmatchedNames: What was handed over does not fit the path's tensors by name.
            CaptureError: It failed.
        """
        # What only another path has, or the method does not read, must not make it run again.
        with timing.span(timing.READ, f"{spec}: {method}"):
            recipe = METHODS[method].scope(recipe.with_knobs(resolve(spec).knob_types()), inputs)
            words = keys.of_path(spec), method, keys.of_recipe(recipe), inputs.digest(), attempt
            key = hashlib.sha256("\n".join(words).encode()).hexdigest()[:24]
            folder = self.cache / "captures" / key[:2]
            if found := self._kept(spec, folder, key):
                return found
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{key}.lock"):
            return self._kept(spec, folder, key) or self._run(
                spec, method, recipe, inputs, folder / key
            )

    def _kept(self, spec: str, folder: Path, key: str) -> Trace | None:
        """A capture of the code that would run now, from the environment that is present."""
        names = os.listdir(folder) if folder.is_dir() else []  # noqa: PTH208 a glob is slow
        own = (n for n in names if n.startswith(f"{key}-") and n.endswith(".safetensors"))
        # The newest first: it is of the environment that was present last.
        for file in sorted((folder / name for name in own), key=storage.made, reverse=True):
            if not self._holds(spec, file) or not storage.used(file):  # removed by another process
                continue
            trace = Trace.load(file)
            present = self._present.get(spec, trace.environment)
            if present is not None and not machine.differences(trace.environment, present):
                return trace
        return None

    def would_use(self, spec: str, file: Path, environment: Mapping[str, Any]) -> bool:
        """Whether a capture of a path that was used before would be used again, and notes that it is.

        Args:
            spec: The path.
            file: The capture.
            environment: The one that it comes from.

        Raises:
            CaptureError: The path has no interpreter.
        """
        present = self._present.get(spec, environment)
        if present is None or machine.differences(environment, present):
            return False
        return self._holds(spec, file) and storage.used(file)

    def _holds(self, spec: str, file: Path) -> bool:
        """Whether a capture is of the code that would run now."""
        manifest, python = file.stem.rpartition("-")[2], self._interpreter(spec)[1]
        if holds := self._check.holds(manifest, python):
            self.loaded[manifest] = python
        return holds

    def _run(self, spec: str, method: str, recipe: Recipe, inputs: Trace, slot: Path) -> Trace:
        source, output = slot.with_suffix(".inputs"), slot.with_suffix(".output")
        try:
            inputs.save(source)
            target, python = self._interpreter(spec)
            with (
                timing.span(timing.WAIT, f"{spec}: {method}"),
                self._pool.worker(spec, resolve(spec), python) as worker,
            ):
                self.notice(f"{spec}: {method}")
                manifest = worker.call(spec, target, method, recipe, source, output, self.timeout)
            self.captured += 1
            file = slot.with_name(f"{slot.name}-{manifest}.safetensors")
            output.replace(file)
            trace = Trace.load(file)
            self._present[spec], self.loaded[manifest] = trace.environment, python
            self.growth.add(file.stat().st_size)
            return trace
        except (CaptureError, OSError) as error:
            if why := full(self.cache):
                raise DiskFull(why) from error
            raise
        finally:
            source.unlink(missing_ok=True)
            output.unlink(missing_ok=True)

    def current(self, loaded: Mapping[str, str]) -> bool:
        """Whether manifests are of what processes of their interpreters would load now.

        Where there is none, as of a check that failed before anything was captured, nobody knows.
        """
        return bool(loaded) and all(
            self._check.holds(manifest, python) for manifest, python in loaded.items()
        )

    def warm(self, spec: str) -> None:
        """Starts the process of a path beside what is at work, where there is room for one."""
        if self.jobs.busy > 1 and not_installed(spec) == "":
            target, python = self._interpreter(spec)
            self._pool.warm(spec, resolve(target), python)

    def renew(self, spec: str) -> None:
        """From now on uses captures of the environment alone that the path's process has now."""
        self._present[spec] = None

    def _interpreter(self, spec: str) -> tuple[str, str]:
        """The class that a worker is started with, and its interpreter."""
        if "@" not in spec:
            return spec, sys.executable
        if spec not in self._interpreters:
            self.notice(f"{spec}: making its environment")
            try:
                python = pinned(spec, self.cache).python
            except UnavailableVersion as error:
                raise CaptureError(f"path {spec!r} has no environment: {error}") from None
            # Entry points are not known there.
            name = spec.partition("@")[0]
            self._interpreters[spec] = registered().get(name, name), str(python)
        return self._interpreters[spec]

    def both(
        self,
        sources: Mapping[str, Source],
        method: str,
        recipes: Mapping[str, Recipe],
        inputs: Trace,
    ) -> tuple[Trace, Trace]:
        """Runs a method on subject and reference side by side."""
        subject, reference = (
            self._threads.submit(sources[side], method, recipes[side], inputs)
            for side in ("subject", "reference")
        )
        with timing.span(timing.WAIT, method):
            return subject.result(), reference.result()

    def shipped(self, spec: str, recipe: Recipe) -> Recipe:
        """A recipe in which a path sets by itself what nobody pins."""
        return shipped(self.source(spec), recipe)


def shipped(source: Source, recipe: Recipe) -> Recipe:
    """A recipe in which a path sets by itself what nobody pins."""
    defaults = source("defaults", recipe, Trace()).scalars
    return recipe.override({k: v for k, v in defaults.items() if not k.startswith(PINNED)})


def declared(spec: str) -> Declared:
    """What a path or a bundle says of itself.

    Raises:
        UsageError: It is neither.
    """
    if is_bundle(spec):
        found, decided = opened(spec), tuple[str, ...]()
        with contextlib.suppress(UsageError):  # who judges a bundle need not have its path
            decided = resolve(found.path).own_factors
        of_file = found.path, found.framework, found.operations, found.knobs
        return Declared(*of_file, decided, found.absent)
    kind = resolve(spec)
    own = {knobs.section for knobs in kind.knob_types()}
    factors = kind_of(kind.knob_types())().factors()
    knobs = {name: value for name, value in factors.items() if name.partition(".")[0] in own}
    return Declared(
        spec, kind.framework, kind.operations, knobs, kind.own_factors, protocol.absent(kind)
    )


def knobs(specs: Iterable[str]) -> tuple[type[Knobs], ...]:
    """The knobs of paths and, as far as its path is known here, of bundles.

    Raises:
        UsageError: An unknown path, or no bundle.
    """
    found: dict[type[Knobs], None] = {}
    for spec in specs:
        if not is_bundle(spec):
            found |= dict.fromkeys(registry.knobs([spec]))
            continue
        name = opened(spec).path
        with contextlib.suppress(UsageError):  # who judges a bundle need not have its path
            found |= dict.fromkeys(registry.knobs([name]))
    return tuple(found)
