"""Where fixtures, probes, caches and model files are found."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from parity.errors import UsageError, closest
from parity.resources import smollm2
from parity.resources.folders import cache, fixtures, names, probes

EXTRA_MODELS = smollm2.NAMES
"""Models made on first use from the extra `smollm2`."""

__all__ = [
    "EXTRA_MODELS",
    "cache",
    "check_data",
    "check_model",
    "data_dir",
    "exported",
    "fingerprint",
    "fixtures",
    "model_dir",
    "names",
    "probes",
    "recipe_file",
]


def recipe_file(source: str) -> Path:
    """A recipe's file by name or by path.

    Raises:
        UsageError: There is none.
    """
    if source.endswith(".toml"):
        if Path(source).is_file():
            return Path(source)
        raise UsageError(f"no recipe at {source!r}")
    file = fixtures() / "recipes" / f"{source}.toml"
    if source and file.is_file():
        return file
    raise UsageError(
        f"no recipe {source!r}: give a path ending in .toml or one of {', '.join(names('recipes'))}"
    )


def data_dir(source: str) -> Path:
    """A data folder by fixture name or path.

    Raises:
        UsageError: No such folder, or no train.jsonl in it.
    """
    folder = fixtures() / "data" / source
    if not folder.is_dir():
        folder = Path(source)
    if not (folder / "train.jsonl").is_file():
        raise UsageError(
            f"no data {source!r}: give one of {', '.join(names('data'))} "
            "or a folder that holds train.jsonl"
        )
    return folder


CHECKED = 1000  # rows that are read before any work; data may be larger than memory


def check_data(source: str) -> None:
    """Finds data that no path could read, before any work.

    Raises:
        UsageError: As `data_dir`; there are no rows, or one of the first `CHECKED` is no JSON object.
    """
    file = data_dir(source) / "train.jsonl"
    rows = 0
    with file.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(itertools.islice(lines, CHECKED), start=1):
            if not line.strip():
                continue
            rows += 1
            try:
                whole = isinstance(json.loads(line), dict)
            except ValueError as error:
                raise UsageError(f"{file}, line {number}: not JSON: {error}") from None
            if not whole:
                raise UsageError(
                    f'{file}, line {number}: a row is an object such as {{"text": "…"}}, '
                    f"not {line.strip()[:40]}"
                )
    if not rows:
        raise UsageError(f"{file} has no rows")


def model_dir(source: str) -> str:
    """A model's folder by fixture name or path; a hub id comes back as it is.

    Raises:
        UsageError: A path that does not exist, or a fixture whose package is missing.
    """
    if source in EXTRA_MODELS:
        return str(smollm2.checkpoint(source))
    folder = fixtures() / "models" / source
    if (folder / "config.json").is_file():
        return str(folder)
    if (Path(source) / "config.json").is_file() or exported(source):
        return str(Path(source).resolve())
    if source.count("/") == 1 and not source.startswith((".", "/", "~")):
        return source
    raise UsageError(
        f"no model {source!r}: {closest(source, names('models'))}give one of {', '.join([*names('models'), *EXTRA_MODELS])}, "
        "a folder that holds config.json, or a hub id such as org/name"
    )


def exported(folder: str | Path) -> str:
    """The name of the GGUF file in a folder whose only weights it is; else empty."""
    files = sorted(Path(folder).glob("*.gguf")) if Path(folder).is_dir() else []
    return files[0].name if len(files) == 1 and not any(Path(folder).glob("*.safetensors")) else ""


def check_model(source: str) -> None:
    """Finds a model that no path could load, before any work.

    Raises:
        UsageError: As `model_dir`; there are no weights in the folder; the hub id cannot be had.
    """
    folder = model_dir(source)
    if not Path(folder).is_dir():
        from parity.resources import hub

        hub.check(folder)
    elif not hold_weights(entry.name for entry in Path(folder).iterdir()):
        raise UsageError(
            f"model {source!r}: {folder} holds config.json but no weights: it needs *.safetensors"
        )


def hold_weights(names: Iterable[str]) -> bool:
    """Whether there are weights that transformers or mlx-lm load among files of these names."""
    return any(name.endswith((".safetensors", ".bin", ".gguf")) for name in names)


def fingerprint(folder: str | Path) -> str:
    """Cheap content key of a folder: names, sizes and times of its files (hub ids: the id)."""
    root = Path(folder)
    h = hashlib.sha256(str(folder).encode())
    if root.is_dir():
        for name, stat in sorted(_files(str(root), ()), key=lambda found: found[0]):
            h.update(f"{'/'.join(name)}{stat.st_size}{stat.st_mtime_ns}".encode())
    return h.hexdigest()[:16]


def _files(folder: str, below: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], os.stat_result]]:
    """Files below a folder by the parts of their names; links are followed to files alone."""
    with os.scandir(folder) as entries:
        for entry in entries:
            name = (*below, entry.name)
            if entry.is_dir(follow_symlinks=False):
                if entry.name != "__pycache__":
                    yield from _files(entry.path, name)
            elif entry.is_file():
                yield name, entry.stat()
