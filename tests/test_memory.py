"""The peak memory of a worker: in the record of each side, in no comparison of environments."""

from __future__ import annotations

import subprocess
import sys

import pytest

from parity.capture import machine
from parity.capture.engine import Engine
from parity.cells.cell import Cell
from parity.cells.run import run_cell
from parity.recipe import Recipe
from parity.report import html, labels, markdown
from parity.results.aggregate import aggregate
from parity.stages import find
from parity.trace import Trace

REFERENCE = "tests.third_party:NumpyAdamW"
MEGABYTE = 1_000_000


def test_a_process_does_not_count_the_memory_of_what_started_it():
    """On Linux `ru_maxrss` does, by the fork."""
    held = bytearray(400 * MEGABYTE)
    held[::4096] = b"x" * len(held[::4096])
    script = "from parity.capture import machine; print(machine.peak_memory())"
    out = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout
    assert 5 * MEGABYTE < int(out) < 200 * MEGABYTE
    assert machine.peak_memory() >= 400 * MEGABYTE


def test_it_makes_no_environment_another():
    first, second = {"device": "cpu", machine.PEAK_MEMORY: 1}, {"device": "cpu"}
    assert machine.differences(first, second) == []
    assert machine.differences(first, {**first, machine.PEAK_MEMORY: 2}) == []


@pytest.mark.long
def test_record_and_report_show_it_for_each_side(tmp_path):
    with Engine(tmp_path / "cache") as engine:
        cell = Cell(find("optimizer_step"), REFERENCE, "hf", Recipe())
        record = run_cell(engine, cell)
        trace = engine.capture("hf", "defaults", Recipe(), Trace())
    peaks = [side.environment[machine.PEAK_MEMORY] for side in (record.subject, record.reference)]
    assert all(isinstance(peak, int) and peak > 20 * MEGABYTE for peak in peaks)
    assert peaks[1] > peaks[0], "torch takes more than NumPy"
    assert isinstance(trace.environment[machine.PEAK_MEMORY], int)
    result = aggregate([record])
    shown = labels.memory_of_run(result)
    assert shown == f"{peaks[0] / 1e6:,.0f} MB ({REFERENCE}), {peaks[1] / 1e6:,.0f} MB (hf)"
    for page in (html.render(result), markdown.render(result)):
        assert "eak memory of the processes" in page
        assert f"{peaks[1] / 1e6:,.0f} MB (hf)" in page


def test_a_side_has_the_greatest_of_its_captures(engine, small):
    """A worker's first capture of a cell says less than its last."""
    cell = Cell(find("gradient"), "mlx", "mlx-lm", small)
    record = run_cell(engine, cell)
    captures = [
        engine.capture("mlx", "gradient", small, rows)
        for rows, _ in find("gradient").inputs(_context(engine, cell))
    ]
    peaks = [trace.environment[machine.PEAK_MEMORY] for trace in captures]
    assert record.subject.environment[machine.PEAK_MEMORY] == max(peaks)


def _context(engine, cell):
    from parity.cells.run import context_of

    return context_of(engine, cell)
