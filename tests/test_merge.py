"""Runs of several machines become one: in any order, with what is missing, double and damaged named."""

from __future__ import annotations

import json
import shutil
from itertools import permutations
from pathlib import Path

import pytest
from click.testing import CliRunner

from parity.cells.plan import Plan, write_plan
from parity.cli import main
from parity.record import SCHEMA, Metric, Record, Side, Verdict, parse, sealed
from parity.results import folder as folders
from parity.results.folder import MANIFEST, STORE, read

SEEDS = (0, 1, 2, 3, 4, 5)


def record(seed: int, verdict: str = "agree", probe: int = 5, **fields) -> Record:
    value = {"identical": 0.0, "agree": 1e-7}.get(verdict, 1.0)
    side = {"recipe": {"seed.value": seed}, "digest": "0", "environment": {"platform": "Linux"}}
    metric = Metric(
        name="loss", verdict=verdict, value=value, tolerance=1e-6, minimum_required_tolerance=value
    )
    return Record(**{
        "tool": "0", "probe": probe, "stage": {5: "gradient", 2: "logits"}[probe], "model": "tiny",
        "seed": seed, "subject": Side(path="mlx", **side), "reference": Side(path="hf", **side),
        "verdict": Verdict(verdict), "reason": f"seed {seed}", "metrics": [metric],
        "findings": [f"norm {seed}.5"], "series": {"dloss": [0.0, 1e-9 * seed]},
    } | fields)  # fmt: skip


def shard(folder: Path, *records: Record, seeds=SEEDS, probes=(5,)) -> Path:
    for one in records:
        one.save(folder / "records")
    write_plan(Plan.product(probes, [("mlx", "hf")], ["tiny"], seeds), folder)
    return folder


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    """Three shards of six seeds; one is missing, one cell has two records, one file is damaged."""
    a = shard(tmp_path / "a", record(0), record(1, "identical"))
    b = shard(tmp_path / "b", record(1), record(2, "diverge"), record(3))
    c = shard(tmp_path / "c", record(3, seconds=2.0, verdict="diverge"), record(4))
    shutil.copy(a / "records" / f"{record(0).name}.json", b / "records" / "copy.json")
    (c / "records" / "half.json").write_bytes(b'{"schema_version": 3')
    return [a, b, c]


def run(*words: object):
    return CliRunner().invoke(main, [str(word) for word in words])


def content(folder: Path) -> dict[str, bytes]:
    files = (f for f in folder.rglob("*") if f.is_file())
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in files}


def test_the_order_of_the_folders_changes_no_byte(shards, tmp_path):
    outs = []
    for number, order in enumerate(permutations(shards)):
        done = run("merge", *order, "--out", tmp_path / f"out{number}")
        assert done.exit_code == 3, done.output
        outs.append(content(tmp_path / f"out{number}"))
    assert all(out == outs[0] for out in outs)
    assert sorted(outs[0]) == [MANIFEST, "plan.json", STORE]


def test_what_was_merged_in_parts_is_what_was_merged_at_once(shards, tmp_path):
    a, b, c = shards
    run("merge", a, b, c, "--out", tmp_path / "once")
    run("merge", c, b, "--out", tmp_path / "part")
    run("merge", tmp_path / "part", a, "--out", tmp_path / "parts")
    once, parts = content(tmp_path / "once"), content(tmp_path / "parts")
    assert once[STORE] == parts[STORE] and once["plan.json"] == parts["plan.json"]
    assert len(read([tmp_path / "parts"])[0].damaged) == 1


def test_missing_double_and_damaged_are_named(shards, tmp_path):
    done = run("merge", *shards, "--out", tmp_path / "out")
    text = " ".join(done.output.split())
    assert "damaged: c/records/half.json: not a record" in text
    assert "1 record found again with the same content" in text
    assert (
        "seeds 1, 3: 2 records for one cell (agree, diverge, identical), the worst counts" in text
    )
    run_, records = read([tmp_path / "out"])
    found = run_.aggregate(records)
    assert list(found.states(found.grid[0]).values()) == [
        "agree", "agree", "diverge", "diverge", "agree", "missing",
    ]  # fmt: skip
    assert (found.verdict, found.exit_code) == ("missing", 3)
    report = run("report", tmp_path / "out")
    assert report.exit_code == 3 and "half.json" in report.output


def test_a_report_of_the_shards_is_that_of_what_was_merged(shards, tmp_path):
    run("merge", *shards, "--out", tmp_path / "out")
    one, other = (r.aggregate(s) for r, s in (read(shards), read([tmp_path / "out"])))
    assert one.cells.equals(other.cells) and one.rows.equals(other.rows)
    for name in ("reason", "notes", "gaps", "problems", "damaged", "curves", "about"):
        assert repr(getattr(one, name)) == repr(getattr(other, name)), name
    assert repr(one.failures()) == repr(other.failures())


def test_records_of_other_recipes_are_no_duplicates_and_it_is_said(tmp_path):
    other = record(0, "diverge")
    other.subject.recipe["lora.rank"] = 4
    a, b = shard(tmp_path / "a", record(0), seeds=(0,)), shard(tmp_path / "b", other, seeds=(0,))
    done = run("merge", a, b, "--out", tmp_path / "out")
    assert done.exit_code == 1 and "different recipes (lora.rank)" in " ".join(done.output.split())


def test_shards_of_other_probes_plan_no_cells_that_nobody_planned(tmp_path):
    a = shard(tmp_path / "a", record(0), seeds=(0,))
    b = shard(tmp_path / "b", record(7, probe=2), seeds=(7,), probes=(2,))
    assert run("merge", a, b, "--out", tmp_path / "out").exit_code == 0


def test_a_folder_without_a_plan_is_named(tmp_path):
    record(0).save(tmp_path / "a" / "records")
    done = run("merge", tmp_path / "a", "--out", tmp_path / "out")
    assert "plan.json: there is none" in done.output


def test_wrong_use_is_one_line(tmp_path, shards):
    (tmp_path / "empty").mkdir()
    for words, says in [
        ((tmp_path / "empty", "--out", tmp_path / "x"), "no records"),
        ((shards[0], "--out", shards[1]), "not empty"),
    ]:
        done = run("merge", *words)
        assert done.exit_code == 2 and says in done.output
        assert len(done.output.strip().splitlines()) == 1
    assert not (tmp_path / "x").exists()


# Schemas


def of_schema(version: int, file: Path) -> None:
    data = json.loads(file.read_text()) | {"schema_version": version}
    del data["digest"]
    text = json.dumps(data, indent=1).encode()
    file.write_bytes(sealed(text) if version > SCHEMA else text)


def test_older_records_are_brought_up_to_date(tmp_path):
    a = shard(tmp_path / "a", *map(record, SEEDS))
    for version, file in zip((1, 2), sorted((a / "records").iterdir()), strict=False):
        of_schema(version, file)
    assert run("merge", a, "--out", tmp_path / "out").exit_code == 0
    _, records = read([tmp_path / "out"])
    assert {r.schema_version for r in records.records(range(records.size))} == {SCHEMA}


def test_a_newer_record_is_wrong_use(tmp_path):
    a = shard(tmp_path / "a", *map(record, SEEDS))
    file = next((a / "records").iterdir())
    of_schema(SCHEMA + 1, file)
    for words in (("merge", a, "--out", tmp_path / "out"), ("report", a)):
        done = run(*words)
        assert done.exit_code == 2 and file.name in done.output and "upgrade" in done.output
    assert not (tmp_path / "out").exists()


def test_a_store_of_older_records_is_read_and_a_newer_one_is_not(tmp_path, monkeypatch):
    a = shard(tmp_path / "a", *map(record, SEEDS))
    run("merge", a, "--out", tmp_path / "out")
    manifest = tmp_path / "out" / MANIFEST
    data = json.loads(manifest.read_text())
    seen = []
    monkeypatch.setattr(
        "parity.results.store.parse", lambda *args, **more: seen.append(1) or parse(*args, **more)
    )
    manifest.write_text(json.dumps(data | {"record_schema": SCHEMA - 1}))
    _, records = read([tmp_path / "out"])
    assert (records.size, len(seen)) == (6, 6)
    for name in ("schema_version", "record_schema"):
        manifest.write_text(json.dumps(data | {name: SCHEMA + 1}))
        done = run("report", tmp_path / "out")
        assert done.exit_code == 2 and f"{name} {SCHEMA + 1} is newer" in done.output


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "no manifest", "no store", "folder"])
def test_a_damaged_store_is_set_aside(tmp_path, damage):
    a = shard(tmp_path / "a", *map(record, SEEDS))
    run("merge", a, "--out", tmp_path / "out")
    store, manifest = (tmp_path / "out" / name for name in (STORE, MANIFEST))
    text = store.read_bytes()
    store.unlink()
    if damage == "flip":
        store.write_bytes(text[:500] + bytes([text[500] ^ 4]) + text[501:])
    elif damage in ("cut", "empty"):
        store.write_bytes(text[: len(text) // 2 * (damage == "cut")])
    elif damage == "folder":
        store.mkdir()
    elif damage == "no manifest":
        store.write_bytes(text)
        manifest.unlink()
    done = run("report", tmp_path / "out")
    assert (done.exit_code, done.exception.__class__) == (3, SystemExit), done.output
    shown = " ".join(done.output.split())
    assert "1 damaged record set aside; 6 cells: 6 missing" in shown
    assert (MANIFEST if damage == "no store" else STORE) in shown


def test_known_divergences_come_along_and_contents_that_differ_are_not_used(tmp_path):
    entry = '[[entry]]\nprobe = 5\nreason = "known"\nat_most = 1e9\ndeterministic = true\n'
    a, b = (shard(tmp_path / n, record(s, "diverge"), seeds=(s,)) for s, n in enumerate("ab"))
    for one in (a, b):
        (one / "expected").mkdir()
        (one / "expected" / "mlx-vs-hf.toml").write_text(entry)
    assert run("merge", a, b, "--out", tmp_path / "out").exit_code == 0
    (b / "expected" / "mlx-vs-hf.toml").write_text(entry.replace("known", "another"))
    done = run("merge", a, b, "--out", tmp_path / "other")
    assert done.exit_code == 1 and "has 2 contents: none is used" in done.output


def test_many_records_are_read_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "AT_ONCE", 4)
    a = shard(tmp_path / "a", *map(record, range(11)), seeds=range(11))
    assert run("merge", a, "--out", tmp_path / "out").exit_code == 0
    assert [r.seed for r in read([tmp_path / "out"])[1].records(range(11))] == [*range(11)]


def test_records_are_found_by_position_in_files_of_any_size(tmp_path, monkeypatch):
    from parity.results import store

    for rows, many in ((1, 2), (2, 99), (1024, 16)):
        monkeypatch.setattr(store, "ROWS", rows)
        monkeypatch.setattr(store, "MANY", many)
        out = tmp_path / str(rows)
        run("merge", shard(tmp_path / "a", *map(record, range(9))), "--out", out)
        records = read([out])[1]
        for positions in ([], [3], [8, 0, 3, 3], [*range(9)], [*range(8, -1, -1)]):
            assert [r.seed for r in records.records(positions)] == positions
            reasons = records.take(positions, ["reason", "metrics"]).column("reason").to_pylist()
            assert reasons == [f"seed {p}" for p in positions]


def test_pytest_keeps_the_plan_of_what_it_selects(tmp_path):
    from types import SimpleNamespace

    from parity.cells.cell import Cell
    from parity.cells.plan import load_plan
    from parity.pytest_plugin import pytest_collection_finish
    from parity.recipe import Recipe
    from parity.stages import find

    def collect(*seeds: int, only: bool = False) -> None:
        recipes = [Recipe().override({"seed.value": seed}) for seed in seeds]
        cells = [Cell(find("gradient"), "mlx", "hf", recipe) for recipe in recipes]
        items = [SimpleNamespace(callspec=SimpleNamespace(params={"cell": c})) for c in cells]
        config = SimpleNamespace(
            getoption=lambda name: str(tmp_path), option=SimpleNamespace(collectonly=only)
        )
        pytest_collection_finish(SimpleNamespace(items=[*items, SimpleNamespace()], config=config))

    collect(0, only=True)
    collect()
    assert not (tmp_path / "plan.json").exists()
    collect(0, 1)
    collect(1, 2)
    assert [*load_plan(tmp_path / "plan.json").rows.values()] == [{0, 1, 2}]
    (tmp_path / "plan.json").write_text("{")
    collect(3)
    assert [*load_plan(tmp_path / "plan.json").rows.values()] == [{3}]
