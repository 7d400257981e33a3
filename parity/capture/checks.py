"""What is wrong with a request, found before any work is done."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from parity import resources
from parity.capture import storage
from parity.capture.bundle import is_bundle, opened
from parity.errors import UsageError
from parity.paths.protocol import TrainingPath
from parity.paths.registry import resolve
from parity.recipe import Recipe


def check(specs: Iterable[str], recipe: Recipe) -> None:
    """Finds wrong use before any work is done.

    Raises:
        UsageError: An unknown path, model or data folder; a bundle, which cannot be run.
    """
    for spec in specs:
        if is_bundle(spec):
            raise UsageError(f"{spec}: a search runs both paths again and again: give paths")
        resolve(spec)
    storage.check_writable(resources.cache())
    resources.check_model(recipe.model.source)
    resources.check_data(recipe.data.source)
    _check_decode(recipe)


def check_run(subject: str, references: Iterable[str], recipe: Recipe) -> None:
    """The same for a run, which takes bundles.

    Raises:
        UsageError: As `check`; packages of the subject are not installed (of a reference, its cells are
            skipped); a bundle was captured for the other role (inputs come from the reference) or
            with another model.
    """
    bundled, live = set[str](), set[str]()
    for spec in (subject, *references):
        (bundled if is_bundle(spec) else live).add(spec)
        if not is_bundle(spec):
            continue
        found = opened(spec)
        if spec == subject and not found.against:
            raise UsageError(
                f"{spec} was captured as a reference: capture the subject against one, "
                f"parity capture {found.path} --reference PATH"
            )
        if spec != subject and found.against:
            raise UsageError(
                f"{spec} was captured as a subject against {found.against}: capture the reference "
                f"by itself, parity capture {found.path}"
            )
    if subject in live:
        _check_installed(subject)
    storage.check_writable(resources.cache())
    if live:  # who only judges needs neither model nor data
        check(live, recipe)
        for spec in sorted(bundled):
            opened(spec).check_files(recipe)
    _check_decode(recipe)


def check_fitness(spec: str) -> None:
    """The same for what looks at one path, which has its own recipe.

    Raises:
        UsageError: An unknown path, a bundle, missing packages, a cache that cannot be written.
    """
    if is_bundle(spec):
        raise UsageError(
            f"{spec} is a bundle, which can only answer what it was asked: give a path"
        )
    resolve(spec)
    _check_installed(spec)
    storage.check_writable(resources.cache())


def _check_installed(spec: str) -> None:
    if why := not_installed(spec):
        raise UsageError(why)


def not_installed(spec: str) -> str:
    """Which packages of a path or bundle are not there and how to install them; empty where all are."""
    if is_bundle(spec) or not (missing := _missing(spec)):
        return ""
    return (
        f"path {spec!r} needs {', '.join(missing)}, not installed here: "
        f"{install(resolve(spec), missing)}; or "
        f"capture where it is (parity capture {spec} --out {Path(spec).stem}.bundle)"
    )


def _check_decode(recipe: Recipe) -> None:
    if not recipe.decode.expected.strip():
        raise UsageError("decode.expected is blank: give the completion that should come")


def install(kind: type[TrainingPath], packages: Iterable[str]) -> str:
    """The command that installs packages of a path."""
    alone = [package for package in packages if package in kind.without_dependencies]
    rest = [package for package in packages if package not in alone]
    lines = [f"pip install {' '.join(rest)}"] if rest else []
    lines += [f"pip install --no-deps {' '.join(alone)}"] if alone else []
    return " && ".join(lines)


@cache  # each cell asks
def _missing(spec: str) -> list[str]:
    """Packages of a path that this interpreter cannot import or does not have."""
    if "@" in spec:
        return []
    kind, missing = resolve(spec), []
    for package in kind.packages:
        try:
            distribution(package)
        except PackageNotFoundError:
            missing.append(package)
    framework = kind.framework
    if framework in ("mlx", "torch") and not importlib.util.find_spec(framework):
        missing = [framework, *(package for package in missing if package != framework)]
    return missing
