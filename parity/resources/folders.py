"""Folders: fixtures, probes, and the cache."""

from __future__ import annotations

import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


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
