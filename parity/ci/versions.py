"""Versions of packages: what a workflow installs, and what moved between two runs."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from parity.capture.environments import compiled
from parity.errors import UsageError
from parity.results.aggregate import Aggregate
from parity.results.changes import FAILS, changes


def pins(text: str) -> list[str]:
    """Requirements separated by spaces, checked.

    Raises:
        UsageError: One is no requirement.
    """
    found = []
    for word in text.split():
        try:
            found.append(str(Requirement(word)))
        except InvalidRequirement as error:
            reason = str(error).splitlines()[0]
            raise UsageError(f"pins {word!r}: {reason}; write mlx-lm==0.32.2") from None
    return found


def constraints(fixed: str, chosen: Iterable[str]) -> str:
    """Constraints of a project with some of them replaced by pins."""
    names = {canonicalize_name(Requirement(pin).name) for pin in chosen}
    kept = [
        line
        for line in fixed.splitlines()
        if (found := re.match(r"[A-Za-z0-9][\w.-]*", line))
        and canonicalize_name(found[0]) not in names
    ]
    return "\n".join([*kept, *chosen, ""])


def newest(project: Path, chosen: Sequence[str], python: str) -> str:
    """Constraints: the newest releases of all that a project requires which fit together on a Mac.

    Args:
        project: Its pyproject.toml.
        chosen: Pins that hold all the same.
        python: Version of the interpreter, such as 3.12.

    Raises:
        UsageError: uv is not installed, or nothing fits.
    """
    listed = compiled(project, chosen, python, "aarch64-apple-darwin")
    return constraints("\n".join(listed), chosen)


def commit(repository: str, ref: str) -> str:
    """A requirement of a repository at the commit that a ref names now: all jobs install the same.

    Args:
        repository: `owner/name` on GitHub, or what git can read.
        ref: A branch, a tag, or a commit in full; empty for the default branch.

    Raises:
        UsageError: git cannot read it, or the ref is not there.
    """
    url = repository
    if re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        url = f"https://github.com/{repository}"
    if re.fullmatch(r"[0-9a-f]{40}", ref):
        return f"git+{url}@{ref}"
    if ref.startswith("-") or url.startswith("-"):
        raise UsageError(f"trainer {repository!r} at {ref!r}: not a repository and a ref")
    environment = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}
    asked = ["git", "ls-remote", url, ref or "HEAD", f"{ref}^{{}}"]
    done = subprocess.run(asked, capture_output=True, text=True, env=environment)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["git failed"])[-1]
        raise UsageError(f"trainer {repository!r}: {last}")
    listed = dict(line.split("\t")[::-1] for line in done.stdout.splitlines())
    # An annotated tag has a line of its own for the commit that it points to.
    order = ("HEAD", f"refs/tags/{ref}^{{}}", f"refs/tags/{ref}", f"refs/heads/{ref}", ref)
    found = [listed[name] for name in order if name in listed]
    if not found:
        raise UsageError(f"trainer {repository!r} has no branch or tag {ref!r}")
    return f"git+{url if '://' in url else Path(url).resolve().as_uri()}@{found[0]}"


def versions(result: Aggregate) -> dict[str, set[str]]:
    """Package to the versions that the processes of any path reported."""
    found: dict[str, set[str]] = {}
    for of in result.versions.values():
        for package, listed in of.items():
            found.setdefault(package, set()).update(listed)
    return found


def moved(
    before: Mapping[str, set[str]], after: Mapping[str, set[str]]
) -> list[tuple[str, str, str]]:
    """Packages whose versions are not the same: name, before, after."""
    return [
        (name, _text(before.get(name, set())), _text(after.get(name, set())))
        for name in sorted({*before, *after})
        if before.get(name, set()) != after.get(name, set())
    ]


def changed_cell(before: Aggregate, now: Aggregate) -> str:
    """Options of `parity bisect` for the first cell that fails and did not; empty without one."""
    found: Any = changes(now, before).cells
    for cell in found[found["kind"] == FAILS].head(1).itertuples(index=False):
        pair = f"--subject {cell.subject} --reference {cell.reference}"
        return f"{pair} --probe {cell.probe:02d} --seed {cell.seed}"
    return ""


def moved_text(changes: Sequence[tuple[str, str, str]], cell: str = "") -> str:
    """Markdown: which package moved, with the commands that search between its releases.

    Args:
        changes: As `moved` gives them.
        cell: Options of `parity bisect` that name a cell which changed; empty where none did.
    """
    rows = [f"| {name} | {old} | {new} |" for name, old, new in changes]
    if not rows:
        return "No package that a process reported has another version than in the run before.\n"
    text = ["| package | before | now |", "|---|---|---|", *rows, ""]
    spans = [c for c in changes if re.fullmatch(r"[\w.]+", c[1]) and re.fullmatch(r"[\w.]+", c[2])]
    if cell and spans:
        text += [
            "A cell that was green is not any more. Which release made the difference is found by"
        ]
        text += ["", "```sh"]
        text += [
            f"parity bisect --package {n}=={a}..{b} {cell}" for n, a, b in spans if n != "python"
        ]
        text += ["```", ""]
    return "\n".join(text)


def _text(found: set[str]) -> str:
    return ", ".join(sorted(found)) or "–"
