"""Each typical mistake ends in one clear line, with exit code 2, before any work."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mistakes import FILES, MISTAKES, PAGE, run, workplace


@pytest.fixture(scope="module", autouse=True)
def here():
    with workplace():
        yield


@pytest.mark.parametrize("mistake", MISTAKES, ids=[mistake.what for mistake in MISTAKES])
def test_a_mistake_is_one_line(mistake, monkeypatch):
    # Whatever gets as far as work fails here, and does not begin a run.
    monkeypatch.setattr("parity.capture.engine.Engine.__init__", _no_work)
    found = run(mistake)
    assert found.bug is None
    assert found.code == 2, found.err
    assert not found.out
    assert found.err.startswith("parity: ")
    assert found.err.count("\n") == 1
    files = {str(file) for file in Path().rglob("*") if file.is_file()}
    assert {name for name in files if "__pycache__" not in name} == FILES.keys()
    page = PAGE.read_text(encoding="utf-8")
    assert f"parity {mistake.command}`" in page, "docs/mistakes.md is old"
    if "(see `" not in found.err:  # what click says differs between its releases
        # Names that are listed at the end grow with models, factors and probes.
        assert f"| {found.err.strip()[:50]}" in page, "docs/mistakes.md is old"


def _no_work(*_, **__):
    raise AssertionError("work has begun")


def test_there_are_thirty():
    assert len({mistake.command for mistake in MISTAKES}) >= 30
