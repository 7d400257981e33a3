"""pytest plugin: the options of a run, and one test for each cell, run by the same engine.

A probe is a test that takes the fixture `cell`; its module names the stage: `STAGE = "logits"`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from parity.cells.kept import run_kept
from parity.report.text import describe

if TYPE_CHECKING:
    from parity.capture.engine import Engine
    from parity.cells.cell import Cell
    from parity.cells.matrix import Matrix
    from parity.record import Record


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the options of a run."""
    group = parser.getgroup("parity", "cross-framework parity probes")
    group.addoption("--subject", default="mlx", help="path under question (mlx)")
    group.addoption(
        "--reference",
        action="append",
        default=None,
        help="path it is compared with (mlx-lm and hf)",
    )
    group.addoption(
        "--seeds", default="3", help="how many seeds, or the seeds: 3407,0,1 or 99, (3)"
    )
    group.addoption("--recipe", default="default", help="recipe of the fixtures or TOML file")
    group.addoption(
        "--factor", action="append", default=[], help="FACTOR=VALUE, like parity run --set"
    )
    group.addoption(
        "--subject-factor",
        action="append",
        default=[],
        help="FACTOR=VALUE on the subject's side only",
    )
    group.addoption("--device", default=None, help="where hf and trl compute: cpu or cuda (cpu)")
    group.addoption("--expected", default=None, help="file of known divergences (the fixtures')")
    group.addoption("--no-expected", action="store_true", help="expect no divergence")
    group.addoption("--parity-out", default=None, help="folder that takes the records")


_OPTIONS = ("--seeds", "--recipe", "--factor", "--subject-factor", "--subject", "--reference")


def pytest_configure(config: pytest.Config) -> None:
    """Checks the options once, with one error, before each probe's module would."""
    _choose_device(config)
    words = config.invocation_params.args
    if any(str(word).startswith(_OPTIONS) for word in words):
        _matrix(config, "config")


def _choose_device(config: pytest.Config) -> None:
    """Sets the device before any worker starts; processes of xdist inherit it from the first."""
    from parity.capture import devices
    from parity.errors import UsageError

    name = config.getoption("--device")
    if hasattr(config, "workerinput") or not (name or devices.VARIABLE in os.environ):
        return
    try:
        devices.choose(name)
    except UsageError as error:
        raise pytest.UsageError(str(error)) from None


def _matrix(config: pytest.Config, stage: str) -> Matrix:
    from parity import recipe as recipes
    from parity.capture.checks import check_run
    from parity.capture.engine import knobs
    from parity.cells import matrix as runs
    from parity.errors import UsageError
    from parity.stages import find

    references = tuple(config.getoption("--reference") or runs.REFERENCES)
    try:
        changes = runs.sides([("subject", text) for text in config.getoption("--subject-factor")])
        matrix = runs.Matrix(
            (find(stage),),
            config.getoption("--subject"),
            references,
            runs.parse_seeds(config.getoption("--seeds")),
            recipes.load(
                config.getoption("--recipe"),
                config.getoption("--factor"),
                knobs([config.getoption("--subject"), *references]),
            ),
            changes,
            config.getoption("--recipe"),
        )
        check_run(matrix.subject, matrix.references, matrix.recipe)
    except UsageError as error:
        raise pytest.UsageError(str(error)) from None
    return matrix


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test a cell, with ids that `-k` can select."""
    stage = getattr(metafunc.module, "STAGE", None)
    if "cell" in metafunc.fixturenames and stage is not None:
        cells = _matrix(metafunc.config, stage).cells()
        metafunc.parametrize("cell", cells, ids=[cell.id for cell in cells])


def pytest_collection_finish(session: pytest.Session) -> None:
    """Keeps the plan of the cells that are selected, those planned there before included.

    Each process of xdist collects all of them, and writes the same.
    """
    from parity.cells.cell import Cell
    from parity.cells.plan import NAME, Plan, load_plan, write_plan

    found = (getattr(item, "callspec", None) for item in session.items)
    cells = [c for spec in found if spec and isinstance(c := spec.params.get("cell"), Cell)]
    if not cells or session.config.option.collectonly:
        return
    folder, plans = _folder(session.config), [Plan.of(cells)]
    with contextlib.suppress(OSError, ValueError):  # none yet, or one that this replaces
        plans.append(load_plan(folder / NAME))
    write_plan(Plan.union(plans), folder)


def _folder(config: pytest.Config) -> Path:
    return Path(config.getoption("--parity-out") or Path("reports") / "pytest")


@pytest.fixture(scope="session")
def parity_engine() -> Iterator[Engine]:
    """The engine of this pytest process; under xdist all processes share one cache on disk."""
    from parity.capture.engine import Engine

    with Engine() as engine:
        yield engine


@pytest.fixture
def probe(
    parity_engine: Engine,
    pytestconfig: pytest.Config,
    record_property: Callable[[str, object], None],
) -> Callable[[Cell], Record]:
    """Runs a cell and writes its record; anything but green ends the test with the record's text.

    A known divergence is an expected failure; a deterministic one that does not diverge fails.
    """
    from parity.record import Verdict
    from parity.results import expected

    folder = _folder(pytestconfig)

    def run(cell: Cell) -> Record:
        named, none = (pytestconfig.getoption(name) for name in ("--expected", "--no-expected"))
        subject, reference = cell.names.values()
        known = expected.chosen(subject, [reference], named and Path(named), none)
        expected.keep(known, folder)
        record = expected.mark(run_kept(parity_engine, cell, repeat=True), known)
        record_property("parity_record", str(record.save(folder / "records")))
        if record.verdict is Verdict.SKIP:
            pytest.skip(record.reason)
        if record.expected and not record.verdict.green:
            pytest.xfail(record.expected)
        if record.expected or not record.verdict.green:
            pytest.fail(describe(record), pytrace=False)
        return record

    return run
