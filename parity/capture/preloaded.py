"""The process that workers are forked from (see `parity.capture.forking`).

`python -m parity.capture.preloaded FRAMEWORK LISTENER OWNER FOLDER` takes one JSON request a connection,
with the three standard streams of the worker, and answers the process's number and, when it has ended, its
exit status. It ends with its owner.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import shutil
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from parity import timing
from parity.capture.loaded import Manifests, restarted
from parity.capture.serving import hide, imported, serve


class _Parent:
    """The process that has the libraries."""

    def __init__(self, framework: str, hidden: list[str]) -> None:
        self._framework, self._hidden = framework, hidden
        began = time.monotonic()
        self._lacking = imported(framework)
        self._span = (began, time.monotonic())
        self._looked: Manifests | None = None
        self._children: dict[int, tuple[int, socket.socket]] = {}  # by what tells of their end

    def serve(self, listener: socket.socket, owner: int) -> None:
        """Forks a worker for each connection, until the owner is gone or says so."""
        while _alive(owner):
            watched = [listener.fileno(), *self._children]
            for one in select.select(watched, [], [], 1.0)[0]:
                if one == listener.fileno():
                    connection = listener.accept()[0]
                    text, streams, _, _ = socket.recv_fds(connection, 1 << 20, 3)
                    while not text.endswith(b"\n") and (more := connection.recv(1 << 20)):
                        text += more
                    if not (request := json.loads(text or b"null")):
                        return
                    self._fork(request, streams, connection, listener)
                else:
                    self._ended(one)

    def _fork(
        self, request: dict[str, Any], streams: list[int], connection: socket.socket,
        listener: socket.socket,
    ) -> None:  # fmt: skip
        if self._looked is None:
            self._looked = Manifests(Path(request["cache"]))
            self._looked.look()
        # Its libraries were edited, or it has threads by now: then a fresh process is right.
        fresh = not self._looked.unchanged() or len(os.listdir("/proc/self/task")) > 1  # noqa: PTH208
        if pid := os.fork():
            for stream in streams:
                os.close(stream)
            self._children[os.pidfd_open(pid)] = pid, connection
            with contextlib.suppress(OSError):
                connection.sendall(f"{pid}\n".encode())
            return
        code = 1
        try:
            listener.close()
            connection.close()
            for end, (_, other) in self._children.items():
                os.close(end)
                other.close()
            self._become(request, streams)
            if fresh:
                words = [sys.executable, "-m", "parity.capture.serving", self._framework]
                os.execv(sys.executable, [*words, request["cache"], *self._hidden])
            profile = timing.of_worker()
            if profile:
                lane = timing.lane_of_thread()
                profile.add([timing.Span(lane, timing.IMPORT, self._framework, *self._span)])
            serve(Path(request["cache"]), self._lacking, profile, self._looked)
            code = 0
        except SystemExit as error:  # whoever leaves has said why: a traceback is not the last word
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
            if isinstance(error.code, str):
                print(error.code, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(BaseException):
                atexit._run_exitfuncs()
            os._exit(code)

    @staticmethod
    def _become(request: dict[str, Any], streams: list[int]) -> None:
        """A worker with streams, variables and a folder of its own."""
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        os.environ.clear()
        os.environ.update(request["env"])
        os.chdir(request["folder"])
        sys.path[0] = request["folder"]
        tempfile.tempdir = None
        restarted()

    def _ended(self, end: int) -> None:
        pid, connection = self._children.pop(end)
        status = os.waitpid(pid, 0)[1]
        os.close(end)
        with contextlib.suppress(OSError):  # nobody asks any more
            connection.sendall(f"{status}\n".encode())
        connection.close()


def _alive(owner: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(owner, 0)
        return True
    return False


if __name__ == "__main__":
    framework, listener, owner, place, *hidden = sys.argv[1:]
    hide(hidden)
    try:
        with socket.socket(fileno=int(listener)) as listening:
            _Parent(framework, hidden).serve(listening, int(owner))
    finally:
        if not _alive(int(owner)):
            shutil.rmtree(place, ignore_errors=True)
        os._exit(0)
