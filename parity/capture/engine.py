"""Captures from worker processes, kept by content so that none is run twice."""

from __future__ import annotations

import hashlib
import os
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from filelock import FileLock

from parity import resources
from parity.capture import keys
from parity.capture.environments import UnavailableVersion, pinned
from parity.capture.worker import Worker
from parity.errors import CaptureError, UsageError
from parity.paths.registry import registered, resolve
from parity.recipe import Recipe
from parity.trace import Trace

TIMEOUT = 600.0  # seconds a capture may take
MOST_WORKERS = 5  # processes that stay alive; each holds a framework and a model in memory
PINNED = (
    "model.source", "model.weights", "data.source", "seed.value", "optim.lr", "train.steps", "train.batch_size", "decode.",
)  # fmt: skip
"""What a user always says; every other factor is left to the path when it runs as shipped."""


class Engine:
    """Owns the workers and the cache of captures.

    Args:
        cache: Folder of captures, kernels and converted checkpoints.
        timeout: Seconds a capture may take.
        log_dir: Folder of the workers' logs.
        notice: Called with a sentence when something starts.
    """

    def __init__(
        self,
        cache: Path | None = None,
        timeout: float = TIMEOUT,
        log_dir: Path | None = None,
        notice: Callable[[str], None] | None = None,
    ) -> None:
        self.cache = cache or resources.cache()
        self.timeout = timeout
        self.log_dir = log_dir or self.cache / "logs"
        self.notice = notice or (lambda _: None)
        self.captured = 0  # captures that were run, not found in the cache
        self._workers: dict[str, Worker] = {}
        self._locks: dict[str, threading.Lock] = {}
        self._guard = threading.Lock()
        self._pool = ThreadPoolExecutor(max_workers=8, thread_name_prefix="capture")

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends all workers."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        for worker in self._workers.values():
            worker.close()
        self._workers.clear()

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
        # What only another path has must not make this one run again.
        recipe = recipe.with_knobs(resolve(spec).knob_types())
        words = keys.of_path(spec), method, keys.of_recipe(recipe), inputs.digest()
        key = hashlib.sha256("\n".join(words).encode()).hexdigest()[:24] + attempt
        file = self.cache / "captures" / key[:2] / f"{key}.safetensors"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{file}.lock"):
                if not file.exists():
                    self._run(spec, method, recipe, inputs, file)
        return Trace.load(file)

    def _run(self, spec: str, method: str, recipe: Recipe, inputs: Trace, file: Path) -> None:
        source = file.with_suffix(".inputs")
        inputs.save(source)
        with self._guard:
            lock = self._locks.setdefault(spec, threading.Lock())
        try:
            with lock:
                self.notice(f"{spec}: {method}")
                worker = self._worker(spec)
                self._make_room(spec)
                worker.call(method, recipe, source, file, self.timeout)
                self.captured += 1
        finally:
            source.unlink(missing_ok=True)

    def _worker(self, spec: str) -> Worker:
        worker = self._workers.get(spec)
        if worker is None or not worker.alive:
            if worker is not None:
                worker.close()
            log = self.log_dir / f"{spec.replace(':', '_')}-{os.getpid()}.log"
            target, python = spec, sys.executable
            if "@" in spec:
                target, python = self._pinned(spec)
            worker = Worker(target, resolve(spec), self.cache.resolve(), log, python)
            self._workers[spec] = worker
        return worker

    def _pinned(self, spec: str) -> tuple[str, str]:
        """Class and interpreter of `PATH@VERSION`; entry points are not known there."""
        self.notice(f"{spec}: making its environment")
        try:
            python = pinned(spec, self.cache).python
        except UnavailableVersion as error:
            raise CaptureError(f"path {spec!r} has no environment: {error}") from None
        name = spec.partition("@")[0]
        return registered().get(name, name), str(python)

    def _make_room(self, used: str) -> None:
        """Ends the workers that have been idle longest, for as long as there are too many."""
        with self._guard:
            self._workers[used] = self._workers.pop(used)  # the last is the one used last
            for spec in list(self._workers)[:-MOST_WORKERS]:
                if self._locks[spec].acquire(blocking=False):
                    self._workers.pop(spec).close()
                    self._locks[spec].release()

    def both(
        self, specs: Mapping[str, str], method: str, recipes: Mapping[str, Recipe], inputs: Trace
    ) -> tuple[Trace, Trace]:
        """Runs a method on subject and reference side by side."""
        subject, reference = (
            self._pool.submit(self.capture, specs[side], method, recipes[side], inputs)
            for side in ("subject", "reference")
        )
        return subject.result(), reference.result()

    def shipped(self, spec: str, recipe: Recipe) -> Recipe:
        """A recipe in which a path sets by itself what nobody pins."""
        defaults = self.capture(spec, "defaults", recipe, Trace()).scalars
        return recipe.override({k: v for k, v in defaults.items() if not k.startswith(PINNED)})


def check(specs: list[str], recipe: Recipe) -> None:
    """Finds wrong use before any work is done.

    Raises:
        UsageError: An unknown path, model or data folder.
    """
    for spec in specs:
        resolve(spec)
    resources.model_dir(recipe.model.source)
    resources.data_dir(recipe.data.source)
    if not recipe.decode.expected.strip():
        raise UsageError("decode.expected is blank: give the completion that should come")
