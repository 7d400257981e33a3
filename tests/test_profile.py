"""Where the time went: spans of lanes, their sums, and the page."""

from __future__ import annotations

import builtins
import json
import os
import subprocess
import sys
import threading
import xml.etree.ElementTree as ElementTree

import pytest

from parity import timing
from parity.capture import forking
from parity.capture.engine import Engine
from parity.recipe import Recipe
from parity.report.profile import bars, profile, rows, save, text, ticks
from parity.timing import CAPTURE, COMPARE, COMPILE, IMPORT, LOAD, PROCESS, READ, WAIT, Span
from parity.trace import Trace
from tests.cost import long

PATH = "tests.third_party:NumpyAdamW"


@pytest.fixture
def timeline():
    yield timing.start(imports=True)
    timing.stop()


def example():
    return profile(
        [
            Span("main", WAIT, "cells", 0, 10),
            Span("cell", COMPARE, "02", 1, 9),
            Span("cell", READ, "mlx", 2, 3),
            Span("cell", WAIT, "hf", 4, 8),
            Span("hf (1)", CAPTURE, "logits", 4, 8),
            Span("hf (1)", LOAD, "model", 5, 7),
            Span("mlx (2)", CAPTURE, "logits", 6, 8),
        ],
        0,
        10,
    )


def test_at_each_moment_the_innermost_span_of_a_lane_counts():
    assert example().by_lane() == {
        "main": {WAIT: 10},
        "cell": {COMPARE: 3, READ: 1, WAIT: 4},
        "hf (1)": {CAPTURE: 2, LOAD: 2},
        "mlx (2)": {CAPTURE: 2},
    }
    assert example().captures() == {"logits": {"hf (1)": 2, "mlx (2)": 2}}


def test_a_moment_is_divided_among_the_lanes_that_work_and_waiting_explains_nothing():
    found = example()
    assert found.by_kind() == pytest.approx({CAPTURE: 1 + 0.5 + 1, LOAD: 1.5, READ: 1, COMPARE: 3})
    assert found.explained() == pytest.approx(0.8)
    assert rows(found)[-1] == ("not explained", pytest.approx(2), pytest.approx(0.2))
    assert "explained 80.0%" in text(found)


def test_siblings_that_overlap_are_not_counted_twice():
    spans = [
        Span("w", CAPTURE, "train", 0, 10),
        Span("w", COMPILE, "train", 4, 10),
        Span("w", LOAD, "m", 3, 5),
        Span("w", LOAD, "beyond the end", 9, 12),
    ]
    found = profile(spans, 0, 10)
    assert found.by_lane() == {"w": {CAPTURE: 3, LOAD: 1 + 1, COMPILE: 5}}
    assert found.explained() == pytest.approx(1)
    assert profile([], 0, 10).explained() == 0


def test_the_page_is_well_formed_and_the_picture_has_every_lane(tmp_path):
    found = profile([*example().pieces, Span("a <b> & c", PROCESS, "<x>", 1, 2)], 0, 10)
    data, page = save(tmp_path, found)
    html = page.read_text()
    picture = ElementTree.fromstring(html[html.index("<svg") : html.index("</svg>") + 6])
    shown = {element.text for element in picture.iter("text")}
    assert shown >= {*found.lanes, "10 s"}
    assert len([*picture.iter("rect")]) == sum(map(len, bars(found).values()))
    assert json.loads(data.read_text())["lanes"]["hf (1)"] == {CAPTURE: 2, LOAD: 2}


@pytest.mark.parametrize("wall", [0.03, 1.0, 7.3, 250.0, 90_000.0])
def test_the_axis_has_a_few_marks(wall):
    assert 2 <= len(ticks(wall)) <= 11


def test_many_short_spans_become_few_bars():
    spans = [Span("w", READ, str(n), n / 1e3, (n + 1) / 1e3) for n in range(10_000)]
    [drawn] = bars(profile(spans, 0, 10)).values()
    assert len(drawn) == 1


def test_threads_are_lanes_and_imports_are_timed_until_the_end(timeline):
    def work():
        with timing.span(COMPARE, "cell"):
            pass

    thread = threading.Thread(target=work, name="cell_0")
    thread.start()
    thread.join()
    timing.report("hf (1)", [["", LOAD, "model", 1.0, 2.0]])
    with timing.span(READ, "x", lane="other"):
        pass
    lanes = {(span.lane, span.kind) for span in timeline.spans}
    assert {("cell_0", COMPARE), ("hf (1)", LOAD), ("other", READ)} <= lanes
    wrapped = builtins.__import__
    timing.stop()
    assert builtins.__import__ is not wrapped
    assert timing.VARIABLE not in os.environ
    before = len(timeline.spans)
    with timing.span(READ, "after the end"):
        pass
    assert len(timeline.spans) == before


def test_compilers_that_a_capture_starts_are_told_apart(timeline):
    with timing.capture("train"):
        subprocess.run([sys.executable, "-c", "sum(range(3_000_000))"], check=True)
    kinds = {span.kind: span for span in timeline.spans}
    assert kinds[COMPILE].label == "train"
    assert kinds[CAPTURE].start <= kinds[COMPILE].start < kinds[COMPILE].end


def test_a_profiled_worker_reports_its_time_and_computes_the_same(tmp_path, timeline):
    with Engine(tmp_path / "profiled") as engine:
        profiled = engine.capture(PATH, "defaults", Recipe(), Trace())
    spans = timeline.take()
    timing.stop()
    with Engine(tmp_path / "plain") as engine:
        plain = engine.capture(PATH, "defaults", Recipe(), Trace())
    assert profiled.digest() == plain.digest()
    [worker] = {span.lane for span in spans if "(" in span.lane}
    kinds = {span.kind for span in spans if span.lane == worker}
    assert kinds >= {PROCESS, IMPORT, READ, CAPTURE}
    starts = [span for span in spans if span.lane == worker and span.kind == PROCESS]
    called = [span for span in spans if span.kind == WAIT]
    assert called[0].start <= starts[0].start < starts[0].end <= called[0].end, "one clock"
    assert timeline.spans == []


@pytest.mark.long
@pytest.mark.parametrize("command", ["run", long("bisect")])
def test_a_command_explains_its_wall_time(tmp_path, command):
    words = ["--subject", PATH, "--reference", "hf", "--set-subject", "optim.lr=0.5"]
    words += ["--probes", "06", "--seeds", "1"] * (command == "run")
    alone = {name: value for name, value in os.environ.items() if name != forking.VARIABLE}
    done = subprocess.run(
        [sys.executable, "-m", "parity.cli", command, *words, "--profile", "--out", str(tmp_path)],
        # With imports of its own, as a person's command has them.
        env={**alone, "PARITY_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    data = json.loads((tmp_path / "profile.json").read_text())
    assert data["explained"] > 0.9, done.stderr
    assert sum(data["kinds"].values()) == pytest.approx(data["explained"] * data["wall"])
    assert "main" in data["lanes"]
    assert sum("(" in lane for lane in data["lanes"]) >= 2, "a lane for each worker"
    assert "optimizer_step" in data["captures"]
    assert (tmp_path / "profile.html").exists()
    assert "explained" in done.stderr
    if command == "run":  # and without it nothing is written
        plain = tmp_path / "plain"
        subprocess.run(
            [sys.executable, "-m", "parity.cli", command, *words, "--out", str(plain)],
            env={**os.environ, "PARITY_CACHE": str(tmp_path / "cache")},
            capture_output=True,
            check=False,
        )
        assert (plain / "report.html").exists()
        assert not list(plain.glob("profile*"))
