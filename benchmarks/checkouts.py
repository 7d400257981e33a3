"""Another commit of this repository beside the working tree, for benchmarks that compare the two."""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]


@contextlib.contextmanager
def before_and_now(revision: str) -> Iterator[dict[str, Path]]:
    """`before` and `now` to a checkout each; that of the revision is removed afterwards."""
    git = ("git", "-C", str(HERE), "worktree")
    with tempfile.TemporaryDirectory() as scratch:
        before = Path(scratch) / "before"
        subprocess.run([*git, "add", "-q", "--detach", str(before), revision], check=True)
        try:
            yield {"before": before, "now": HERE}
        finally:
            subprocess.run([*git, "remove", "--force", str(before)], check=True)
