"""The jobs of a workflow: runner × recipe × subject × probe group × seed shard, and the cells they fill."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from parity.cells.matrix import parse_probes, parse_seeds
from parity.cells.plan import Plan
from parity.errors import UsageError
from parity.results import folder as folders
from parity.results.aggregate import Aggregate

GROUPS = ("00,01,02,03,04,05,06,09,10", "07,08,11")
"""Probes of one stage each, and those that train: about as long as each other."""
MOST_JOBS = 256
"""What GitHub takes in one matrix."""


@dataclass(frozen=True)
class Job:
    """One job of the matrix; a runner works on it alone."""

    name: str
    """Of its artifact."""
    title: str
    runner: str
    arguments: str
    """Of `parity run`, quoted for a shell."""


@dataclass(frozen=True)
class Request:
    """What a workflow is to run.

    Attributes:
        runners: Labels of runners.
        subjects: Paths under question; `PATH@RELEASE` pins a release for its own cells alone.
        recipes: Names or files; each has another model.
        groups: Lists of probes that run in one job.
        shards: Number of jobs that the seeds are dealt out to.
        settings: FACTOR=VALUE for every cell.
    """

    runners: tuple[str, ...]
    subjects: tuple[str, ...]
    references: tuple[str, ...]
    recipes: tuple[str, ...]
    groups: tuple[str, ...]
    seeds: tuple[int, ...]
    shards: int
    settings: tuple[str, ...] = ()


def read_request(
    runners: str, subjects: str, references: str, recipes: str,
    groups: str, seeds: str, shards: int, settings: str,
) -> Request:  # fmt: skip
    """A request from the texts of a workflow's inputs: lists are separated by spaces.

    Raises:
        UsageError: A list is empty or names something twice, or a runner's label is no label.
    """
    lists = {
        "runners": runners, "subject": subjects, "reference": references, "recipe": recipes,
        "groups": groups,
    }  # fmt: skip
    found: dict[str, tuple[str, ...]] = {}
    for name, text in lists.items():
        found[name] = tuple(text.split())
        if not found[name]:
            raise UsageError(f"{name} {text!r}: give at least one, separated by spaces")
        if twice := [x for x in found[name] if found[name].count(x) > 1]:
            raise UsageError(f"{name} {text!r}: {twice[0]} stands twice")
    for label in found["runners"]:
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", label):
            raise UsageError(f"runners {label!r}: a label such as macos-26")
    try:
        words = tuple(shlex.split(settings))
    except ValueError as error:
        raise UsageError(f"settings {settings!r}: {error}") from None
    for word in words:
        if not re.match(r"[a-z_]+(\.[a-z_]+)+=", word):
            raise UsageError(f"settings {word!r}: write FACTOR=VALUE, as model.dtype=bfloat16")
    numbers = parse_seeds(seeds)
    if not 1 <= shards <= len(numbers):
        raise UsageError(f"shards {shards}: give a number from 1 to the {len(numbers)} seeds")
    return Request(
        found["runners"], found["subject"], found["reference"], found["recipe"],
        found["groups"], numbers, shards, words,
    )  # fmt: skip


def jobs(request: Request) -> list[Job]:
    """The jobs, one runner after the other.

    Raises:
        UsageError: A probe is unknown or in two groups, or there are more jobs than GitHub takes.
    """
    probes = [stage.number for group in request.groups for stage in parse_probes([group])]
    if twice := [f"{n:02d}" for n in probes if probes.count(n) > 1]:
        raise UsageError(f"groups {' '.join(request.groups)!r}: probe {twice[0]} stands twice")
    seeds = [request.seeds[i :: request.shards] for i in range(request.shards)]
    found: list[Job] = []
    for runner, recipe, subject, group, shard in product(
        request.runners, request.recipes, request.subjects, request.groups, seeds
    ):
        words = ["--subject", subject]
        words += [word for name in request.references for word in ("--reference", name)]
        # One number alone would be a count.
        words += ["--probes", group, "--seeds", ",".join(map(str, shard)) + "," * (len(shard) == 1)]
        words += ["--recipe", recipe] if recipe != "default" else []
        words += [word for text in request.settings for word in ("--set", text)]
        # Artifacts are named by the job: no sign that a file's name cannot have.
        place = f"{runner}-{len([j for j in found if j.runner == runner]) + 1:03d}"
        listed = ", ".join(map(str, shard))
        title = f"{runner} · {subject} · {recipe} · probes {group} · seeds {listed}"
        found.append(Job(place, title, runner, shlex.join(words)))
    if len(found) > MOST_JOBS:
        raise UsageError(
            f"{len(found)} jobs, GitHub takes {MOST_JOBS} in a matrix: use fewer shards or groups"
        )
    return found


def plan(request: Request) -> Plan:
    """The cells that all jobs of one runner fill together.

    Raises:
        UsageError: A recipe is unknown, or two recipes have models of one name.
    """
    from parity import recipe as recipes

    # Knobs of a trainer that is not installed here cannot be read, and name no model.
    chosen = [text for text in request.settings if text.startswith("model.")]
    models = [Path(recipes.load(name, chosen).model.source).name for name in request.recipes]
    if len(set(models)) < len(models):
        raise UsageError(
            f"recipe {' '.join(request.recipes)!r}: their models are {', '.join(models)}; "
            "a report tells cells apart by the name of the model: run them one after the other"
        )
    numbers = {stage.number for group in request.groups for stage in parse_probes([group])}
    pairs = sorted(product(request.subjects, request.references))
    return Plan.product(sorted(numbers), pairs, sorted(models), request.seeds)


def outputs(request: Request) -> str:
    """Lines for `$GITHUB_OUTPUT`: the matrix of jobs and the runners."""
    matrix = [vars(job) for job in jobs(request)]
    return f"jobs={json.dumps(matrix)}\nrunners={json.dumps(request.runners)}\n"


def outcome(folder: Path, code: int) -> tuple[int, str]:
    """The exit code of a job after `parity run` ended with `code`, and the reason for it.

    A divergence is reported once, where all jobs are put together, and is no failure of a job. A
    process that died after its last record was written has done its work: mlx 0.32.1 could do so on
    macOS.
    """
    if code in (0, 2, 3):
        return code, ""
    if code == 1:
        return 0, "cells that are not green are reported where all jobs are put together"
    died = f"parity run ended with {code}"
    try:
        found = read(folder)
    except UsageError as error:
        return 3, f"{died}: {error}"
    if found.exit_code == 3:
        return 3, f"{died}: {found.reason}"
    return 0, f"{died} after all its records were written: {found.reason}"


def read(folder: Path) -> Aggregate:
    """The results of all records below a folder.

    Raises:
        UsageError: There are none, or one is of another schema version.
    """
    run, records = folders.read([folder])
    return run.aggregate(records)
