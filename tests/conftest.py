"""Shared by the tests: an engine on a cache that outlives the test run, and a small recipe."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from parity.capture.engine import Engine
from parity.recipe import Recipe


@pytest.fixture(scope="session")
def engine():
    """Real workers; captures are cached by content, so a test never sees another code's result."""
    with Engine(timeout=900) as engine:
        yield engine


@pytest.fixture(scope="session")
def small():
    """A few steps on the tiny Gemma 3."""
    return Recipe().override({"train.steps": 6, "optim.lr": 3e-3})


@pytest.fixture
def uv():
    """What makes environments; it is no dependency of the package."""
    beside = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    if not shutil.which("uv", path=beside):
        pytest.skip("environments are made with uv, which is not installed")
