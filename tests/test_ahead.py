"""What a search will ask of the reference is captured beside it, and nobody waits for what is not wanted."""

from __future__ import annotations

import threading
import time

import pytest

from parity.bisect.ahead import ahead
from parity.bisect.causes import CauseSearch
from parity.capture import pool
from parity.capture.capacity import Jobs
from parity.capture.engine import Engine
from parity.cells.cell import Cell
from parity.cells.run import run_cell
from parity.recipe import Recipe
from parity.record import Verdict
from parity.stages import find
from parity.stages.pair import Extent
from parity.trace import Trace

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


DOZING = "tests.faulty_paths:Dozing"


def at_once(engine):
    """Processes that answer two captures of one path, of which the second begins during the first."""
    first = engine.capture(DOZING, "defaults", Recipe(), Trace()).environment["pid"]
    pids = [first]

    def capture(attempt):
        pids.append(
            engine.capture(DOZING, "defaults", Recipe(), Trace(), attempt).environment["pid"]
        )

    threads = [threading.Thread(target=capture, args=(f"-{n}",)) for n in range(2)]
    for thread in threads:
        thread.start()
        time.sleep(0.1)
    for thread in threads:
        thread.join()
    return set(pids)


def test_who_is_soon_served_by_a_process_at_work_starts_no_other(two):
    assert len(at_once(two)) == 1


def test_who_has_waited_as_long_as_a_start_takes_gets_a_process(two, monkeypatch):
    monkeypatch.setattr(pool, "START", 0.2)  # less than an answer takes
    assert len(at_once(two)) == 2


def test_a_process_that_is_started_ahead_answers_what_is_asked_next(two, told):
    two.warm(DOZING)
    two.warm(DOZING)
    [worker] = two._pool._idle
    assert (
        two.capture(DOZING, "defaults", Recipe(), Trace()).environment["pid"] == worker._process.pid
    )


def test_a_factor_is_found_without_the_float64_run_and_paths_as_shipped(two, told, small):
    """No verdict depends on them, and no sentence of a factor speaks of a side that is off."""
    stages = tuple(map(find, ("00", "06", "07")))
    changes = {"optim.eps": 1e-4}
    found = CauseSearch(two, "mlx", "mlx-lm", small, changes, stages=stages).search()
    assert [cause.factors for cause in found.causes] == [{"optim.eps": (1e-4, 1e-8)}]
    assert not [text for text in told if text.startswith("hf") or text.endswith(": defaults")]
    # Both sides were asked whether they repeat themselves, with what moves no bits left alone.
    assert len([text for text in told if text == "mlx-lm: optimizer_step"]) >= 2
