"""A process that carries out methods of paths, kept alive over seeds and paths.

The child (`python -m parity.capture.worker FRAMEWORK CACHE`) reads one JSON request a line from stdin and answers
one JSON line; arrays travel as trace files. Whatever a framework prints goes to the log, never into
the answers.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes.util
import json
import os
import select
import subprocess
import sys
import time
import traceback
from collections import OrderedDict
from collections.abc import Collection
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from parity import timing
from parity.capture import machine
from parity.capture.footprint import Footprint, restart_generators
from parity.capture.loaded import Manifests
from parity.errors import CaptureError, UnmatchedNames, Unsupported, UsageError
from parity.recipe import Recipe, build, kind_of
from parity.trace import Trace

if TYPE_CHECKING:
    from parity.capture.pool import Group
    from parity.paths.protocol import TrainingPath

# Errors that mean something to the engine keep their type over the pipe.
_RAISED: dict[str, type[Exception]] = {
    kind.__name__: kind for kind in (Unsupported, UsageError, UnmatchedNames)
}
OPENBLAS = "PARITY_OPENBLAS"
"""Names the library that MLX workers preload on Linux; empty: none."""
TAIL = 4000  # characters of a dead worker's stderr that go into its error
KEPT = 4  # paths that a worker keeps, each with a model


def environment(framework: str, cache: Path) -> dict[str, str]:
    """Environment variables of a worker.

    One BLAS thread a worker: two workers share the machine's cores. MLX's wheel for Linux links
    the reference BLAS; preloading OpenBLAS makes float32 matmul 20 to 100 times faster. MLX keeps
    compiled kernels under TMPDIR, which therefore must outlive the process.
    """
    env = dict(os.environ)
    env.setdefault("OPENBLAS_NUM_THREADS", "1")
    env.setdefault("OMP_NUM_THREADS", "1")
    env.setdefault("TOKENIZERS_PARALLELISM", "false")
    env["PYTHONUNBUFFERED"] = "1"
    if timing.VARIABLE in env:
        env[timing.VARIABLE] = str(time.monotonic())
    if framework == "mlx":
        env.setdefault("MLX_ENABLE_TF32", "0")
        kernels = cache / "kernels"
        kernels.mkdir(parents=True, exist_ok=True)
        env["TMPDIR"] = str(kernels)
        if sys.platform == "linux" and (blas := openblas()):
            env["LD_PRELOAD"] = " ".join(filter(None, [blas, env.get("LD_PRELOAD", "")]))
    return env


def openblas() -> str | None:
    """The library that MLX workers preload: OpenBLAS as the dynamic linker finds it, or the variable's.

    Raises:
        UsageError: The variable names no file.
    """
    if (named := os.environ.get(OPENBLAS)) is not None:
        if named and not Path(named).is_file():
            raise UsageError(
                f"{OPENBLAS} {named!r} is no file: give a shared library, or nothing to preload none"
            )
        return str(Path(named).resolve()) if named else None
    for folder in sorted(Path("/usr/lib").glob("*/openblas-pthread/libopenblas.so.0")):
        return str(folder)
    return ctypes.util.find_library("openblas")


class Worker:
    """The parent's end of a process.

    Args:
        group: The paths that it may serve.
        cache: Shared folder for kernels and converted checkpoints.
        log: File that takes what the process prints.
    """

    def __init__(self, group: Group, cache: Path, log: Path) -> None:
        self.group, self.log = group, log
        self.spec = ""  # the path that it served last
        self.loaded = ""  # the manifest of what it has loaded, as of its last answer
        self.changed: list[str] = []  # what the last call left otherwise than it found it
        log.parent.mkdir(parents=True, exist_ok=True)
        self._stderr: IO[bytes] = log.open("ab")
        self._process = subprocess.Popen(
            [
                group.python,
                "-m",
                "parity.capture.worker",
                group.framework,
                str(cache),
                *group.hidden,
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=environment(group.framework, cache),
        )

    @property
    def alive(self) -> bool:
        """Whether the process can take another request."""
        return self._process.poll() is None

    def call(
        self,
        spec: str,
        target: str,
        method: str,
        recipe: Recipe,
        inputs: Path,
        output: Path,
        timeout: float,
    ) -> str:
        """Carries out one method of a path; the trace lies at `output` afterwards.

        Args:
            spec: The path, as it is named in errors.
            target: The same, as the process can resolve it.
            method: A method of the contract.
            recipe: With the knobs of the path.
            inputs: File of what it is handed.
            output: File of what it gives.
            timeout: Seconds that it may take.

        Returns:
            The digest of the manifest of what the process has loaded (see `parity.capture.loaded`).

        Raises:
            Unsupported: The path cannot do it.
            CaptureError: It failed, died or ran past `timeout` seconds.
        """
        self.spec, self.changed = spec, []
        request = {
            "path": target,
            "method": method,
            "recipe": recipe.model_dump(mode="json"),
            "inputs": str(inputs),
            "output": str(output),
        }
        stdin = self._process.stdin
        assert stdin is not None
        try:
            stdin.write(json.dumps(request).encode() + b"\n")
            stdin.flush()
            answer = json.loads(self._read_line(timeout))
            lane = f"{self.group.alone or self.group.framework} ({self._process.pid})"
            timing.report(lane, answer.get("spans", ()))
        except TimeoutError:
            self.kill()
            raise CaptureError(
                f"path {spec!r} took longer than {timeout:g} s in {method}: "
                "raise --timeout or make the recipe smaller",
                self.tail(),
            ) from None
        except (OSError, ValueError) as error:
            # A process may die at shutdown with its work done: what it wrote counts.
            code = self._wait()
            raise CaptureError(
                f"worker of path {spec!r} died ({_describe(code)}) in {method}",
                self.tail() or str(error),
            ) from None
        self.changed = answer.get("changed", [])
        for status, kind in _RAISED.items():
            if answer["status"] == status:
                raise kind(answer["message"])
        if answer["status"] != "ok":
            raise CaptureError(f"path {spec!r}: {answer['message']}", answer["detail"])
        self.loaded = str(answer["loaded"])
        return self.loaded

    def _read_line(self, timeout: float) -> bytes:
        stdout = self._process.stdout
        assert stdout is not None
        ready, _, _ = select.select([stdout], [], [], timeout)
        if not ready:
            raise TimeoutError
        return stdout.readline()

    def _wait(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(timeout=10)
        self.kill()
        return None

    def tail(self) -> str:
        """The end of what the process printed."""
        text = self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""
        return text[-TAIL:]

    def kill(self) -> None:
        """Ends the process at once."""
        self._process.kill()
        self._process.wait()

    def finish(self) -> None:
        """Tells the process that no request will come; it ends by itself."""
        if self._process.stdin:
            with contextlib.suppress(OSError):
                self._process.stdin.close()

    def close(self) -> None:
        """Lets the process end by itself, then ends it."""
        self.finish()
        self._wait()
        if self._process.stdout:
            self._process.stdout.close()
        self._stderr.close()


def _describe(code: int | None) -> str:
    if code is None:
        return "it had to be killed"
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def hide(packages: Collection[str]) -> None:
    """Makes packages look as if they were not installed, for this process."""
    from importlib.machinery import PathFinder

    class Hiding(PathFinder):
        @classmethod
        def find_spec(cls, name: str, path: Any = None, target: Any = None) -> Any:
            if name.partition(".")[0] in packages:
                return None
            return super().find_spec(name, path, target)

    sys.meta_path[sys.meta_path.index(PathFinder)] = Hiding


def serve(framework: str, cache: Path, hidden: Collection[str] = ()) -> None:
    """The child's loop: requests from stdin until it closes.

    Args:
        framework: Its libraries are imported before the code of any path.
        cache: Shared folder for kernels and converted checkpoints.
        hidden: Packages that cannot be imported.
    """
    hide(hidden)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what frameworks print must not end up among the answers
    sys.stdout = sys.stderr
    from parity.paths.registry import prepare

    paths: OrderedDict[str, TrainingPath] = OrderedDict()
    manifests = Manifests(cache)
    before: Footprint | None = None
    profile = timing.of_worker()
    # Before anything is asked: who starts a process ahead of its need finds it ready.
    lacking: Exception | None = None
    try:
        with timing.span(timing.IMPORT, framework):
            prepare(framework)
        before = Footprint()
    except Exception as error:
        lacking = error
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any] = {"status": "ok"}
        try:
            if lacking:
                raise lacking
            path = _path(request["path"], cache, paths)
            restart_generators()
            _carry_out(path, request)
            with timing.span(timing.WRITE, "manifest"):
                answer["loaded"] = manifests.write()
        except tuple(_RAISED.values()) as error:
            status = next(name for name, kind in _RAISED.items() if isinstance(error, kind))
            answer = {"status": status, "message": str(error)}
        except Exception as error:
            answer = {
                "status": "error",
                "message": f"{type(error).__name__} in {request['method']}: {error}",
                "detail": traceback.format_exc()[-TAIL:],
            }
            # What broke off in the middle may have left anything in its model.
            paths.pop(request["path"], None)
        with timing.span(timing.COMPARE, "footprint of the process"):
            after = Footprint()
        answer["changed"] = before.changed(after) if before else []
        before = after
        if profile:
            answer["spans"] = profile.take()
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _path(spec: str, cache: Path, kept: OrderedDict[str, TrainingPath]) -> TrainingPath:
    """The path of a request; of those that were served before the last few are kept."""
    from parity.paths.registry import resolve

    if spec not in kept:
        kept[spec] = resolve(spec)(cache)
    kept.move_to_end(spec)
    while len(kept) > KEPT:
        kept.popitem(last=False)
    return kept[spec]


def _carry_out(path: TrainingPath, request: dict[str, Any]) -> None:
    """One method of a path; what goes in and what comes out is held against the contract."""
    from parity.paths import demands
    from parity.paths.contract import METHODS

    started = time.perf_counter()
    kind, method = type(path), METHODS[request["method"]]
    recipe = build(request["recipe"], "request", kind_of(kind.knob_types()))
    with timing.span(timing.READ, "inputs"):
        inputs = Trace.load(Path(request["inputs"]))
    dimensions = method.check_inputs(inputs)
    demands.check(kind, method.name, recipe, inputs)
    with timing.capture(method.name):
        trace = path.emit(method.name, recipe, inputs)
    method.check_outputs(trace, dimensions)
    trace.environment = {
        **path.environment(),
        "seconds": time.perf_counter() - started,
        "pid": os.getpid(),
        machine.PEAK_MEMORY: machine.peak_memory(),
        # Which code ran, as the process itself reports.
        "code": f"{kind.__module__}:{kind.__qualname__}",
    }
    with timing.span(timing.WRITE, "capture"):
        trace.save(Path(request["output"]))


if __name__ == "__main__":
    code = [1]
    # What is registered first runs last: taking the libraries of a framework down takes up to a second,
    # and on a Mac may kill the process.
    atexit.register(lambda: os._exit(code[0]))
    serve(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
    code[0] = 0
