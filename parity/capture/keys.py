"""Content keys: what a capture depends on, so that no cell is computed twice and none wrongly kept."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from functools import cache as memoized
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from parity import resources
from parity.capture.worker import openblas
from parity.paths.describe import VARIABLES
from parity.paths.registry import resolve
from parity.recipe import Recipe

# What an environment reports belongs to the key: else captures of two environments would be found together.
_VARIABLES = (*VARIABLES, "OMP_")


def of_recipe(recipe: Recipe) -> str:
    """A recipe's factors and the state of the files that it names."""
    model = resources.fingerprint(resources.model_dir(recipe.model.source))
    data = resources.fingerprint(resources.data_dir(recipe.data.source))
    return f"{recipe.digest()} {model} {data}"


@memoized
def of_path(spec: str) -> str:
    """Content key of a path: its classes' code, its packages' versions, what its process is given.

    What its process has loaded besides is checked capture by capture (see `parity.capture.loaded`).
    """
    kind = resolve(spec)
    versions = []
    for package in kind.packages:
        try:
            versions.append(f"{package}={version(package)}")
        except PackageNotFoundError:
            versions.append(f"{package}=none")
    classes = {base for member in kind.made_of() for base in member.__mro__[:-1]}
    files = {getattr(sys.modules[base.__module__], "__file__", None) for base in classes}
    own = b"".join(Path(file).read_bytes() for file in sorted(f for f in files if f))
    variables = {k: v for k, v in os.environ.items() if k.startswith(_VARIABLES)}
    parts = [spec, sys.version, *versions, str(openblas()), json.dumps(variables, sort_keys=True)]
    code = hashlib.sha256(own).hexdigest()
    return hashlib.sha256("\n".join([*parts, code]).encode()).hexdigest()[:16]


@memoized
def git_state() -> str:
    """Commit of the working directory, marked when it has changes; empty outside a repository."""
    try:
        out = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True, text=True, timeout=10, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return out.stdout.strip()
