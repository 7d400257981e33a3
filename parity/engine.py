"""Runs cells: captures from worker processes, cached by content, compared into records."""

from __future__ import annotations

import hashlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from parity import __version__, content, resources
from parity.cell import Cell, conclude, first_divergence, reproduce
from parity.errors import CaptureError, UnmatchedNames, Unsupported, UsageError
from parity.hints import hints
from parity.paths.base import registered, resolve
from parity.recipe import Recipe
from parity.record import Record, Side, Verdict
from parity.stages.base import Comparison, Context
from parity.trace import Trace
from parity.worker import Worker

TIMEOUT = 600.0  # seconds a capture may take
MOST_WORKERS = 5  # processes that stay alive; each holds a framework and a model in memory
REFEREE = "hf"  # the path that runs in float64
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
        repeat: Run the subject of a cell that diverges once more: what does not repeat itself is no
            evidence.
    """

    def __init__(
        self,
        cache: Path | None = None,
        timeout: float = TIMEOUT,
        log_dir: Path | None = None,
        notice: Callable[[str], None] | None = None,
        repeat: bool = False,
    ) -> None:
        self.cache = cache or resources.cache()
        self.timeout = timeout
        self.log_dir = log_dir or self.cache / "logs"
        self.notice = notice or (lambda _: None)
        self.repeat = repeat
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

    # Captures ----------------------------------------------------------------------------------

    def capture(self, spec: str, method: str, recipe: Recipe, inputs: Trace) -> Trace:
        """Runs one method of one path, or finds what it gave before.

        Raises:
            Unsupported: The path cannot do it.
            UnmatchedNames: What was handed over does not fit the path's tensors by name.
            CaptureError: It failed.
        """
        return self._load(spec, method, recipe, inputs, "")

    def _load(self, spec: str, method: str, recipe: Recipe, inputs: Trace, attempt: str) -> Trace:
        words = content.of_path(spec), method, content.of_recipe(recipe), inputs.digest()
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
            worker = Worker(target, resolve(spec).framework, self.cache.resolve(), log, python)
            self._workers[spec] = worker
        return worker

    def _pinned(self, spec: str) -> tuple[str, str]:
        """Class and interpreter of `PATH@VERSION`; entry points are not known there."""
        from parity.environments import Gap, pinned

        self.notice(f"{spec}: making its environment")
        try:
            python = pinned(spec, self.cache).python
        except Gap as error:
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

    # Cells -------------------------------------------------------------------------------------

    def run(self, cell: Cell) -> Record:
        """Runs one cell; whatever goes wrong in it becomes its record."""
        started = time.perf_counter()
        result, verdict, reason, detail = Comparison(), None, "", ""
        context = self.context(cell)
        if cell.subject == cell.reference and not cell.changes:
            reason = "the subject is the reference: such a comparison cannot fail"
            verdict = Verdict.INCONCLUSIVE
        else:
            try:
                result = cell.stage.run(context)
            except Unsupported as error:
                verdict, reason = Verdict.SKIP, str(error)
            except UnmatchedNames as error:
                verdict, reason = Verdict.DIVERGE, str(error)
            except CaptureError as error:
                verdict, reason, detail = Verdict.ERROR, str(error), error.detail
            except KeyError as error:
                reason = (
                    f"a trace lacks {error}: does the path emit what parity/paths/base.py says?"
                )
                verdict, detail = Verdict.ERROR, traceback.format_exc()
            except Exception as error:  # one broken cell must not end the run
                reason = f"{type(error).__name__} while comparing: {error}"
                verdict, detail = Verdict.ERROR, traceback.format_exc()
        if aside := context.operations_aside:
            result.findings.append(f"bits are not expected to be equal: {aside}")
        verdict, reason = (verdict, reason) if verdict else conclude(result.metrics)
        if verdict is Verdict.DIVERGE and self.repeat and result.metrics:
            verdict, reason = self._repeated(cell, context, result, reason)
        sides = {
            side: Side(
                path=getattr(cell, side),
                recipe=context.recipes[side].factors(),
                digest=context.recipes[side].digest(),
                environment=context.environments.get(side, {}),
            )
            for side in ("subject", "reference")
        }
        record = Record(
            tool=__version__,
            probe=cell.stage.number,
            stage=cell.stage.name,
            model=cell.model,
            seed=cell.recipe.seed.value,
            expectation="identical" if context.exact else "noise floor",
            verdict=verdict,
            reason=reason,
            metrics=result.metrics,
            findings=result.findings,
            hints=result.hints,
            series=result.series,
            passes=result.passes,
            facts=result.facts,
            first_divergence=first_divergence(result.metrics)
            if verdict is Verdict.DIVERGE
            else None,
            detail=detail,
            artifacts=list(context.files) if verdict is Verdict.DIVERGE else [],
            seconds=time.perf_counter() - started,
            git=content.git_state(),
            reproduce=reproduce(cell),
            **sides,
        )
        return record.model_copy(update={"hints": [*record.hints, *hints(record)]})

    def _repeated(
        self, cell: Cell, context: Context, result: Comparison, reason: str
    ) -> tuple[Verdict, str]:
        """The verdict after the subject was run once more (A/A); adds what it found."""

        def capture(side: str, method: str, recipe: Recipe, inputs: Trace) -> Trace:
            if side != "subject":
                return context.capture(side, method, recipe, inputs)
            return self._load(cell.subject, method, recipe, inputs, "-again")

        def both(method: str, recipes: Mapping[str, Recipe], inputs: Trace) -> tuple[Trace, Trace]:
            return (
                capture("subject", method, recipes["subject"], inputs),
                capture("reference", method, recipes["reference"], inputs),
            )

        try:
            again = cell.stage.run(replace(context, capture=capture, both=both))
        except (Unsupported, UnmatchedNames, CaptureError) as error:
            return Verdict.INCONCLUSIVE, f"{reason}; a repeat of the subject failed: {error}"
        values, other = ([str((m.name, m.value)) for m in r.metrics] for r in (result, again))
        if conclude(again.metrics)[0].green:
            return (
                Verdict.INCONCLUSIVE,
                f"the subject does not repeat itself: once {reason}, and once it agrees",
            )
        if values != other:
            result.findings.append("a repeat of the subject gives other numbers, and diverges too")
        return Verdict.DIVERGE, reason

    def context(self, cell: Cell) -> Context:
        """What the stage of a cell is given."""
        recipes = {
            side: cell.recipe.override(cell.changes.get(side, {}))
            for side in ("subject", "reference")
        }
        environments: dict[str, dict[str, Any]] = {}
        files: dict[str, None] = {}
        specs = {"subject": cell.subject, "reference": cell.reference, "referee": REFEREE}
        kinds = {side: resolve(specs[side]) for side in recipes}
        double = referee_of(recipes["reference"])

        def note(side: str, trace: Trace) -> Trace:
            environments.setdefault(side, dict(trace.environment))
            files.setdefault(os.path.relpath(trace.file, self.cache))
            return trace

        def capture(side: str, method: str, recipe: Recipe, inputs: Trace) -> Trace:
            return note(side, self.capture(specs[side], method, recipe, inputs))

        def both(method: str, recipes: Mapping[str, Recipe], inputs: Trace) -> tuple[Trace, Trace]:
            subject, reference = self.both(specs, method, recipes, inputs)
            return note("subject", subject), note("reference", reference)

        return Context(
            recipe=cell.recipe,
            recipes={**recipes, "referee": double},
            shipped=_Shipped(self, specs, cell.recipe),
            frameworks={side: kind.framework for side, kind in kinds.items()},
            operations={s: kind.operations.get(cell.stage.name, "") for s, kind in kinds.items()},
            environments=environments,
            files=files,
            has_referee=double != recipes["reference"],
            capture=capture,
            both=both,
        )


def referee_of(recipe: Recipe) -> Recipe:
    """The same in float64, with the weights that a half-precision run computes with."""
    half = recipe.model.dtype in ("bfloat16", "float16")
    weights = recipe.model.dtype if half else recipe.model.weights
    return recipe.override({"model.dtype": "float64", "model.weights": weights})


class _Shipped(dict[str, Recipe]):
    """Shipped recipes by side, made when first asked for: most stages never do."""

    def __init__(self, engine: Engine, specs: Mapping[str, str], recipe: Recipe) -> None:
        super().__init__()
        self._engine, self._specs, self._recipe = engine, specs, recipe

    def __missing__(self, side: str) -> Recipe:
        self[side] = self._engine.shipped(self._specs[side], self._recipe)
        return self[side]


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
