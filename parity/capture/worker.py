"""The owner's end of a process that carries out methods of paths, kept alive over seeds and paths."""

from __future__ import annotations

import contextlib
import ctypes.util
import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING

from parity import timing
from parity.capture.forking import Forked, forked
from parity.capture.serving import RAISED, TAIL
from parity.errors import CaptureError, UsageError
from parity.recipe import Recipe

if TYPE_CHECKING:
    from parity.capture.pool import Group

OPENBLAS = "PARITY_OPENBLAS"
"""Names the library that MLX workers preload on Linux; empty: none."""


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
        forks: Whether it may be forked from a process that has its libraries.
    """

    def __init__(self, group: Group, cache: Path, log: Path, forks: bool = True) -> None:
        self.group, self.log = group, log
        self.spec = ""  # the path that it served last
        self.loaded = ""  # the manifest of what it has loaded, as of its last answer
        self.changed: list[str] = []  # what the last call left otherwise than it found it
        log.parent.mkdir(parents=True, exist_ok=True)
        self._stderr: IO[bytes] = log.open("ab")
        env = environment(group.framework, cache)
        self._process: subprocess.Popen[bytes] | Forked = (
            forked(group, cache, self._stderr, env) if forks else None
        ) or subprocess.Popen(
            [
                group.python,
                "-m",
                "parity.capture.serving",
                group.framework,
                str(cache),
                *group.hidden,
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=env,
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
        for status, kind in RAISED.items():
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
