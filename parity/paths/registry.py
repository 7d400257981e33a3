"""Paths by name: those that are installed, those of a user, hybrids, and pinned releases."""

from __future__ import annotations

import contextlib
import importlib
import sys
import traceback
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from parity.errors import UsageError, closest
from parity.factors import Knobs
from parity.paths import declaration, parts
from parity.paths.hybrid import compose
from parity.paths.protocol import TrainingPath

GROUP = "parity.paths"
_PROCESSES = {"mlx": "parity.paths.mlx.process", "torch": "parity.paths.hf.process"}
"""Framework to the module whose `prepare` makes a process ready for it."""


@cache  # every cell asks, and reading what is installed takes 8 ms
def registered() -> Mapping[str, str]:
    """Registered paths: name to `module:Class`."""
    return {point.name: point.value for point in entry_points(group=GROUP)}


@cache
def resolve(spec: str) -> type[TrainingPath]:
    """The class of a registered name, of `package.module:Class`, or of a hybrid of such.

    `PATH@VERSION` is the path in an environment of its own (see `capture.environments.pinned`).

    Raises:
        UsageError: It is neither, cannot be imported, or is no path.
    """
    if "+" in spec:
        return _hybrid(spec)
    if "@" in spec:
        return _pinned(spec)
    return declaration.check(spec, _imported(spec))


def _imported(spec: str) -> Any:
    """What a registered name or `package.module:name` names.

    Raises:
        UsageError: It is neither, or cannot be imported.
    """
    known = registered()
    target = known.get(spec, spec)
    module, colon, attribute = target.partition(":")
    if not colon or not module or not attribute:
        raise UsageError(
            f"unknown path {spec!r}: {closest(spec, known)}give one of {', '.join(sorted(known))} "
            "or package.module:Class"
        )
    # A trainer of one's own lies where the command is run, not where this package is installed.
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as error:  # a module of a user may raise anything
        raise UsageError(f"cannot import path {spec!r}: {_in_one_line(error)}") from None


def _in_one_line(error: BaseException) -> str:
    """Kind and message of an error, and the line of a user's file that raised it."""
    found = f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.lineno]
    last = frames[-1].filename if frames else __file__
    if last == __file__ or "importlib" in last:  # there is no such module, or no such name in it
        return found
    return f"{found} ({last}, line {frames[-1].lineno})"


def prepare(framework: str) -> None:
    """Imports the libraries, and makes the settings of the process, that all paths on them share.

    What a path changes in them afterwards is its own doing.
    """
    if module := _PROCESSES.get(framework):
        importlib.import_module(module).prepare()


def knobs(specs: Iterable[str]) -> tuple[type[Knobs], ...]:
    """The knobs of these paths: sections that a recipe has where they take part.

    Raises:
        UsageError: As `resolve` does.
    """
    return tuple(dict.fromkeys(kind for spec in specs for kind in resolve(spec).knob_types()))


def installed_knobs() -> tuple[type[Knobs], ...]:
    """The knobs of all registered paths that can be imported."""
    found: dict[type[Knobs], None] = {}
    for name in registered():
        with contextlib.suppress(UsageError):
            found |= dict.fromkeys(knobs([name]))
    return tuple(found)


def exchange_parts(first: str, second: str) -> bool:
    """Whether parts of two paths can stand in each other: both take some, on one framework."""
    return (
        bool(takes_parts(first) and takes_parts(second))
        and resolve(first).framework == resolve(second).framework
    )


def lends(spec: str, part: str, framework: str) -> bool:
    """Whether a part of a path, or a function that is given for it, can stand in a path on a framework."""
    # A release in an environment of its own cannot share a process with anything else.
    return "@" not in spec and part in _donor(part, spec, framework).own_parts


def takes_parts(spec: str) -> tuple[str, ...]:
    """The parts of a path in whose place those of another one can stand."""
    return () if "@" in spec else resolve(spec).takes_parts


@cache
def _donor(part: str, spec: str, framework: str) -> type[TrainingPath]:
    """The path that a part is taken from; `module:function` is a path of this function alone.

    A function is on the framework of the path that it is to stand in.

    Raises:
        UsageError: As `resolve` does; its module works with the other framework.
    """
    if "@" in spec or ":" not in spec:
        return resolve(spec)
    found = _imported(spec)
    if not callable(found) or (isinstance(found, type) and issubclass(found, TrainingPath)):
        return resolve(spec)
    from parity.paths.plugin.given import FUNCTION
    from parity.paths.plugin.parts import make

    if other := _other_framework(found, framework):
        base = next(name for name, on in _STACKS.items() if on == other)
        raise UsageError(
            f"{spec!r} is a function on {other}, which cannot stand in a path on {framework}: "
            f"give --subject {base}, or a function on {framework}"
        )
    return make({FUNCTION[part]: found}, spec.partition(":")[0], spec, framework=framework)


_STACKS = {"mlx": "mlx", "hf": "torch"}
"""The path that parts of one's own stand in, and its framework."""


def _other_framework(function: Any, framework: str) -> str:
    """The framework that the module of a function works with, where it is only another than this."""
    home = vars(sys.modules.get(getattr(function, "__module__", ""), object))
    roots = {
        getattr(value, "__module__", None) or getattr(value, "__name__", "")
        for value in (*home.values(), function)
        if not isinstance(value, str)
    }
    used = {str(root).partition(".")[0] for root in roots} & {*_STACKS.values()}
    return "" if framework in used or not used else used.pop()


def _hybrid(spec: str) -> type[TrainingPath]:
    sources = parts.sources(spec)
    base = sources.pop(parts.LOOP)
    swaps = {part: path for part, path in sources.items() if path != base}
    framework = resolve(base).framework
    donors = {part: _donor(part, path, framework) for part, path in swaps.items()}
    for path, kind in ((base, resolve(base)), *((swaps[part], donors[part]) for part in swaps)):
        if "@" in path or not kind.takes_parts:
            raise UsageError(
                f"{spec!r}: the parts of {path!r} cannot be swapped: it is run as a whole, or in an "
                "environment of its own"
            )
        if kind.framework != framework:
            raise UsageError(
                f"{spec!r}: {base!r} is on {framework} and {path!r} on {kind.framework}: a part can "
                "only be taken from a path on the same framework"
            )
    for part, path in swaps.items():
        if part not in takes_parts(base):
            raise UsageError(
                f"{spec!r}: {base!r} sets up its training by itself, another {part} would be left "
                f"out: write that {part} as a method of its own, which its set-up calls, or declare "
                "`takes_parts`"
            )
        if part not in donors[part].own_parts:
            raise UsageError(
                f"{spec!r}: {path!r} has no {part} of its own: what it inherits is not known to be "
                f"what it trains with; its own parts are "
                f"{', '.join(donors[part].own_parts) or 'none'}"
            )
    return compose(spec, resolve(base), donors)


def _pinned(spec: str) -> type[TrainingPath]:
    # Here only: what lies in a user's working directory must not stand in for it in a worker.
    from packaging.version import InvalidVersion, Version

    name, _, version = spec.partition("@")
    kind = resolve(name)
    if not kind.release:
        raise UsageError(f"{spec!r}: path {name!r} names no package whose release could be chosen")
    try:
        Version(version)
    except InvalidVersion:
        raise UsageError(
            f"{spec!r}: {version!r} is no version of {kind.release}: write {name}@1.2.3"
        ) from None
    return type(kind.__name__, (kind,), {"name": spec, "__module__": kind.__module__})
