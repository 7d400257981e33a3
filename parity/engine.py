"""Runs cells: captures from worker processes, cached by content, compared into records."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache as memoized
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from filelock import FileLock

from parity import __version__, resources
from parity.errors import CaptureError, UnmatchedNames, Unsupported, UsageError
from parity.paths.base import resolve
from parity.recipe import DEFAULT, Recipe, load
from parity.record import Metric, Record, Side, Verdict, worst
from parity.stages.base import Comparison, Context, Stage
from parity.trace import Trace
from parity.worker import Worker, openblas

TIMEOUT = 600.0  # seconds a capture may take
REFEREE = "hf"  # the path that runs in float64
PINNED = (
    "model.", "data.source", "seed.value", "optim.lr", "train.steps", "train.batch_size", "decode.",
)  # fmt: skip
"""What a user always says; every other factor is left to the path when it runs as shipped."""


@dataclass(frozen=True)
class Cell:
    """One probe for one subject, one reference and one seed.

    Attributes:
        recipe: What both share.
        changes: Factors changed on one side: side to name to value.
        origin: The name or file that the recipe was read from.
    """

    stage: Stage
    subject: str
    reference: str
    recipe: Recipe
    changes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    origin: str = DEFAULT

    @property
    def model(self) -> str:
        """Short name of the model."""
        return Path(self.recipe.model.source).name

    @property
    def id(self) -> str:
        """What pytest shows and `-k` selects."""
        seed = self.recipe.seed.value
        return f"{self.model}-{self.subject}-vs-{self.reference}-seed{seed}"


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

    # Captures ----------------------------------------------------------------------------------

    def capture(self, spec: str, method: str, recipe: Recipe, inputs: Trace) -> Trace:
        """Runs one method of one path, or finds what it gave before.

        Raises:
            Unsupported: The path cannot do it.
            UnmatchedNames: What was handed over does not fit the path's tensors by name.
            CaptureError: It failed.
        """
        key = hashlib.sha256(
            "\n".join([fingerprint(spec), method, _content(recipe), inputs.digest()]).encode()
        ).hexdigest()[:24]
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
                self._worker(spec).call(method, recipe, source, file, self.timeout)
                self.captured += 1
        finally:
            source.unlink(missing_ok=True)

    def _worker(self, spec: str) -> Worker:
        worker = self._workers.get(spec)
        if worker is None or not worker.alive:
            if worker is not None:
                worker.close()
            log = self.log_dir / f"{spec.replace(':', '_')}-{os.getpid()}.log"
            worker = Worker(spec, resolve(spec).framework, self.cache, log)
            self._workers[spec] = worker
        return worker

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
        recipes = {
            side: cell.recipe.override(cell.changes.get(side, {}))
            for side in ("subject", "reference")
        }
        seen: dict[str, dict[str, Any]] = {"subject": {}, "reference": {}}
        result, verdict, reason, detail = Comparison(), None, "", ""
        context = self._context(cell, recipes, seen)
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
        verdict, reason = (verdict, reason) if verdict else conclude(result.metrics)
        sides = {
            side: Side(
                path=getattr(cell, side),
                recipe=recipes[side].factors(),
                digest=recipes[side].digest(),
                environment=seen[side],
            )
            for side in recipes
        }
        return Record(
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
            first_divergence=_first(result.metrics) if verdict is Verdict.DIVERGE else None,
            detail=detail,
            seconds=time.perf_counter() - started,
            git=_git(),
            reproduce=reproduce(cell),
            **sides,
        )

    def _context(
        self, cell: Cell, recipes: Mapping[str, Recipe], seen: dict[str, dict[str, Any]]
    ) -> Context:
        specs = {"subject": cell.subject, "reference": cell.reference, "referee": REFEREE}
        frameworks = {side: resolve(specs[side]).framework for side in recipes}
        double = recipes["reference"].override({"model.dtype": "float64"})

        def note(side: str, trace: Trace) -> Trace:
            if side in seen and not seen[side]:
                seen[side] = dict(trace.environment)
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
            frameworks=frameworks,
            has_referee=double != recipes["reference"],
            capture=capture,
            both=both,
        )


class _Shipped(dict[str, Recipe]):
    """Shipped recipes by side, made when first asked for: most stages never do."""

    def __init__(self, engine: Engine, specs: Mapping[str, str], recipe: Recipe) -> None:
        super().__init__()
        self._engine, self._specs, self._recipe = engine, specs, recipe

    def __missing__(self, side: str) -> Recipe:
        self[side] = self._engine.shipped(self._specs[side], self._recipe)
        return self[side]


def conclude(metrics: list[Metric]) -> tuple[Verdict, str]:
    """The verdict of a record and its sentence, from the metrics that gate."""
    gates = [metric for metric in metrics if metric.gate]
    verdict = worst([metric.verdict for metric in gates])
    if not gates:
        return verdict, "nothing was compared"
    bad = [metric for metric in gates if metric.verdict is verdict]
    if verdict is Verdict.IDENTICAL:
        return verdict, f"all {len(gates)} metrics are equal bit for bit"
    if verdict is Verdict.AGREE:
        top = max(bad, key=lambda m: m.value / m.tolerance if m.tolerance > 0 else 0.0)
        if top.tolerance > 0:
            share = f"{top.value:.3g} of {top.tolerance:.3g} allowed"
            return (
                verdict,
                f"all {len(gates)} metrics within their floors; closest: {top.name}, {share}",
            )
        return verdict, f"all {len(gates)} metrics agree"
    first = bad[0]
    if first.note and first.where == first.name:  # a sentence of its own, as of the config
        return verdict, first.note
    where = f" at {first.where}" if first.where and not first.where.startswith(first.name) else ""
    return verdict, f"{first.name}{where}" + (f": {first.note}" if first.note else "")


def _first(metrics: list[Metric]) -> dict[str, Any] | None:
    for metric in metrics:
        if metric.gate and metric.verdict is Verdict.DIVERGE:
            return {"metric": metric.name, "where": metric.where, "step": metric.step}
    return None


def reproduce(cell: Cell) -> str:
    """The command line that runs this cell again."""
    words = [
        f"parity run --probes {cell.stage.number:02d} --subject {cell.subject}",
        f"--reference {cell.reference} --seeds {cell.recipe.seed.value},",
    ]
    if cell.origin != DEFAULT:
        words.append(f"--recipe {cell.origin}")
    named = load(cell.origin).override({"seed.value": cell.recipe.seed.value})
    for name, (value, _) in cell.recipe.difference(named).items():
        words.append(f"--set {_setting(name, value)}")
    for side, changes in cell.changes.items():
        words += [f"--set-{side} {_setting(name, value)}" for name, value in changes.items()]
    return " ".join(words)


def _setting(name: str, value: Any) -> str:
    # Bare words are read as strings; everything else is TOML, of which JSON's values are a part.
    plain = isinstance(value, str) and re.fullmatch(r"[A-Za-z_][\w./-]*", value)
    return shlex.quote(f"{name}={value if plain else json.dumps(value, ensure_ascii=False)}")


def _content(recipe: Recipe) -> str:
    """A recipe's factors and the state of the files that it names."""
    model = resources.fingerprint(resources.model_dir(recipe.model.source))
    data = resources.fingerprint(resources.data_dir(recipe.data.source))
    return f"{recipe.digest()} {model} {data}"


@memoized
def fingerprint(spec: str) -> str:
    """Content key of a path: its code, its packages' versions, what its process is given."""
    kind = resolve(spec)
    versions = []
    for package in kind.packages:
        try:
            versions.append(f"{package}={version(package)}")
        except PackageNotFoundError:
            versions.append(f"{package}=none")
    module = sys.modules[kind.__module__].__file__
    own = Path(module).read_bytes() if module else b""
    variables = {
        k: v
        for k, v in os.environ.items()
        if k.startswith(("MLX_", "PARITY_TORCH", "OMP_", "OPENBLAS_"))
    }
    parts = [spec, sys.version, *versions, str(openblas()), json.dumps(variables, sort_keys=True)]
    code = _package_code() + hashlib.sha256(own).hexdigest()
    return hashlib.sha256("\n".join([*parts, code]).encode()).hexdigest()[:16]


@memoized
def _package_code() -> str:
    """Hash of the code that runs inside workers."""
    root = Path(__file__).parent
    files = [
        *sorted((root / "paths").glob("*.py")),
        root / "recipe.py",
        root / "worker.py",
        root / "trace.py",
    ]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


@memoized
def _git() -> str:
    """Commit of the working directory, marked when it has changes; empty outside a repository."""
    try:
        out = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True, text=True, timeout=10, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return out.stdout.strip()


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
