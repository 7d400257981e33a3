"""What is long: run by `make test-all` alone (see tests/README.md)."""

from __future__ import annotations

import pytest


def long(*values, id=None):
    """A set of parameters that repeats, at a higher price, what another set covers."""
    return pytest.param(*values, id=id, marks=pytest.mark.long)
