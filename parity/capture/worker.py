"""A process of its own for each path, kept alive over seeds.

The child (`python -m parity.capture.worker SPEC`) reads one JSON request a line from stdin and answers one
JSON line; arrays travel as trace files. Whatever a framework prints goes to the log, never into
the answers.
"""

from __future__ import annotations

import contextlib
import ctypes.util
import json
import os
import select
import subprocess
import sys
import time
import traceback
from collections.abc import Collection
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from parity.capture.loaded import Manifests
from parity.errors import CaptureError, UnmatchedNames, Unsupported, UsageError
from parity.recipe import Recipe, build, kind_of
from parity.trace import Trace

if TYPE_CHECKING:
    from parity.paths.protocol import TrainingPath

# Errors that mean something to the engine keep their type over the pipe.
_RAISED: dict[str, type[Exception]] = {
    kind.__name__: kind for kind in (Unsupported, UsageError, UnmatchedNames)
}
TAIL = 4000  # characters of a dead worker's stderr that go into its error


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
    if framework == "mlx":
        env.setdefault("MLX_ENABLE_TF32", "0")
        kernels = cache / "kernels"
        kernels.mkdir(parents=True, exist_ok=True)
        env["TMPDIR"] = str(kernels)
        if sys.platform == "linux" and (blas := openblas()):
            env["LD_PRELOAD"] = " ".join(filter(None, [blas, env.get("LD_PRELOAD", "")]))
    return env


def openblas() -> str | None:
    """OpenBLAS as the dynamic linker finds it, or None."""
    for folder in sorted(Path("/usr/lib").glob("*/openblas-pthread/libopenblas.so.0")):
        return str(folder)
    return ctypes.util.find_library("openblas")


class Worker:
    """The parent's end: one path in one process.

    Args:
        spec: A registered path or `package.module:Class`.
        kind: Its class, which decides the environment variables and what the process cannot import.
        cache: Shared folder for kernels and converted checkpoints.
        log: File that takes what the process prints.
        python: Interpreter to run it in.
    """

    def __init__(
        self,
        spec: str,
        kind: type[TrainingPath],
        cache: Path,
        log: Path,
        python: str = sys.executable,
    ) -> None:
        self.spec, self.log, self._knobs = spec, log, kind.knob_types()
        self.loaded = ""  # the manifest of what it has loaded, as of its last answer
        log.parent.mkdir(parents=True, exist_ok=True)
        self._stderr: IO[bytes] = log.open("ab")
        self._process = subprocess.Popen(
            [python, "-m", "parity.capture.worker", spec, str(cache), *kind.hidden],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=environment(kind.framework, cache),
        )

    @property
    def alive(self) -> bool:
        """Whether the process can take another request."""
        return self._process.poll() is None

    def call(self, method: str, recipe: Recipe, inputs: Path, output: Path, timeout: float) -> str:
        """Carries out one stage; the trace lies at `output` afterwards.

        Returns:
            The digest of the manifest of what the process has loaded (see `parity.capture.loaded`).

        Raises:
            Unsupported: The path cannot do it.
            CaptureError: It failed, died or ran past `timeout` seconds.
        """
        request = {
            "method": method,
            "recipe": recipe.with_knobs(self._knobs).model_dump(mode="json"),
            "inputs": str(inputs),
            "output": str(output),
        }
        stdin = self._process.stdin
        assert stdin is not None
        try:
            stdin.write(json.dumps(request).encode() + b"\n")
            stdin.flush()
            answer = json.loads(self._read_line(timeout))
        except TimeoutError:
            self.kill()
            raise CaptureError(
                f"path {self.spec!r} took longer than {timeout:g} s in {method}: "
                "raise --timeout or make the recipe smaller",
                self.tail(),
            ) from None
        except (OSError, ValueError) as error:
            # A process may die at shutdown with its work done: what it wrote counts.
            code = self._wait()
            raise CaptureError(
                f"worker of path {self.spec!r} died ({_describe(code)}) in {method}",
                self.tail() or str(error),
            ) from None
        for status, kind in _RAISED.items():
            if answer["status"] == status:
                raise kind(answer["message"])
        if answer["status"] != "ok":
            raise CaptureError(f"path {self.spec!r}: {answer['message']}", answer["detail"])
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

    def close(self) -> None:
        """Lets the process end by itself, then ends it."""
        if self._process.stdin:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
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


def serve(spec: str, cache: Path, hidden: Collection[str] = ()) -> None:
    """The child's loop: requests from stdin until it closes."""
    hide(hidden)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what frameworks print must not end up among the answers
    sys.stdout = sys.stderr
    path: Any = None
    manifests = Manifests(cache)
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, str] = {"status": "ok"}
        try:
            if path is None:
                from parity.paths import demands
                from parity.paths.contract import METHODS
                from parity.paths.registry import resolve

                path = resolve(spec)(cache)
            started = time.perf_counter()
            kind, method = type(path), METHODS[request["method"]]
            recipe = build(request["recipe"], "request", kind_of(kind.knob_types()))
            inputs = Trace.load(Path(request["inputs"]))
            dimensions = method.check_inputs(inputs)
            demands.check(kind, method.name, recipe, inputs)
            trace = path.emit(method.name, recipe, inputs)
            method.check_outputs(trace, dimensions)
            trace.environment = {
                **path.environment(),
                "seconds": time.perf_counter() - started,
                "pid": os.getpid(),
                # Which code ran, as the process itself reports.
                "code": f"{kind.__module__}:{kind.__qualname__}",
            }
            trace.save(Path(request["output"]))
            answer["loaded"] = manifests.write()
        except tuple(_RAISED.values()) as error:
            answer = {"status": type(error).__name__, "message": str(error)}
        except Exception as error:
            answer = {
                "status": "error",
                "message": f"{type(error).__name__} in {request['method']}: {error}",
                "detail": traceback.format_exc()[-TAIL:],
            }
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
