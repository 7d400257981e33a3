"""A record that is read is judged by its metrics: none is green because it says so."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from parity.commands.report import report
from parity.errors import UsageError
from parity.judge.compare import compare, compare_series
from parity.judge.noise import Noise
from parity.record import SCHEMA, DamagedRecord, Metric, Record, Side, Verdict, load
from parity.results.folder import records_of


def metric(value: float = 0.0, tolerance: float = 0.0, verdict: str = "identical", **fields):
    return Metric(
        name="loss",
        verdict=Verdict(verdict),
        value=value,
        tolerance=tolerance,
        minimum_required_tolerance=value,
        **fields,
    )


def record(verdict: str = "identical", *metrics: Metric, **fields) -> Record:
    sides = {
        side: Side(path=path, recipe={}, digest="0")
        for side, path in (("subject", "mlx"), ("reference", "hf"))
    }
    fields = {"probe": 5, "stage": "gradient", "seed": 0} | fields
    return Record(
        tool="0", model="tiny", verdict=verdict, reason="so", metrics=[*metrics], **sides, **fields
    )


HONEST = [
    record("identical", metric()),
    record("agree", metric(), metric(1e-7, 1e-6, "agree")),
    record("agree", metric(2e-6, 1e-6, "agree", accepted="nearer to float64")),
    record("identical", metric(), metric(math.nan, math.nan, "agree", gate=False)),
    record("diverge", metric(1.0, 0.0, "diverge")),
    record("diverge", metric(math.nan, 0.0, "diverge")),
    record("diverge"),  # names that do not match leave no metrics
    record("inconclusive", metric(1.0, 0.0, "diverge")),  # the subject does not repeat itself
    record("error", metric()),
    record("skip"),
    record("inconclusive"),
]

DAMAGED = [
    (record("identical"), "no metric decides"),
    (record("agree", metric(gate=False)), "no metric decides"),
    (record("identical", metric(math.nan)), "nan"),
    (record("agree", metric(math.nan, math.nan, "agree")), "nan"),
    (record("agree", metric(math.inf, 1.0, "agree")), "inf"),
    (record("agree", metric(1e-7, math.nan, "agree")), "tolerance is nan"),
    (record("agree", metric(1e-7, math.inf, "agree")), "tolerance is inf"),
    (record("agree", metric(math.nan, 0.0, "agree", accepted="nearer")), "nan"),
    (record("agree", metric(2e-6, 1e-6, "agree")), "2e-06 is over the tolerance 1e-06"),
    (record("identical", metric(1e-7, 1e-6)), "identical"),
    (record("agree", metric(-1.0, 1e-6, "agree")), "-1"),
    (record("identical", metric(), metric(1e-7, 1e-6, "agree")), "its metrics give agree"),
    (record("agree", metric(1.0, 0.0, "diverge")), "its metrics give diverge"),
    (record("identical", metric(verdict="inconclusive")), "its metrics give inconclusive"),
    (record("identical", metric(verdict="skip")), "its metrics give skip"),
    (record("diverge", metric()), "its metrics give identical"),
]


@pytest.mark.parametrize("found", HONEST, ids=range(len(HONEST)))
def test_a_verdict_that_follows_from_its_metrics_is_read_back_exactly(found, tmp_path: Path):
    assert repr(load(found.save(tmp_path))) == repr(found)  # NaN is unequal to itself


@pytest.mark.parametrize(("found", "why"), DAMAGED, ids=range(len(DAMAGED)))
def test_a_verdict_that_does_not_is_refused_with_its_file(found, why, tmp_path: Path):
    file = found.save(tmp_path)
    with pytest.raises(DamagedRecord, match=file.name) as caught:
        load(file)
    assert why in caught.value.reason


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"schema_version": "2"}', '{"schema_version": 2}']
)
def test_a_file_that_is_no_record_is_damaged(text, tmp_path: Path):
    file = tmp_path / "x.json"
    file.write_text(text)
    with pytest.raises(DamagedRecord, match=r"x\.json"):
        load(file)


@pytest.mark.parametrize(("found", "why"), [*DAMAGED[:3], DAMAGED[8]])
@pytest.mark.parametrize("others", [True, False])
def test_the_rest_is_reported_and_the_run_is_not_green(found, why, others, tmp_path: Path):
    file = found.save(tmp_path / "records")
    if others:
        record("identical", metric(), probe=2, stage="logits").save(tmp_path / "records")
    records, damaged = records_of(tmp_path)
    assert (len(records), len(damaged)) == (int(others), 1)
    done = CliRunner().invoke(report, [str(tmp_path)])
    assert done.exit_code == 3
    shown = " ".join(done.output.split())
    assert "1 damaged record" in done.output and file.name in "".join(done.output.split())
    assert ("02 logits" in shown) == others
    for name in ("report.md", "report.html", "aggregate.json"):
        text = (tmp_path / name).read_text().replace("\\", "")
        assert file.name in text, name
        assert why in text


def test_a_known_divergence_is_looked_up_and_not_believed(tmp_path: Path):
    wrong = record("diverge", metric(1.0, 0.0, "diverge"), expected="somebody says it is known")
    wrong.save(tmp_path / "records")
    assert CliRunner().invoke(report, [str(tmp_path)]).exit_code == 1


def test_a_record_is_json_for_every_reader(tmp_path: Path):
    wrong = record("diverge", metric(math.nan, 0.0, "diverge"), series={"dloss": [math.inf, 0.1]})
    file = wrong.save(tmp_path)
    data = json.loads(file.read_text(), parse_constant=pytest.fail)
    assert (data["metrics"][0]["value"], data["series"]["dloss"]) == ("NaN", ["Infinity", 0.1])
    assert load(file).series["dloss"] == [math.inf, 0.1]


def old(found: Record, file: Path, **changes) -> Path:
    """The record as schema 1 had it: no `accepted`, and tagged strings for what is not finite."""
    data = json.loads(found.model_dump_json())
    for entry in data["metrics"]:
        entry.pop("accepted")
        entry |= {k: "float:nan" for k, v in entry.items() if v == "NaN"} | changes
    file.write_text(json.dumps(data | {"schema_version": 1}))
    return file


def test_records_of_schema_1_are_read(tmp_path: Path):
    wrong = record("diverge", metric(math.nan, 0.0, "diverge"))
    back = load(old(wrong, tmp_path / "a.json"))
    assert math.isnan(back.metrics[0].value) and back.schema_version == SCHEMA
    near = record("agree", metric(2e-6, 1e-6, "agree"))
    note = "the subject is nearer to float64 than the reference"
    assert load(old(near, tmp_path / "b.json", note=note)).metrics[0].accepted == note
    with pytest.raises(DamagedRecord, match="over the tolerance"):
        load(old(near, tmp_path / "c.json", note="all is well"))


def test_a_newer_schema_is_wrong_use(tmp_path: Path):
    file = tmp_path / "x.json"
    file.write_text(json.dumps({"schema_version": SCHEMA + 1}))
    with pytest.raises(UsageError, match="newer than"):
        load(file)


def test_any_byte_that_is_another_is_noticed(tmp_path: Path):
    file = record("agree", metric(1e-7, 1e-6, "agree")).save(tmp_path)
    text = file.read_bytes()
    for at in range(0, len(text), 7):
        file.write_bytes(text[:at] + bytes([text[at] ^ 1]) + text[at + 1 :])
        with pytest.raises(DamagedRecord):
            load(file)


@pytest.mark.parametrize("compared", [compare, compare_series])
def test_what_compares_gives_no_metric_that_would_be_damaged(compared):
    rng = np.random.default_rng(0)
    for exact in (True, False):
        for scale in (0.0, 1e-9, 1e-6, 1e-3, 1.0, math.nan):
            truth = rng.normal(size=7)
            subject, reference = (truth + scale * rng.normal(size=7) for _ in range(2))
            noise = Noise(exact, {"loss": truth}, perturbed={"loss": truth + 1e-7})
            found = compared("loss", subject, reference, noise)
            assert found.contradiction() == "", found
