"""The process that makes tiny models; it is started again when it dies or hangs."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO, Any

TIMEOUT = 120.0
"""Seconds that one request may take."""
COMMAND = (sys.executable, "-m", "parity.paths.hf.tiny")


class NotMade(Exception):
    """transformers does not make this model; the message says why."""


class Maker:
    """Asks the process for models; see `parity.paths.hf.tiny` for what it can do.

    Args:
        log: File that takes what it prints.
    """

    def __init__(self, log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._closed, self._lock = False, threading.Lock()

    def ask(self, operation: str, **arguments: Any) -> dict[str, Any]:
        """What an operation gives.

        Raises:
            NotMade: It failed, died, ran out of time or is closed.
        """
        process = self._started()
        stdin, stdout = process.stdin, process.stdout
        assert stdin is not None and stdout is not None
        line = b""
        with contextlib.suppress(OSError):
            stdin.write(json.dumps({"do": operation, **arguments}).encode() + b"\n")
            stdin.flush()
            line = _line(stdout, TIMEOUT)
        if not line:
            hung = process.poll() is None
            with self._lock:
                self._kill()
            why = f"took longer than {TIMEOUT:g} s" if hung else f"died (code {process.returncode})"
            raise NotMade(f"the process that makes it {why}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise NotMade(answer["error"])
        found: dict[str, Any] = answer["ok"]
        return found

    def _started(self) -> subprocess.Popen[bytes]:
        with self._lock:  # it may be closed by another thread, and then none is started any more
            if self._closed:
                raise NotMade("the process that makes it was ended")
            if self._process is None or self._process.poll() is not None:
                self._kill()
                env = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
                with self.log.open("ab") as errors:
                    self._process = subprocess.Popen(
                        COMMAND,
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=errors,
                        env=env,
                    )
            return self._process

    def close(self) -> None:
        """Ends the process for good."""
        with self._lock:
            self._closed = True
            self._kill()

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                if stream is not None:
                    with contextlib.suppress(OSError):
                        stream.close()
            self._process = None

    def __enter__(self) -> Maker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _line(stream: IO[bytes], seconds: float) -> bytes:
    ready, _, _ = select.select([stream], [], [], seconds)
    return stream.readline() if ready else b""
