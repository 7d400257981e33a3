"""Records of many cells end in the right verdict, and every report says all of it."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pandas as pd
import pytest

from parity.cells.plan import GridRow, Plan, load_plan, write_plan
from parity.errors import UsageError
from parity.record import Record
from parity.report import html, markdown
from parity.report.write import aggregate_json, write
from parity.results.aggregate import aggregate
from parity.results.folder import read
from parity.results.texts import distinct
from tests.made_records import REFERENCES, SEEDS, STAGES, curve, matrix, put, record, screen


def test_sentences_that_differ_in_numbers_alone_are_said_once():
    texts = ["5e-07 of it is left (x/1)", "4e-07 of it is left (x/1)", "another, 3 of 4"]
    assert distinct(texts) == (texts[0], texts[2])


# Verdict and exit code


@pytest.mark.parametrize(
    ("verdicts", "verdict", "code"),
    [
        (["identical"], "identical", 0),
        (["identical", "agree"], "agree", 0),
        (["identical", "skip"], "identical", 0),
        (["identical", "inconclusive"], "inconclusive", 1),
        (["identical", "inconclusive", "diverge"], "diverge", 1),
        (["diverge", "error"], "error", 3),
        (["skip", "skip"], "inconclusive", 3),
        ([], "inconclusive", 3),
    ],
)
def test_the_worst_cell_decides(verdicts: list[str], verdict: str, code: int) -> None:
    found = aggregate([record(p, 0, v) for p, v in enumerate(verdicts)])
    assert (found.verdict, found.exit_code) == (verdict, code)


@pytest.mark.parametrize("records", [[], [record(4, 0, "skip"), record(5, 0, "skip")]])
def test_where_nothing_was_compared_nothing_is_green(records: list[Record]) -> None:
    found = aggregate(records)
    assert found.exit_code == 3
    for text in (found.reason, markdown.render(found), html.render(found), screen(records)):
        assert "nothing was compared" in text.lower()


def test_a_skip_is_listed_with_its_reason() -> None:
    found = aggregate(put(matrix(), record(4, 0, "skip", reason="no such <thing>")))
    assert found.exit_code == 0
    (gap,) = found.gaps["skip"]
    assert (gap.row.probe, gap.seeds, gap.reason) == (4, (0,), "no such <thing>")
    assert "no such &lt;thing&gt;" in html.render(found)


def test_a_cell_absent_from_the_seed_matrix_is_missing_and_named() -> None:
    gone = record(5, 1, reference="hf")
    found = aggregate([r for r in matrix() if r.name != gone.name])
    assert (found.verdict, found.exit_code) == ("missing", 3)
    (gap,) = found.gaps["missing"]
    assert gap[:2] == (GridRow("tiny", "mlx", "hf", 5, "gradient"), (1,))
    assert found.states(gap.row) == {0: "identical", 1: "missing", 3407: "identical"}
    for text in (markdown.render(found), html.render(found)):
        assert re.search(r"05 gradient, mlx vs hf · tiny, seed 1: no record", text)


def test_a_planned_row_and_seed_that_never_came_are_missing() -> None:
    plan = Plan.product((0, 1), (("mlx", "mlx-lm"), ("mlx", "hf")), ("tiny",), (0, 1))
    found = aggregate([record(0, 0), record(1, 0)], plan)
    assert found.exit_code == 3
    assert found.counts == {"identical": 2, "missing": 6}
    assert aggregate([], plan).counts == {"missing": 8}
    assert aggregate([record(0, 0), record(1, 0)]).exit_code == 0


@pytest.mark.parametrize("green", ["agree", "identical"])
def test_two_records_of_one_cell_count_as_the_worse_and_are_named(green: str) -> None:
    pair = [record(0, 0, green), record(0, 0, "diverge")]
    for records in (pair, pair[::-1]):
        found = aggregate(records)
        assert (found.exit_code, len(found.cells)) == (1, 1)
        assert "2 records for one cell" in found.problems[0]
        for text in (markdown.render(found), html.render(found)):
            assert "Warnings" in text and "2 records for one cell" in text


def test_a_record_that_contradicts_itself_is_set_aside() -> None:
    lying = record(2, 0, metrics=[])
    found = aggregate([record(1, 0), lying])
    assert (found.verdict, found.exit_code, found.counts) == (
        "missing",
        3,
        {"identical": 1, "missing": 1},
    )
    assert found.damaged == (f"{lying.name}: the verdict is identical, but no metric decides it",)
    assert "1 damaged record set aside" in found.reason
    for text in (html.render(found), screen([record(1, 0), lying], width=200)):
        assert lying.name in text and "Damaged records" in text
    assert aggregate([lying]).exit_code == 3


# Plan


def test_a_plan_round_trips_and_shards_are_put_together(tmp_path: Path) -> None:
    plan = Plan.product((0, 1), [("mlx", "hf")], ["tiny"], (0,))
    assert load_plan(write_plan(plan, tmp_path)) == plan
    other = Plan.product((0, 2), [("mlx", "hf")], ["tiny"], (7,))
    both = Plan.union([plan, other])
    assert (
        both == Plan.union([other, plan]) and both.to_json() == Plan.union([other, plan]).to_json()
    )
    assert {row.probe: seeds for row, seeds in both.rows.items()} == {0: {0, 7}, 1: {0}, 2: {7}}
    assert load_plan(write_plan(both, tmp_path)) == both


def test_a_plan_of_schema_1_is_read(tmp_path: Path) -> None:
    """The product of four lists."""
    old = {"schema_version": 1, "probes": [0, 1], "pairs": [["mlx", "hf"]], "models": ["tiny"], "seeds": [0]}  # fmt: skip
    (tmp_path / "plan.json").write_text(json.dumps(old))
    assert load_plan(tmp_path / "plan.json") == Plan.product(
        (0, 1), [("mlx", "hf")], ["tiny"], (0,)
    )


@pytest.mark.parametrize(
    "text", ["", "[]", '{"schema_version": 2}', '{"schema_version": 1}', "\xff"]
)
def test_what_is_no_plan_is_named_and_the_run_is_not_green(tmp_path: Path, text: str) -> None:
    record(1, 0).save(tmp_path / "records")
    (tmp_path / "plan.json").write_text(text, encoding="latin-1")
    run, store = read([tmp_path])
    assert run.damaged[0].startswith("plan.json: not a plan")
    assert run.aggregate(store).exit_code == 3


def test_a_newer_plan_is_wrong_use(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text('{"schema_version": 3}')
    with pytest.raises(UsageError, match="newer than this tool"):
        read([tmp_path])


# Tables


def test_pass_rate_is_green_over_decided() -> None:
    verdicts = ["identical", "agree", "diverge", "inconclusive", "skip"]
    table = aggregate([record(3, s, v) for s, v in enumerate(verdicts)]).rows
    row = table.iloc[0]
    assert (row["seeds"], row["decided"], row["pass_rate"]) == (5, 3, pytest.approx(2 / 3))
    # Wilson for 2 of 3 at 95 %, by hand: (p + z²/2n ± z sqrt(pq/n + z²/4n²)) / (1 + z²/n)
    assert [row["low"], row["high"]] == pytest.approx([0.2077, 0.9385], abs=1e-4)
    undecided = aggregate([record(3, 0, "skip")]).rows.iloc[0]
    assert undecided["decided"] == 0 and math.isnan(undecided["pass_rate"])


def test_step_differences_over_seeds() -> None:
    records = [curve(s, [0.0, 0.1 * s, 0.0, 0.01], step=2) for s in range(1, 7)]
    dloss, dgrad = aggregate(records).curves
    assert (dloss.quantity, dgrad.quantity) == ("dloss", "dgrad")
    assert [dloss.largest, dloss.median] == pytest.approx([0.6, 0.35])
    assert (dloss.first_step, dloss.over) == (2, (1, 2, 3, 4, 5, 6))
    assert dloss.systematic and (dloss.higher, dloss.lower) == (6, 0)
    assert (dgrad.largest, dgrad.first_step, dgrad.systematic) == (0, None, False)
    assert dloss.problems == dgrad.problems == ()


def test_a_series_cut_short_is_named_and_its_steps_are_kept() -> None:
    short = curve(1, [0.0, 0.0])
    lost = curve(2, [0.0] * 4)
    del lost.series["dloss"]
    found = aggregate([curve(0, [0.0] * 4), short, lost])
    assert any("dloss" in p and "seed 1: truncated, 2 of 4" in p for p in found.problems)
    assert any("dloss" in p and "seed 2: truncated, 0 of 4" in p for p in found.problems)
    steps = found.steps(found.curves[0].row, 9).set_index(["seed", "step"])
    assert len(steps) == 10
    assert steps.loc[(2, 4), "loss_reference"] == 1.0 and math.isnan(steps.loc[(2, 4), "dloss"])


def test_decoding_is_compared_seed_by_seed() -> None:
    records = [
        record(8, s, "agree", passes={"subject": {"hi": s > 5}, "reference": {"hi": True}})
        for s in range(8)
    ]
    (found,) = aggregate(records).passes
    assert (found.comparison.a, found.comparison.b, found.comparison.c) == (2, 0, 6)
    assert found.comparison.test.exact_p <= 0.05
    assert "less often" in markdown.render(aggregate(records))


def test_findings_are_listed_once_with_their_seeds() -> None:
    records = [
        record(0, s, findings=["as shipped: rank 8 in the subject", f"as shipped: off by {s}.5e-3"])
        for s in range(4)
    ]
    same, varying = aggregate(records).notes
    assert (same.kind, same.seeds, same.varies) == ("shipped", (0, 1, 2, 3), False)
    assert (varying.text, varying.varies) == ("as shipped: off by 0.5e-3", True)


def test_the_first_divergence_of_a_pair_is_named_in_the_order_of_the_stages() -> None:
    wrong = [record(p, s, "diverge", hints=[f"hint {p}"]) for p in (7, 6) for s in (0, 1)]
    found = aggregate(put(matrix(), *wrong, record(2, 0, "error")))
    (first,) = found.first
    assert (first.row.probe, first.state, first.seeds) == (6, "diverge", (0, 1))
    assert [row.probe for row in first.later] == [7]
    assert first.hints == ("hint 6", "hint 7")
    assert [r.probe for r in found.failures(99)] == [2, 6, 7, 6, 7]  # a row each, then again


def test_the_first_divergence_is_first_in_the_flow_of_data() -> None:
    """The supervised positions, probe 09, stand before the cross-entropy, probe 03."""
    wrong = [record(p, 0, "diverge") for p in (3, 8, 9, 10)]
    found = aggregate(put(matrix(), *wrong))
    (first,) = found.first
    assert first.row.probe == 9
    assert [row.probe for row in first.later] == [3, 10, 8]
    shown = [row.probe for row in found.grid if row.reference == "hf"]
    assert shown == sorted(shown)


# Reports


def test_nan_and_infinity_survive_in_json() -> None:
    nan = curve(0, [0.0, float("nan"), 0.0, 0.0], step=2)
    found = aggregate([nan, record(4, 0, "skip")])
    data = json.loads(aggregate_json(found), parse_constant=pytest.fail)  # any reader can parse it
    assert data["curves"][0]["largest"] == "NaN"
    skipped = next(row for row in data["rows"] if row["probe"] == 4)
    assert skipped["pass_rate"] == "NaN"


def test_order_of_records_does_not_matter(tmp_path: Path) -> None:
    wrong = [record(6, s, "diverge", findings=[f"found {s}"]) for s in SEEDS]
    records = put(matrix(), *wrong, *(curve(s, [0.0, 1e-4 * s, 0.0, 0.0]) for s in SEEDS))
    records += [record(5, 0, reason="the same cell again"), curve(2, [0.0, 1e-4])]
    files = write(aggregate(records), tmp_path / "a")
    again = write(aggregate(records[::-1]), tmp_path / "b")
    names = [
        "aggregate.json", "summary.csv", "cells.csv", "cells.parquet", "junit.xml", "report.md",
        "report.html",
    ]  # fmt: skip
    assert [f.name for f in files] == names
    for one, other in zip(files, again, strict=True):
        assert one.read_bytes() == other.read_bytes(), one.name
    assert len(pd.read_csv(files[1])) == len(STAGES) * len(REFERENCES)
