"""Which release, or which commit, of a package changed a verdict.

One cell is run over and over, one side (or both) in an interpreter that has another version.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

import parity
from parity import content
from parity.bisect.search import Answer, Found, Ledger, Outcome, Progress, SameEnds, search
from parity.cell import Cell
from parity.engine import Engine
from parity.errors import UsageError
from parity.paths.base import registered, resolve
from parity.recipe import Recipe
from parity.trace import Trace
from parity.worker import Worker

WORKER = ("numpy", "pydantic", "safetensors", "filelock", "platformdirs", "packaging", "pyyaml")
SIDES = {"subject": ("subject",), "reference": ("reference",), "both": ("subject", "reference")}
PATIENCE = 900  # seconds an installation may take
# Imports the modules of one distribution; a release that cannot be imported is a gap.
_IMPORT = """
import importlib, sys, importlib.metadata as metadata
names = [m for m, d in metadata.packages_distributions().items() if sys.argv[1] in d]
own = sys.argv[1].replace("-", "_")
for name in [own] if own in names else names: importlib.import_module(name)
"""


class Range(NamedTuple):
    """A package and the releases between which something changed."""

    package: str
    low: str
    high: str


class Place(NamedTuple):
    """An interpreter, a key of what it has installed, and that by name and version."""

    python: str
    key: str
    versions: dict[str, str]


class Gap(Exception):
    """A candidate that cannot be installed, imported or checked out."""


@dataclass(frozen=True)
class Change:
    """Where the verdict changed.

    Attributes:
        package: Package or checkout that was searched; `side` ran it.
        found: Last version with the verdict of the low end, first with that of the high end.
        verdicts: Version to "verdict: reason" for these two, or for both ends when none changed.
        also: Other packages that the resolver changed between these two: suspects as well.
        moved: For `both`: which side must have the new version for the verdict to change.
        runs: Cells that were run, those known from an earlier search not counted.
    """

    package: str
    side: str
    found: Found
    verdicts: dict[str, str] = field(default_factory=dict)
    also: tuple[str, ...] = ()
    moved: str = ""
    runs: int = 0
    seconds: float = 0.0

    def sentence(self) -> str:
        """The result in words."""
        if self.found.inconclusive:
            return f"{self.package}: inconclusive: {self.found.inconclusive}"
        who = self.moved or (f"the {self.side} moved" if self.side in SIDES["both"] else "")
        good, bad, hidden = self.found.last_good, self.found.first_bad, self.found.hidden
        when = f"after {good}, at {bad} or before ({', '.join(hidden)} cannot be run)"
        also = f"; changed with it: {', '.join(self.also)}" if self.also else ""
        return (
            f"{who}: {self.package} {when if hidden else bad}: "
            f"{self.verdicts[good]} → {self.verdicts[bad]}{also}"
        )


def parse_range(text: str) -> Range:
    """Reads `mlx-lm==0.30.0..0.32.2`.

    Raises:
        UsageError: Not of that form, no versions, or the wrong way round.
    """
    match = re.fullmatch(r"\s*([A-Za-z0-9][\w.-]*?)\s*==\s*(\S+?)\.\.(\S+?)\s*", text)
    if not match:
        raise UsageError(f"cannot read {text!r}: write PACKAGE==LOW..HIGH, as mlx-lm==0.30..0.32.2")
    try:
        low, high = Version(match[2]), Version(match[3])
    except InvalidVersion as error:
        raise UsageError(f"{text!r}: {error}") from None
    if low >= high:
        raise UsageError(f"{text!r}: {low} must be lower than {high}")
    return Range(canonicalize_name(match[1]), match[2], match[3])


def parse_ranges(text: str) -> tuple[Range, ...]:
    """Ranges with commas between them, each package once."""
    ranges = tuple(parse_range(part) for part in text.split(","))
    if len({span.package for span in ranges}) < len(ranges):
        raise UsageError(f"{text!r}: a package stands twice")
    return ranges


def releases(span: Range) -> list[str]:
    """Releases on the index from low to high that this platform and Python can have.

    Final releases only, unless an end is a pre-release.

    Raises:
        UsageError: Fewer than two, or no such package.
    """
    low, high = Version(span.low), Version(span.high)
    pip = [sys.executable, "-m", "pip"] if importlib.util.find_spec("pip") else [
        _uv(), "tool", "run", "pip"
    ]  # fmt: skip
    early = low.is_prerelease or high.is_prerelease
    try:
        out = _run([*pip, "index", "versions", span.package, *["--pre"][: int(early)]])
    except Gap as error:
        raise UsageError(f"no releases of {span.package!r}: {error}") from None
    line = re.search(r"^Available versions: (.*)$", out, re.MULTILINE)
    every = sorted(Version(text) for text in line[1].split(", ")) if line else []
    inside = [str(v) for v in every if low <= v <= high and (early or not v.is_prerelease)]
    if len(inside) < 2:
        known = f"{every[0]} to {every[-1]}" if every else "none"
        raise UsageError(
            f"{span.package}: {len(inside)} releases in {span.low}..{span.high}, two are needed "
            f"(the index has {known})"
        )
    return inside


def environment(
    package: str, version: str, cache: Path, extra: Sequence[str] = (), inherit: bool = False
) -> Place:
    """An interpreter with one release of a package, made once with uv.

    Args:
        package: Distribution name.
        version: Its version; the resolver chooses all others, newest first.
        cache: Environments lie below `environments/`.
        extra: Further requirements, e.g. other packages held at a version.
        inherit: What is missing in it is taken from this interpreter (torch is never installed).

    Raises:
        Gap: It cannot be installed or imported; the message is the end of what was printed.
    """
    wanted = [_requirement(package, f"=={version}"), *WORKER, *map(_requirement, extra)]
    here = Path(parity.__file__).resolve().parent
    parts = [*wanted, sys.version, sys.prefix, str(here), str(inherit)]
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    folder = cache / "environments" / f"{package}-{version}-{key}"
    python, complete = folder / "bin" / "python", folder / "complete"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not complete.exists():
            shutil.rmtree(folder, ignore_errors=True)
            _run([_uv(), "venv", "--quiet", "--python", sys.executable, str(folder)])
            never = folder / "override.txt"
            never.write_text("torch; sys_platform == 'never'\n", encoding="utf-8")
            install = [_uv(), "pip", "install", "--quiet", "--python", str(python)]
            _run([*install, "--override", str(never), *wanted])
            # Only this package, without its dependencies, whether checkout or installed wheel.
            (folder / "parity").mkdir()
            (folder / "parity" / "parity").symlink_to(here, target_is_directory=True)
            lines = [str(folder / "parity"), *[str(p) for p in _site() if inherit]]
            [site] = folder.glob("lib/python*/site-packages")
            (site / "parity.pth").write_text("\n".join(lines) + "\n", encoding="utf-8")
            _run([str(python), "-c", _IMPORT, package])
            listed = _run([_uv(), "pip", "list", "--format", "json", "--python", str(python)])
            versions = {row["name"]: row["version"] for row in json.loads(listed)}
            complete.write_text(json.dumps(versions), encoding="utf-8")
    return Place(str(python), f"{folder.name}", json.loads(complete.read_text(encoding="utf-8")))
