"""`PATH@VERSION`: a release in an environment of its own."""

from __future__ import annotations

import pytest

from parity.capture.engine import Engine
from parity.errors import CaptureError, UsageError
from parity.paths.registry import resolve
from parity.recipe import Recipe
from parity.trace import Trace

OLD = "tests.faulty_paths:Packaging"


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("unsloth@latest", "'latest' is no version of unsloth-zoo: write unsloth@1.2.3"),
        ("tests.third_party:NumpyAdamW@1.0", "names no package whose release"),
        ("unsloth@2026.5.2+loss=mlx", "'unsloth@2026.5.2' cannot be swapped"),
        ("mlx+loss=unsloth@2026.5.2", "'unsloth@2026.5.2' cannot be swapped"),
        ("nothing@1.0", "unknown path 'nothing'"),
    ],
)
def test_what_cannot_be_pinned_is_one_clear_error(spec, says):
    with pytest.raises(UsageError, match=says):
        resolve(spec)


def test_a_pinned_path_keeps_what_the_path_is():
    kind = resolve("mlx-lm@0.31.0")
    assert (kind.name, kind.framework) == ("mlx-lm@0.31.0", "mlx")
    assert kind.fixed == resolve("mlx-lm").fixed


def test_it_runs_in_that_release(uv, tmp_path):
    with Engine(cache=tmp_path, timeout=300) as engine:
        here = engine.capture(OLD, "defaults", Recipe(), Trace())
        there = engine.capture(f"{OLD}@21.3", "defaults", Recipe(), Trace())
        assert there.scalars["version"] == "21.3" != here.scalars["version"]
        assert there.environment["versions"] == {"packaging": "21.3"}
        with pytest.raises(CaptureError, match=r"Packaging@0\.0\.1' has no environment"):
            engine.capture(f"{OLD}@0.0.1", "defaults", Recipe(), Trace())
