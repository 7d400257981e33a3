"""What a search will ask of the reference is captured beside it, and nobody waits for what is not wanted."""

from __future__ import annotations

import threading
import time

import pytest

from parity.bisect.ahead import ahead
from parity.capture.capacity import Jobs
from parity.capture.engine import Engine
from parity.cells.cell import Cell
from parity.cells.run import run_cell
from parity.recipe import Recipe
from parity.record import Verdict
from parity.stages import find
from parity.stages.pair import Extent

PATIENCE = 600  # turns of a tenth of a second until a test gives up


REFERENCE = "tests.third_party:NumpyAdamW"


@pytest.fixture
def told():
    """What was started, in words."""
    return []


@pytest.fixture
def two(empty_cache, told):
    with Engine(cache=empty_cache, jobs=Jobs(2, 2), notice=told.append) as engine:
        yield engine


def wait_for(happened):
    for _ in range(PATIENCE):
        if happened():
            return
        time.sleep(0.1)
    pytest.fail("it never happened")


def test_the_reference_is_captured_and_not_again(two, told):
    cell = Cell(find("06"), "tests.faulty_paths:Twin", REFERENCE, Recipe())
    with ahead(two, [cell]):
        wait_for(lambda: two.captured == 2)  # the stage has two sets of settings
    assert set(told) == {f"{REFERENCE}: optimizer_step"}
    told.clear()
    assert run_cell(two, cell, extent=Extent.VERDICT).verdict is Verdict.IDENTICAL
    assert told == ["tests.faulty_paths:Twin: optimizer_step"] * 2


def test_a_slow_capture_is_given_up_with_the_search(two):
    cell = Cell(find("00"), REFERENCE, "tests.faulty_paths:Asleep", Recipe())
    with ahead(two, [cell]):
        wait_for((two.cache / "asleep").exists)
    assert two.captured == 0


def test_one_process_at_once_is_left_to_the_search(empty_cache):
    cell = Cell(find("06"), "tests.faulty_paths:Twin", REFERENCE, Recipe())
    before = threading.active_count()
    with Engine(cache=empty_cache, jobs=Jobs(1, 1)) as alone, ahead(alone, [cell]):
        assert threading.active_count() == before
