"""A thousand damaged records: a clear message for each, no traceback, and nothing of them green."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from parity.cells.plan import Plan, write_plan
from parity.cli import main
from parity.record import SCHEMA, Record, Verdict, sealed
from parity.results.folder import read
from tests.test_merge import record, shard

Damage = Callable[[random.Random, Record], bytes]


def text_of(found: Record) -> bytes:
    return sealed(found.model_dump_json(indent=1).encode())


def changed(edit: Callable[[random.Random, dict], object]) -> Damage:
    """A record that a faulty writer left: sealed, or of the schema before digests."""

    def damage(rng: random.Random, found: Record) -> bytes:
        data = json.loads(found.model_dump_json())
        edit(rng, data)
        if rng.random() < 0.5 or data.get("schema_version") != SCHEMA:
            return sealed(json.dumps(data, indent=1).encode())
        return json.dumps(data | {"schema_version": rng.choice([1, 2])}).encode()

    return damage


def bytes_changed(edit: Callable[[random.Random, bytes], bytes]) -> Damage:
    return lambda rng, found: edit(rng, text_of(found))


def flip(rng: random.Random, text: bytes) -> bytes:
    at = rng.randrange(len(text))
    return text[:at] + bytes([text[at] ^ (1 << rng.randrange(8))]) + text[at + 1 :]


def put(rng: random.Random, data: dict, *keys: str | int, value: object) -> None:
    for key in keys[:-1]:
        data = data[key]
    data[keys[-1]] = value


def metric(name: str, *values: object) -> Damage:
    return changed(lambda rng, data: put(rng, data, "metrics", 0, name, value=rng.choice(values)))


def entry(*values: object) -> Damage:
    """A value of another type in a random entry of the record."""

    def edit(rng: random.Random, data: dict) -> None:
        value = rng.choice(values)
        required = ("tool", "stage", "model", "verdict", "reason", "probe", "seed", "subject")
        data[rng.choice(required)] = value

    return changed(edit)


DAMAGES: dict[str, Damage] = {
    "cut": bytes_changed(lambda rng, text: text[: rng.randrange(1, len(text) - 1)]),
    "bit": bytes_changed(flip),
    "zeros": bytes_changed(lambda rng, text: text[:100] + bytes(len(text) - 100)),
    "twice": bytes_changed(lambda rng, text: text + text),
    "empty": lambda rng, found: b"",
    "not UTF-8": bytes_changed(lambda rng, text: text.replace(b"tiny", b"\xff\xfe")),
    "UTF-16": bytes_changed(lambda rng, text: text.decode().encode("utf-16")),
    "foreign": lambda rng, found: rng.choice([b"{}", b"[]", b"1", b"null", b'{"a": 1}', b'"x"']),
    "deep": lambda rng, found: b"[" * 100_000,
    "no version": changed(lambda rng, data: data.pop("schema_version")),
    "version": changed(
        lambda rng, d: d.update(schema_version=rng.choice(["3", None, True, 0, -1]))
    ),
    "type": entry([], {}, None, 1.5, [1]),
    "number": changed(
        lambda rng, d: d.update({rng.choice(["seed", "probe"]): rng.choice([-1, 10**30, "x"])})
    ),
    "gone": changed(
        lambda rng, d: d.pop(rng.choice(["verdict", "seed", "probe", "subject", "reason"]))
    ),
    "unknown": changed(lambda rng, d: d.update({f"more{rng.random()}": 1})),
    "no metrics": changed(lambda rng, d: d.update(metrics=[])),
    "metrics of another type": changed(
        lambda rng, d: d.update(metrics=rng.choice([{}, None, "x", [1], [[]]]))
    ),
    "no metric decides": metric("gate", False),
    "NaN": metric("value", "NaN", "Infinity", -1.0),
    "no tolerance": metric("tolerance", "NaN", "Infinity", -1.0, None),
    "over the tolerance": metric("value", 2e-6, 1.0, 1e300),
    "a metric that diverges": metric("verdict", "diverge", "error", "inconclusive", "skip"),
    "another verdict": changed(lambda rng, d: d.update(verdict="identical")),
    "no such verdict": changed(lambda rng, d: d.update(verdict=rng.choice(["green", "AGREE", 1]))),
}
if SCHEMA != 3:
    raise AssertionError("records before digests are of schema 2 and 1: see `changed`")


def test_a_thousand_damaged_records(tmp_path: Path) -> None:
    """Seed by seed another damage, each to a record that was green."""
    rng = random.Random(0)
    names, folder = [*DAMAGES], tmp_path / "records"
    folder.mkdir()
    for seed in range(1000):
        found = record(seed)
        file = folder / f"{found.name}.json"
        if seed % 50 == 0:
            file.mkdir()
        elif seed % 50 == 1:
            file.symlink_to(tmp_path / "nowhere")
        else:
            file.write_bytes(DAMAGES[names[seed % len(names)]](rng, found))
    write_plan(Plan.product([5], [("mlx", "hf")], ["tiny"], range(1000)), tmp_path)

    done = CliRunner().invoke(main, ["report", str(tmp_path), "--format", "json,junit,markdown"])
    assert isinstance(done.exception, SystemExit) and done.exit_code == 3, done.output[-2000:]
    result = json.loads((tmp_path / "aggregate.json").read_text())
    assert result["counts"] == {"missing": 1000}
    assert len(result["damaged"]) == 1000
    for seed, line in enumerate(
        sorted(result["damaged"], key=lambda line: int(line.split("seed")[1].split(".")[0]))
    ):
        file, _, why = line.partition(".json: ")
        assert file == f"records/{record(seed).name}", line
        assert 8 < len(why) < 400 and "\n" not in line and "Traceback" not in line, line
    assert (tmp_path / "junit.xml").read_text().count("<error") == 2000
    assert "1000 damaged records set aside" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize("name", DAMAGES)
def test_one_damaged_record_keeps_a_run_from_being_green(name: str, tmp_path: Path) -> None:
    rng = random.Random(name)
    shard(tmp_path, record(1), record(2), seeds=(0, 1, 2))
    file = tmp_path / "records" / f"{record(0).name}.json"
    for _ in range(5):
        file.write_bytes(DAMAGES[name](rng, record(0)))
        run, records = read([tmp_path])
        found = run.aggregate(records)
        assert (found.exit_code, found.counts) == (3, {"agree": 2, "missing": 1})
        assert len(found.damaged) == 1


def test_what_was_not_damaged_is_green(tmp_path: Path) -> None:
    """The same files without a damage: it is the damage that is found."""
    rng = random.Random(0)
    unchanged = changed(lambda rng, data: None)
    for seed in range(20):
        file = tmp_path / "records" / f"{record(seed).name}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(unchanged(rng, record(seed)))
    run, records = read([tmp_path])
    assert run.aggregate(records).counts == {"agree": 20} and not run.damaged


def test_a_verdict_that_is_not_green_may_stand_beside_any_metric(tmp_path: Path) -> None:
    record(0, verdict=Verdict.ERROR, metrics=[]).save(tmp_path / "records")
    run, records = read([tmp_path])
    assert not run.damaged and run.aggregate(records).exit_code == 3
