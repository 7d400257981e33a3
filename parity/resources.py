"""Where fixtures, probes, caches and model files are found."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from parity.errors import UsageError

EXTRA_MODELS = ("smollm2-135m", "smollm2-135m-as-saved")
"""Models made on first use from the extra `smollm2`."""

_PACKAGE = Path(__file__).resolve().parent


def _shipped(name: str) -> Path:
    """A top-level folder of the checkout, or its copy inside an installed wheel."""
    checkout = _PACKAGE.parent / name
    return checkout if checkout.is_dir() else _PACKAGE / f"_{name}"


def fixtures() -> Path:
    """The folder of fixtures."""
    return _shipped("fixtures")


def probes() -> Path:
    """The folder of probes."""
    return _shipped("probes")


def cache() -> Path:
    """Where captures, converted checkpoints and compiled kernels are kept.

    `PARITY_CACHE` overrides the user's cache directory.
    """
    if named := os.environ.get("PARITY_CACHE"):
        return Path(named)
    from platformdirs import user_cache_path

    return user_cache_path("mlx-parity")


def names(kind: str) -> list[str]:
    """Names of the fixtures of a kind: models, data, recipes or scenarios."""
    folder = fixtures() / kind
    if kind in ("recipes", "scenarios"):
        return sorted(file.stem for file in folder.glob("*.toml"))
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir())


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


def model_dir(source: str) -> str:
    """A model's folder by fixture name or path; a hub id comes back as it is.

    Raises:
        UsageError: A path that does not exist, or a fixture whose package is missing.
    """
    if source in EXTRA_MODELS:
        from parity import smollm2

        return str(smollm2.checkpoint(source))
    folder = fixtures() / "models" / source
    if (folder / "config.json").is_file():
        return str(folder)
    if (Path(source) / "config.json").is_file():
        return str(Path(source).resolve())
    if source.count("/") == 1 and not source.startswith((".", "/", "~")):
        return source
    raise UsageError(
        f"no model {source!r}: give one of {', '.join([*names('models'), *EXTRA_MODELS])}, "
        "a folder that holds config.json, or a hub id such as org/name"
    )


def fingerprint(folder: str | Path) -> str:
    """Cheap content key of a folder: names, sizes and times of its files (hub ids: the id)."""
    root = Path(folder)
    h = hashlib.sha256(str(folder).encode())
    if root.is_dir():
        for file in sorted(
            p for p in root.rglob("*") if p.is_file() and "__pycache__" not in p.parts
        ):
            stat = file.stat()
            h.update(f"{file.relative_to(root)}{stat.st_size}{stat.st_mtime_ns}".encode())
    return h.hexdigest()[:16]
