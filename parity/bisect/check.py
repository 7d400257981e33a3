"""Any command as the oracle of a search over factors."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from parity.bisect.causes import Cause, SearchReport, StageVisit, against
from parity.bisect.minimize import Answer, Search, Watch, minimize
from parity.cells.cell import setting
from parity.errors import UsageError
from parity.recipe import Recipe

AGREES, UNKNOWN = 0, 125
"""Exit codes, as `git bisect run` has them; any other below 128 means that they differ."""


def to_toml(recipe: Recipe) -> str:
    """A recipe as TOML that `parity` reads back to the same factors."""
    lines = []
    for section, values in recipe.model_dump(mode="json").items():
        lines.append(f"[{section}]")
        # JSON's strings, numbers, booleans and lists are TOML's; what is None is left out.
        lines += [
            f"{name} = {json.dumps(value, ensure_ascii=False)}"
            for name, value in values.items()
            if value is not None
        ]
    return "\n".join(lines) + "\n"


def search(
    command: str,
    recipe: Recipe,
    changes: Mapping[str, Any],
    repeats: int = 2,
    watch: Watch | None = None,
    timeout: float = 600.0,
) -> Search:
    """Minimal sets of changes under which a shell command says that something differs.

    The command gets the recipe's file in `PARITY_RECIPE` and exits with 0 (agrees), 125 (cannot
    tell) or another code below 128 (differs).

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
                # The command is the user's own words for a shell.
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
    theirs = recipe.factors()
    for names in found.causes:
        values = {name: (changes[name], theirs.get(name)) for name in names}
        flags = [f"--set-subject {setting(name, changes[name])}" for name in names]
        again = " ".join(["parity bisect", *flags, f"--check {shlex.quote(command)}"])
        sentence = f"{against(values)} makes the command say that they differ"
        result.causes.append(Cause("command", values, sentence, reproduce=again))
    said = {"found": "diverge"}.get(found.verdict, found.verdict)
    visit = StageVisit(-1, "command", said, command, 0.0, tuple(changes), found.questions)
    result.path, result.ledger = [visit], found.ledger
    result.differing, result.runs = len(changes), found.runs
    result.seconds = time.perf_counter() - started
    return result
