"""Bundles: all captures of one side of a run in one file, which stands in for its path elsewhere.

A zip of `manifest.json` and of one trace for each capture. A capture is found by its path, method,
recipe and inputs; models and data go by their names, whose files must be the same. A capture that
a path refused or failed is kept with its reason, so that the same skip or error comes out.
"""

from __future__ import annotations

import hashlib
import os
import threading
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from parity import __version__, resources
from parity.capture.machine import differences
from parity.errors import CaptureError, MissingCapture, UnmatchedNames, Unsupported, UsageError
from parity.files import dumps, loads, write_atomically
from parity.recipe import Recipe
from parity.trace import Trace

if TYPE_CHECKING:
    from parity.capture.engine import Declared, Source

SCHEMA = 1
SUFFIX = ".bundle"
_REFUSED: dict[str, type[Exception]] = {
    kind.__name__: kind for kind in (Unsupported, UnmatchedNames, CaptureError)
}
_CONTENT = (".safetensors", ".json", ".jsonl", ".jinja", ".txt", ".model", ".tiktoken")
_SHOWN = 3  # factors that an error names


def is_bundle(spec: str) -> bool:
    """Whether a side is given as a bundle."""
    return spec.endswith(SUFFIX)


def name_of(spec: str) -> str:
    """The path that a side speaks of: that of the bundle, or the path as it is given.

    Raises:
        UsageError: No bundle.
    """
    return opened(spec).path if is_bundle(spec) else spec


def factors_of(recipe: Recipe, knobs: Mapping[str, Any]) -> dict[str, Any]:
    """The factors that a capture of a path depends on, wherever model and data lie.

    Args:
        recipe: A recipe, with the knobs of any paths.
        knobs: The path's own, by name, with the values that they have where a recipe lacks them.
    """
    given = recipe.factors()
    common = {k: v for k, v in given.items() if k.partition(".")[0] in Recipe.model_fields}
    named = {k: Path(given[k]).name for k in ("model.source", "data.source")}
    return {**common, **named, **{k: given.get(k, value) for k, value in knobs.items()}}


def _digest(value: object) -> str:
    return hashlib.sha256(dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def _key(path: str, method: str, recipe: str, inputs: Trace, attempt: str) -> str:
    words = path, method, recipe, inputs.digest(), attempt
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:24]


def of_modules(inputs: Trace) -> bool:
    """Whether a capture is of every module: hundreds of megabytes in a model of real size."""
    return bool(inputs.scalars.get("modules"))


@dataclass
class Recorder:
    """Collects each capture that its sources answer.

    Attributes:
        modules: Whether captures of modules are collected; else they are refused.
    """

    modules: bool = False
    captures: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    recipes: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Digest to factors."""
    environments: dict[str, dict[str, Any]] = field(default_factory=dict)
    mixed: dict[str, list[str]] = field(default_factory=dict)
    """Path to what differs between the environments of its captures."""

    def source(
        self, path: str, source: Source, knobs: Mapping[str, Any] = MappingProxyType({})
    ) -> Source:
        """The same source, each of its answers kept as one of `path`, which has these knobs."""

        def recorded(method: str, recipe: Recipe, inputs: Trace, attempt: str = "") -> Trace:
            if of_modules(inputs) and not self.modules:
                raise MissingCapture("a bundle holds captures of modules with --modules alone")
            factors = factors_of(recipe, knobs)
            digest = _digest(factors)
            key = _key(path, method, digest, inputs, attempt)
            entry = {"path": path, "method": method, "recipe": digest}
            self.recipes[digest] = factors
            try:
                trace = source(method, recipe, inputs, attempt)
            except tuple(_REFUSED.values()) as error:
                reason = {"refused": type(error).__name__, "message": str(error)}
                self.captures[key] = {**entry, **reason, "detail": getattr(error, "detail", "")}
                raise
            first = self.environments.setdefault(path, trace.environment)
            if found := differences(first, trace.environment):
                self.mixed[path] = found
            self.captures[key], self.files[key] = entry, trace.file
            return trace

        return recorded

    def refused(self, kind: type[Exception], path: str) -> list[str]:
        """The reasons of captures of a path that came to nothing."""
        return [
            entry["message"]
            for entry in self.captures.values()
            if entry["path"] == path and entry.get("refused") == kind.__name__
        ]

    def save(
        self,
        file: Path,
        side: Declared,
        against: str,
        recipe: Recipe,
        probes: Sequence[int],
        seeds: Sequence[int],
    ) -> None:
        """Writes the bundle whole or not at all.

        Args:
            file: Where to.
            side: What its path says of itself.
            against: The reference that a subject was captured against; empty for a reference.
            recipe: The shared recipe.
            probes: Numbers of the probes whose captures it holds.
            seeds: Their seeds.
        """
        manifest = {
            "format": "mlx-parity bundle", "schema": SCHEMA, "tool": __version__,
            **side._asdict(), "against": against, "modules": self.modules,
            "environment": self.environments.get(side.name, {}),
            "probes": list(probes), "seeds": list(seeds), "content": content(recipe),
            "factors": factors_of(recipe, side.knobs), "recipes": self.recipes,
            "captures": self.captures,
        }  # fmt: skip
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(f".{file.name}.{os.getpid()}")
        try:
            # Arrays of floats hardly shrink at any level; the lowest takes the zeros out.
            with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
                archive.writestr("manifest.json", dumps(manifest))
                for key, source in self.files.items():
                    archive.write(source, f"captures/{key}.safetensors")
            part.replace(file)
        finally:
            part.unlink(missing_ok=True)


def content(recipe: Recipe) -> dict[str, str]:
    """Hashes of the files of model and data, by factor; of a model on a hub there are none."""
    sources = {
        "model.source": Path(resources.model_dir(recipe.model.source)),
        "data.source": resources.data_dir(recipe.data.source),
    }
    return {factor: _hash(folder) for factor, folder in sources.items() if folder.is_dir()}


def _hash(folder: Path) -> str:
    h = hashlib.sha256()
    for file in sorted(f for f in folder.iterdir() if f.suffix in _CONTENT and f.is_file()):
        with file.open("rb") as stream:
            h.update(file.name.encode() + hashlib.file_digest(stream, "sha256").digest())
    return h.hexdigest()[:16]


class Bundle:
    """A bundle that is read. Raises `UsageError` where a file is none."""

    def __init__(self, file: Path) -> None:
        self.file, self._lock = file, threading.Lock()
        try:
            self._archive = zipfile.ZipFile(file)
            text = self._archive.read("manifest.json").decode()
            self.manifest: dict[str, Any] = loads(text)
            schema = self.manifest["schema"]
        except FileNotFoundError:
            raise UsageError(f"no bundle at {str(file)!r}: make it with `parity capture`") from None
        except (OSError, zipfile.BadZipFile, KeyError, ValueError, TypeError) as error:
            raise UsageError(
                f"{file}: not a bundle of `parity capture`, or cut short: {error}"
            ) from None
        if not isinstance(schema, int) or schema > SCHEMA:
            raise UsageError(
                f"{file}: bundle schema {schema} is newer than this tool's {SCHEMA}: "
                "upgrade mlx-parity"
            )
        self._digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        try:
            self.path: str = self.manifest["name"]
            self.framework: str = self.manifest["framework"]
            self.operations: Mapping[str, str] = self.manifest["operations"]
            self.environment: Mapping[str, Any] = self.manifest["environment"]
            self.against: str = self.manifest["against"]
            self.knobs: Mapping[str, Any] = self.manifest["knobs"]
            # Whatever it is handed: inputs that another path made cannot be among the captures.
            self.absent: Mapping[str, str] = self.manifest.get("absent", {})
        except KeyError as error:
            raise UsageError(
                f"{file}: not a bundle of `parity capture`: it has no {error}"
            ) from None

    def capture(
        self,
        cache: Path,
        path: str,
        method: str,
        recipe: Recipe,
        inputs: Trace,
        attempt: str = "",
    ) -> Trace:
        """What a path gave where the bundle was made; `cache` takes the trace's file.

        Raises:
            MissingCapture: It was not asked there.
            CaptureError: It failed there, or the file is damaged.
            Unsupported: The path cannot do it.
            UnmatchedNames: What was handed over did not fit its tensors by name.
        """
        factors = factors_of(recipe, self.knobs if path == self.path else {})
        key = _key(path, method, _digest(factors), inputs, attempt)
        entry = self.manifest["captures"].get(key)
        if entry is None and path == self.path and method in self.absent:
            raise Unsupported(self.absent[method])
        if entry is None:
            raise MissingCapture(self._lacks(path, method, factors, inputs, attempt))
        if kind := entry.get("refused"):
            more = (entry["detail"],) if kind == CaptureError.__name__ else ()
            raise _REFUSED[kind](entry["message"], *more)
        target = cache / "bundles" / self._digest / f"{key}.safetensors"
        if not target.exists():
            try:
                with self._lock:
                    data = self._archive.read(f"captures/{key}.safetensors")
            except (KeyError, zipfile.BadZipFile, OSError, EOFError) as error:
                raise CaptureError(f"{self.file} is damaged: {error}") from None
            write_atomically(target, data)
        return Trace.load(target)

    def _lacks(
        self, path: str, method: str, factors: Mapping[str, Any], inputs: Trace, attempt: str
    ) -> str:
        """What is missing, and what the bundle was made for."""
        start, made = f"{self.file} has no capture of {method}", self.manifest
        if of_modules(inputs) and not made["modules"]:
            return f"{start} with its modules: make it with --modules"
        if (seed := factors["seed.value"]) not in made["seeds"]:
            return f"{start} for seed {seed}: made for seeds {', '.join(map(str, made['seeds']))}"
        recipes = {
            e["recipe"]
            for e in made["captures"].values()
            if (e["path"], e["method"]) == (path, method)
        }
        if not recipes:
            of = "" if path == self.path else f" by {path}"
            return f"{start}{of}: made for probes {', '.join(f'{n:02d}' for n in made['probes'])}"
        if _digest(factors) not in recipes:
            known = (_differing(factors, made["recipes"][digest]) for digest in sorted(recipes))
            differ = min(known, key=len)[:_SHOWN]
            wanted = ", ".join(f"{name}={ours}" for name, ours, _ in differ)
            held = ", ".join(f"{name}={theirs}" for name, _, theirs in differ)
            return f"{start} for {wanted}: made for {held}"
        if attempt:
            return f"{start} repeated: the subject did not diverge where it was captured"
        return (
            f"{start} on these inputs, though for this recipe: they came from another "
            "reference, tokenizer or release of this tool; make the bundle anew"
        )

    def check_files(self, recipe: Recipe) -> None:
        """Holds model and data against those that the bundle was made with.

        Raises:
            UsageError: Of the same name, they are other files.
        """
        here, named = content(recipe), factors_of(recipe, self.knobs)
        for factor, made in self.manifest["content"].items():
            same = self.manifest["factors"][factor] == named[factor]  # else all is missing
            if same and factor in here and here[factor] != made:
                raise UsageError(
                    f"{factor}={recipe.factors()[factor]}: its files are not those that {self.file} "
                    "was made with: take the same ones"
                )


def _differing(factors: Mapping[str, Any], others: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    names = dict.fromkeys([*factors, *others])
    rows = ((name, factors.get(name), others.get(name)) for name in names)
    return [(name, ours, theirs) for name, ours, theirs in rows if ours != theirs]


@lru_cache(maxsize=32)
def _opened(file: Path, _: tuple[int, int]) -> Bundle:
    return Bundle(file)


def opened(spec: str) -> Bundle:
    """The bundle of a file, read once.

    Raises:
        UsageError: There is none, or it is no bundle that this version reads.
    """
    file = Path(spec)
    try:
        stat = file.stat()
    except OSError:
        return Bundle(file)  # says what is wrong
    return _opened(file, (stat.st_size, stat.st_mtime_ns))
