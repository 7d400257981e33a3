"""The same cells as CSV, Parquet, JUnit's XML, Markdown and JSON; two runs side by side in each report."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree as ET

import pandas as pd
import pytest
from click.testing import CliRunner

from parity.cells.plan import Plan
from parity.cli import main
from parity.report import cells, markdown
from parity.report.write import FORMATS, aggregate_json, write
from parity.results.aggregate import aggregate
from parity.results.expected import load
from tests.test_merge import record, shard

VERDICTS = ["agree", "identical", "diverge", "inconclusive", "error", "skip", "diverge"]
# What JUnit's schema (Jenkins, junit-10.xsd) allows, with `error`, as every tool writes it.
ELEMENTS = {
    "testsuites": {"name", "time", "tests", "failures", "errors"},
    "testsuite": {"name", "tests", "failures", "errors", "skipped", "time"},
    "testcase": {"name", "classname", "time"},
    "failure": {"type", "message"},
    "error": {"type", "message"},
    "skipped": {"type", "message"},
}


@pytest.fixture
def result(tmp_path: Path):
    """A cell in each state."""
    text = '[[entry]]\nprobe = 5\nreason = "known"\nat_most = 1e9\ndeterministic = false\nseeds = [{}]\n'
    (tmp_path / "mlx-vs-hf.toml").write_text(text.format("1"))
    entries = load(tmp_path / "mlx-vs-hf.toml")
    found = [record(s, v, reason=f'<{v}> & "{s}"\x01') for s, v in enumerate(VERDICTS)]
    found += [record(0, "diverge", probe=2, reproduce="run --seeds 0,")]
    plan = Plan.product([2], [("mlx", "hf")], ["tiny"], [0, 9])
    return aggregate(found, plan, entries, ["a.json: <cut> short"])


def test_every_cell_is_a_line_of_the_tables(result, tmp_path):
    write(result, tmp_path, ["csv", "parquet"])
    frame = pd.read_parquet(tmp_path / "cells.parquet")
    assert len(frame) == len(result.cells) == 9
    assert frame["state"].tolist() == result.cells["state"].tolist()
    missing = frame[frame["state"] == "missing"].iloc[0]
    assert (missing["probe"], missing["seed"]) == (2, 9)
    assert missing[["verdict", "excess", "metric", "value", "reason", "reproduce"]].isna().all()
    bad = frame[(frame["probe"] == 2) & (frame["seed"] == 0)].iloc[0]
    assert (bad["metric"], bad["value"], bad["tolerance"], bad["excess"]) == (
        "loss",
        1.0,
        1e-6,
        1e6,
    )
    assert bad["reproduce"] == "run --seeds 0,"
    with (tmp_path / "cells.csv").open(newline="") as file:
        lines = [*csv.DictReader(file)]
    assert [*lines[0]] == [*frame.columns]
    assert [line["state"] for line in lines] == frame["state"].tolist()
    assert [line["reason"] for line in lines] == frame["reason"].fillna("").tolist()


def test_every_cell_is_a_test_case_and_the_counts_are_theirs(result, tmp_path):
    write(result, tmp_path, ["junit"])
    root = ET.parse(tmp_path / "junit.xml").getroot()
    for element in root.iter():
        assert set(element.attrib) <= ELEMENTS[element.tag], element.tag
    cases = [*root.iter("testcase")]
    assert len(cases) == int(root.get("tests")) == len(result.cells) + 1
    assert len({(c.get("classname"), c.get("name")) for c in cases}) == len(cases)
    for suite in root:
        inside = Counter(child.tag for case in suite for child in case)
        counts = {name: int(suite.get(name)) for name in ("failures", "errors", "skipped")}
        assert counts == {n: inside[n.removesuffix("s")] for n in ("failures", "errors")} | {
            "skipped": inside["skipped"]
        }
        assert len(suite) == int(suite.get("tests"))
    total = {name: sum(int(s.get(name)) for s in root) for name in ("failures", "errors")}
    assert {name: int(root.get(name)) for name in total} == total
    states = Counter(child.get("type") for case in cases for child in case)
    assert states == {
        "diverge": 1, "expected": 2, "inconclusive": 1, "stale": 1, "error": 1, "missing": 1,
        "skip": 1, "damaged": 1,
    }  # fmt: skip
    failure = next(c for c in cases if c.get("name") == "02 logits, seed 0").find("failure")
    assert "loss: 1, 1e-06 allowed" in failure.text and "reproduce: run --seeds 0," in failure.text


def test_files_in_parts_are_the_files_at_once(result, tmp_path, monkeypatch):
    write(result, tmp_path / "once", ["csv", "junit"])
    monkeypatch.setattr(cells, "AT_ONCE", 2)
    write(result, tmp_path / "parts", ["csv", "junit"])
    for name in ("cells.csv", "junit.xml"):
        assert (tmp_path / "once" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


def test_of_nothing_all_files_are_written(tmp_path):
    files = write(aggregate([]), tmp_path)
    assert len(files) == sum(map(len, FORMATS.values()))
    assert ET.parse(tmp_path / "junit.xml").getroot().get("tests") == "0"


# Markdown


@pytest.mark.parametrize("limit", [3000, 6000, 20_000, 1_000_000])
def test_markdown_fits_the_worst_first_and_says_what_it_cut(limit):
    noise = [f"finding {'x' * 80} {i}" for i in range(30)]
    found = [
        record(seed, "diverge" if seed % 3 else "agree", probe=probe, findings=noise)
        for seed in range(40)
        for probe in (2, 5)
    ]
    result = aggregate(found)
    text = markdown.render(result, limit)
    assert len(text.encode()) <= limit
    assert text.startswith("## Parity: ✗ diverge")
    shown = text.count("<details>")
    assert shown == 52 or f"…and {52 - shown} more: see report.html" in text or limit < 6000
    assert ("Cut short to fit" in text) == (limit < 1_000_000)
    assert "first at probe 02 logits" in text


def test_rows_and_pairs_that_fail_come_first():
    found = [record(0), record(0, "diverge", probe=2)]
    text = markdown.render(aggregate(found))
    assert text.index("02 logits") < text.index("05 gradient")
    many = markdown.render(aggregate([record(s, "diverge" if s else "agree") for s in range(50)]))
    assert re.search(r"\| probe \| diverge \| agree \|", many) and "| 49 | 1 |" in many


# JSON


def test_json_stays_small_for_many_seeds():
    few, many = (aggregate([record(s, "diverge") for s in range(n)]) for n in (60, 600))
    sizes = [len(aggregate_json(r)) for r in (few, many)]
    assert sizes[1] < 1.2 * sizes[0]
    first = json.loads(aggregate_json(many))["first"][0]
    assert first["seeds"]["number"] == 600 and len(first["seeds"]["first"]) == 50


# Two runs


def test_every_report_says_what_changed(tmp_path):
    old = shard(tmp_path / "old", record(0), record(1, "diverge"), record(2), seeds=(0, 1, 2))
    new = shard(tmp_path / "new", record(0, "diverge"), record(1), record(2), seeds=(0, 1, 2))
    out = tmp_path / "out"
    words = ["report", new, "--against", old, "--out", out, "--format", "json,markdown"]
    done = CliRunner().invoke(main, [*map(str, words)])
    assert done.exit_code == 1, done.output
    assert "Since the earlier run: 1 newly failing, 1 newly fixed" in done.output
    assert "1 newly failing, 1 newly fixed." in (out / "report.md").read_text().lower()
    data = json.loads((out / "aggregate.json").read_text())["changes"]
    assert data["counts"] == {"newly failing": 1, "newly fixed": 1}
    assert [cell["seed"] for cell in data["cells"]] == [0, 1]
    assert not (new / "report.md").exists()


def test_a_format_that_does_not_exist_is_wrong_use(tmp_path):
    record(0).save(tmp_path / "records")
    done = CliRunner().invoke(main, ["report", str(tmp_path), "--format", "html,pdf"])
    assert done.exit_code == 2 and "--format 'pdf': give some of json" in done.output
