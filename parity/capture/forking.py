"""Workers forked from a process that has its libraries imported: a start takes milliseconds.

Whoever first needs one keeps, for itself and for every process that it starts, a *parent* for each set of
libraries and variables. It imports them, computes nothing, and forks a worker when one is asked for; what
was imported is in memory once. On Linux alone, and only while the parent has a single thread and no GPU:
what threads or a device hold does not survive a fork.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING

from filelock import FileLock

from parity import timing

if TYPE_CHECKING:
    from parity.capture.pool import Group

VARIABLE = "PARITY_PRELOADED"
"""Folder of the parents' sockets, set for all processes below its owner; empty: nothing is forked."""
PASSED_ON = ("TMPDIR", "PWD", "OLDPWD", "SHLVL", "_", "PARITY_CACHE", timing.VARIABLE, VARIABLE)
"""Variables that no library reads while it is imported: a worker has its own."""
OWNER = "owner"
_LOST = 255  # exit code of a process whose parent has ended, so that nobody knows


class Forked:
    """A forked worker: as much of `subprocess.Popen` as a worker's owner needs."""

    def __init__(self, connection: socket.socket, stdin: IO[bytes], stdout: IO[bytes]) -> None:
        self._connection, self.stdin, self.stdout = connection, stdin, stdout
        self._text = b""
        self.returncode: int | None = None

    @property
    def pid(self) -> int:
        """Its number; waits until it is forked. 0 where it never was."""
        while b"\n" not in self._text and self._receive(None):
            pass
        return int(self._text.partition(b"\n")[0] or 0)

    def poll(self) -> int | None:
        """Its exit code (negative: a signal), None while it lives."""
        while self.returncode is None and self._receive(0):
            pass
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The same, once it has ended.

        Raises:
            subprocess.TimeoutExpired: It lives longer.
        """
        until = None if timeout is None else time.monotonic() + timeout
        while self.returncode is None:
            left = None if until is None else max(until - time.monotonic(), 0.0)
            if not self._receive(left) and self.returncode is None:
                raise subprocess.TimeoutExpired("a forked worker", timeout or 0.0)
        return self.returncode

    def kill(self) -> None:
        """Ends it at once; one that is not forked yet finds its input closed."""
        self.poll()
        if self.returncode is not None:
            return
        if b"\n" in self._text:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            return
        self.stdin.close()
        self._end(-signal.SIGKILL)

    def _receive(self, timeout: float | None) -> bool:
        """Whether anything came."""
        if self.returncode is not None or not select.select([self._connection], [], [], timeout)[0]:
            return False
        try:
            more = self._connection.recv(4096)
        except OSError:
            more = b""
        self._text += more
        lines = self._text.split(b"\n")
        if len(lines) > 2:
            self._end(os.waitstatus_to_exitcode(int(lines[1])))
        elif not more:
            self._end(_LOST)
        return True

    def _end(self, code: int) -> None:
        self.returncode = code
        self._connection.close()


def forked(group: Group, cache: Path, stderr: IO[bytes], env: Mapping[str, str]) -> Forked | None:
    """A worker forked from a parent that has the libraries of a group; None where nothing can be forked.

    Other interpreters than this one serve a release each: for them no parent is kept.

    Args:
        group: The paths that it may serve.
        cache: Shared folder for kernels and converted checkpoints.
        stderr: What the worker prints goes here.
        env: Its environment variables.
    """
    if group.python != sys.executable or os.environ.get(VARIABLE) == "" or not _can_fork():
        return None
    with contextlib.ExitStack() as passed, contextlib.ExitStack() as kept:
        reader, stdin = (
            os.fdopen(fd, mode) for fd, mode in zip(os.pipe(), ("rb", "wb"), strict=True)
        )
        stdout, writer = (
            os.fdopen(fd, mode) for fd, mode in zip(os.pipe(), ("rb", "wb"), strict=True)
        )
        for ours, stack in ((stdin, kept), (stdout, kept), (reader, passed), (writer, passed)):
            stack.enter_context(ours)
        request = {"cache": str(cache), "env": dict(env), "folder": str(Path.cwd())}
        text = json.dumps(request).encode() + b"\n"
        try:
            connection = _connected([group.framework, *group.hidden], env)
            kept.enter_context(connection)
            streams = [reader.fileno(), writer.fileno(), stderr.fileno()]
            connection.sendall(text[socket.send_fds(connection, [text], streams) :])
        except OSError:
            return None
        kept.pop_all()
        return Forked(connection, stdin, stdout)


@functools.cache
def _can_fork() -> bool:
    """Whether this is Linux with what a parent needs: `/proc`, and news of the end of a process."""
    if sys.platform != "linux":
        return False
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError:
        return False
    return Path("/proc/self/task").exists()


def folder() -> Path:
    """Where the parents of this process and of those below it are found."""
    known = os.environ.get(VARIABLE)
    if known and Path(known, OWNER).exists():
        return Path(known)
    made = Path(tempfile.mkdtemp(prefix="parity-"))
    (made / OWNER).write_text(str(os.getpid()))
    os.environ[VARIABLE] = str(made)
    atexit.register(_end_all, made, os.getpid())
    return made


def _end_all(made: Path, owner: int) -> None:
    if os.getpid() == owner:
        for place in made.glob("*.socket"):
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
                connection.connect(str(place))
                connection.sendall(b"null\n")
        for process in _STARTED:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=1)
        shutil.rmtree(made, ignore_errors=True)


def _connected(words: list[str], env: Mapping[str, str]) -> socket.socket:
    """A connection to the parent for these words and variables, which is started if there is none."""
    read = {n: v for n, v in env.items() if n not in PASSED_ON and not n.startswith("PYTEST_")}
    found = json.dumps([words, sys.executable, _shadowing(Path.cwd()), sorted(read.items())])
    place = folder() / f"{hashlib.sha256(found.encode()).hexdigest()[:16]}.socket"
    connection = socket.socket(socket.AF_UNIX)
    with FileLock(f"{place}.lock"):
        try:
            connection.connect(str(place))
        except OSError:  # there is none yet, or it has ended
            place.unlink(missing_ok=True)
            _start(place, words, env)
            connection.connect(str(place))
    return connection


def _shadowing(here: Path) -> str:
    """The working directory, if what lies in it comes before what is installed."""
    names = os.listdir(here)  # noqa: PTH208
    own = any(n.endswith((".py", ".so")) or (here / n / "__init__.py").exists() for n in names)
    return str(here) if own else ""


def _start(place: Path, words: list[str], env: Mapping[str, str]) -> None:
    with socket.socket(socket.AF_UNIX) as listener, place.with_suffix(".log").open("ab") as log:
        listener.bind(str(place))
        listener.listen(64)
        owner = (place.parent / OWNER).read_text()
        framework, *hidden = words
        _STARTED.append(
            subprocess.Popen(
                [sys.executable, "-m", "parity.capture.preloaded", framework, str(listener.fileno()), owner,
                 str(place.parent), *hidden],
                pass_fds=[listener.fileno()], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env={**env, timing.VARIABLE: ""}, start_new_session=True,
            )
        )  # fmt: skip


_STARTED: list[subprocess.Popen[bytes]] = []  # kept: who forgets a process is warned of it
