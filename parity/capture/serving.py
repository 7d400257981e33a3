"""What a worker process does: one JSON request a line from stdin, one JSON line as the answer.

`python -m parity.capture.serving FRAMEWORK CACHE`. Arrays travel as trace files. Whatever a framework
prints goes to the log, never into the answers.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import sys
import time
import traceback
from collections import OrderedDict
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parity import timing
from parity.capture import machine
from parity.capture.footprint import Footprint, restart_generators
from parity.capture.loaded import Manifests
from parity.errors import UnmatchedNames, Unsupported, UsageError
from parity.recipe import build, kind_of
from parity.trace import Trace

if TYPE_CHECKING:
    from parity.paths.protocol import TrainingPath

# Errors that mean something to the engine keep their type over the pipe.
RAISED: dict[str, type[Exception]] = {
    kind.__name__: kind for kind in (Unsupported, UsageError, UnmatchedNames)
}
TAIL = 4000  # characters that are reported of a traceback, and of what a dead worker printed
KEPT = 4  # paths that a worker keeps, each with a model


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


def imported(framework: str) -> Exception | None:
    """Imports what all paths on a framework use; why it could not."""
    from parity.paths.registry import prepare

    # What is imported stays: looking for garbage in it takes a fifth of torch's import, and forked
    # processes would copy what is shared.
    gc.disable()
    try:
        with timing.span(timing.IMPORT, framework):
            prepare(framework)
    except Exception as error:
        return error
    finally:
        gc.freeze()
        gc.enable()
    return None


def serve(
    cache: Path,
    lacking: Exception | None,
    profile: timing.Timeline | None,
    loaded: Manifests | None = None,
) -> None:
    """The child's loop: requests from stdin until it closes.

    Args:
        cache: Shared folder for kernels and converted checkpoints.
        lacking: Why the libraries could not be imported: what each request is answered.
        profile: Takes where the time goes, if anybody wants to know.
        loaded: What was looked at before the process was forked.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what frameworks print must not end up among the answers
    sys.stdout = sys.stderr
    paths: OrderedDict[str, TrainingPath] = OrderedDict()
    manifests = Manifests(cache, loaded)
    with timing.span(timing.COMPARE, "footprint of the process"):
        before = Footprint()
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
        except tuple(RAISED.values()) as error:
            status = next(name for name, kind in RAISED.items() if isinstance(error, kind))
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
        answer["changed"] = before.changed(after)
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
    framework, folder, *packages = sys.argv[1:]
    hide(packages)
    timeline = timing.of_worker()
    # Before anything is asked: who starts a process ahead of its need finds it ready.
    serve(Path(folder), imported(framework), timeline)
    code[0] = 0
