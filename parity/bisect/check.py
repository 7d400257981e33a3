"""A search over factors in which a shell command tells whether two recipes differ."""

from __future__ import annotations

import os
import shlex
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from parity.bisect.answer import against
from parity.bisect.minimize import Answer, Search, Watch, minimize
from parity.bisect.result import Cause, SearchReport, StageVisit
from parity.cells.cell import setting
from parity.errors import UsageError
from parity.recipe import Recipe

AGREES, UNKNOWN = 0, 125
"""Exit codes, as of `git bisect run`; any other below 128 means that the recipes differ."""


def to_toml(recipe: Recipe) -> str:
    """A recipe as TOML that `parity` reads back to the same factors.

    TOML has no null: what is None is left out. Values of None are the recipe's defaults.
    """
    import tomli_w

    return tomli_w.dumps(recipe.model_dump(mode="json", exclude_none=True))


def search(
    command: str,
    recipe: Recipe,
    changes: Mapping[str, Any],
    repeats: int = 2,
    watch: Watch | None = None,
    timeout: float = 600.0,
) -> Search:
    """Minimal sets of changes under which a shell command reports a difference.

    The command finds the recipe's file in `PARITY_RECIPE` and exits with 0 (they agree), 125 (it
    cannot tell) or another code below 128 (they differ).

    Raises:
        UsageError: There is nothing to search, or the command cannot be run at all.
    """
    if not changes:
        raise UsageError("--check needs factors that differ: give --set-subject FACTOR=VALUE")

    def oracle(names: frozenset[str]) -> Answer:
        changed = recipe.override({name: changes[name] for name in names})
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "recipe.toml")
            file.write_text(to_toml(changed), encoding="utf-8")
            env = {**os.environ, "PARITY_RECIPE": str(file)}
            try:
                # A shell, since the user typed a shell command.
                done = subprocess.run(command, shell=True, env=env, timeout=timeout, check=False)
            except subprocess.TimeoutExpired:
                return Answer.UNKNOWN
        if done.returncode in (126, 127):
            raise UsageError(f"--check {command!r}: the shell cannot run it")
        if done.returncode == AGREES:
            return Answer.AGREES
        return Answer.DIVERGES if 0 < done.returncode < UNKNOWN else Answer.UNKNOWN

    return minimize(list(changes), oracle, repeats=repeats, watch=watch)


def report(
    command: str,
    recipe: Recipe,
    changes: Mapping[str, Any],
    repeats: int = 2,
    watch: Watch | None = None,
    timeout: float = 600.0,
) -> SearchReport:
    """The same search as a report. Raises as `search` does."""
    started = time.perf_counter()
    found = search(command, recipe, changes, repeats, watch, timeout)
    result = SearchReport("the changed recipe", "the recipe as it is", found.verdict, found.reason)
    unchanged = recipe.factors()
    for names in found.causes:
        values = {name: (changes[name], unchanged.get(name)) for name in names}
        flags = [f"--set-subject {setting(name, changes[name])}" for name in names]
        line = " ".join(["parity bisect", *flags, f"--check {shlex.quote(command)}"])
        sentence = f"with {against(values)} the command reports a difference"
        result.causes.append(Cause("command", values, sentence, reproduce=line))
    verdict = {"found": "diverge"}.get(found.verdict, found.verdict)
    visit = StageVisit(-1, "command", verdict, command, 0.0, tuple(changes), found.questions)
    result.path, result.ledger = [visit], found.ledger
    result.differing, result.runs = len(changes), found.runs
    result.seconds = time.perf_counter() - started
    return result
