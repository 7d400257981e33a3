"""What thousands and millions of records cost, from the first read to the report.

Made-up records with as many metrics, findings and steps as a real run's go through the writer and the
reader of real ones. Up to 10^4 they are one file each, as runs leave them; more of them come in shards
that were merged before. Of these the first 100,800 records are made one by one; the others are the same
ones with other seeds. Each step is a process of its own, whose wall time and peak memory are given:

1. the first read: `parity merge` of the files or shards into one store,
2. the aggregate of that store, as every report begins,
3. its report in one format each, with the bytes that it wrote.

    python benchmarks/scale.py --sizes 1000,10000,100000,1000000 --out scale.md
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import islice, product, repeat
from pathlib import Path

import numpy as np
import pyarrow as pa

from parity.cells.plan import Plan, write_plan
from parity.files import file_digest, write_atomically
from parity.recipe import Recipe
from parity.record import SCHEMA as RECORD_SCHEMA
from parity.record import Metric, Record, Side, Verdict, conclude, first_divergence, parse, sealed
from parity.results import store
from parity.results.folder import AT_ONCE, MANIFEST, STORE, Manifest
from parity.stages import STAGES

REFERENCES = ("mlx-lm", "hf")
MODELS = ("tiny-gemma3", "tiny-llama", "tiny-qwen3")
# As records of `parity run` have them: metrics, findings, numbers in `facts`.
SIZES = {
    "config": (35, 10, 0), "tokenization": (6, 0, 0), "logits": (3, 0, 0),
    "cross_entropy": (15, 0, 1), "lora_init": (14, 0, 1), "gradient": (8, 0, 10),
    "optimizer_step": (10, 2, 18), "loss_curve": (6, 1, 0), "greedy_decode": (7, 5, 0),
    "supervised_positions": (5, 0, 0), "kv_cache": (16, 0, 0), "round_trip": (9, 0, 0),
}  # fmt: skip
PROMPTS = ("<<HELLO!!>>", "<<HELLO!!>> My name", "<<HELLO>>", "HELLO!!")
BASE = Recipe().factors()
FILES = 10_000
STEPS = 30
LIMITS = {"seconds": 10.0, "gigabytes": 1.0}
GRID = [(s.name, s.number, m, r) for s in STAGES for m in MODELS for r in REFERENCES]
ROWS = len(GRID)
SHARD = 700 * ROWS
MADE = 2  # shards whose records are made one by one; others repeat them with other seeds


def environment(path: str) -> dict[str, object]:
    """As large as that of a capture."""
    versions = dict.fromkeys(("mlx", "mlx-lm", "torch", "transformers", "numpy"), "1.2.3")
    variables = {f"VARIABLE_{i}": "1" for i in range(6)}
    return {"python": "3.11.7", "platform": "Linux x86_64", "versions": versions,
            "variables": variables, "device": "cpu", "peak_memory": 400_000_000,
            "code": f"parity.paths.{path}"}  # fmt: skip


def record(stage: str, probe: int, model: str, reference: str, seed: int) -> Record:
    """One that is green but for about one in a hundred, and one in a thousand that ends in an error."""
    rng = np.random.default_rng([seed, probe, REFERENCES.index(reference), MODELS.index(model)])
    metrics, findings, facts = SIZES[stage]
    chance, values = rng.random(), rng.random(metrics)
    failing = chance < 0.01
    measured = [
        Metric(
            name=f"{stage} {i}" if i or stage != "loss_curve" else "loss per step",
            verdict=Verdict.DIVERGE if failing and i == 0 else Verdict.AGREE,
            value=float(value) * 1e-6 + failing * (i == 0) * 1e-3,
            tolerance=9e-6,
            minimum_required_tolerance=float(value) * 1e-6,
            floor=1e-6,
            sources={"float64 run": float(value) * 1e-7, "one ulp of the size": 1e-6},
            total=4096,
            mismatched=int(value * 4096),
            where=f"layers.{i}.self_attn.q_proj",
            step=7 if failing and i == 0 and stage == "loss_curve" else None,
        )
        for i, value in enumerate(values)
    ]
    recipe = BASE | {"seed.value": seed}
    sides = {
        name: Side(path=path, recipe=recipe, digest="0dff12958046", environment=environment(path))
        for name, path in (("subject", "mlx"), ("reference", reference))
    }
    series, passes = {}, {}
    if stage == "loss_curve":
        loss, d = 5 * np.exp(-np.arange(STEPS) / 9) + rng.random(), rng.normal(size=STEPS) * 1e-6
        series = {
            f"{of} {side}": (loss + d * (side == "subject")).tolist()
            for of, side in product(("loss", "gradient_norm"), ("subject", "reference"))
        } | {"dloss": d.tolist(), "dgrad": d.tolist(), "dloss as shipped": (3 * d).tolist()}
    if stage == "greedy_decode":
        passes = {
            side: {p: bool(rng.random() < 0.9) for p in PROMPTS}
            for side in ("subject", "reference")
        }
    verdict, reason = conclude(measured)
    if 0.01 < chance < 0.011:
        verdict, reason, measured = Verdict.ERROR, f"the worker of {reference} died", []
    return Record(
        tool="0.1.0", probe=probe, stage=stage, model=model, seed=seed, verdict=verdict,
        reason=reason, metrics=measured, expectation="noise floor",
        findings=[f"as shipped: setting {i} is {values[i]:.3g}" for i in range(findings)],
        series=series, passes=passes, facts={f"fact {i}": float(i) for i in range(facts)},
        first_divergence=first_divergence(measured), git="51331e70e27f", seconds=1.0,
        reproduce=f"parity run --probes {probe:02d} --reference {reference} --seeds {seed},",
        **sides,
    )  # fmt: skip


def records(size: int, start: int = 0, count: int = 10**9) -> Iterator[Record]:
    """So many, seed by seed."""
    return map(numbered, range(start, min(start + count, size)))


def numbered(number: int) -> Record:
    """The record of that number."""
    seed, row = divmod(number, ROWS)
    return record(*GRID[row], seed)


def plan(size: int) -> Plan:
    """The cells of `records`."""
    pairs = [("mlx", reference) for reference in REFERENCES]
    probes = [stage.number for stage in STAGES]
    whole = Plan.product(probes, pairs, MODELS, range(size // ROWS))
    last = [
        Plan.product([p], [("mlx", r)], [m], [size // ROWS]) for _, p, m, r in GRID[: size % ROWS]
    ]
    return Plan.union([whole, *last])


def write_shards(size: int, folder: Path) -> list[Path]:
    """Folders of runs: of files where there are few, else of stores."""
    if size <= FILES:
        for one in records(size):
            one.save(folder / "records")
        write_plan(plan(size), folder)
        return [folder]
    starts = range(0, size, SHARD)
    shards = [folder / f"shard-{start // SHARD:02d}" for start in starts]
    with ProcessPoolExecutor(2) as pool:
        [*pool.map(make_shard, shards[:MADE], repeat(size), starts)]
        [*pool.map(repeat_shard, shards[MADE:], repeat(size), starts[MADE:])]
    return shards


def make_shard(folder: Path, size: int, start: int) -> None:
    """Some of all records, each written and read as one of a run is."""
    texts = (sealed(one.model_dump_json(indent=1).encode()) for one in records(size, start, SHARD))
    parts = iter(lambda: [*map(parse, islice(texts, AT_ONCE))], [])
    write_store(folder, size, map(store.table_of, parts))


def repeat_shard(folder: Path, size: int, start: int) -> None:
    """The records of a shard that was made, with other seeds."""
    number = start // SHARD
    made = folder.with_name(f"shard-{number % MADE:02d}")
    shift = (number - number % MADE) * SHARD // ROWS

    def shifted() -> Iterator[pa.Table]:
        left = size - start
        for table in store.whole(made / STORE, RECORD_SCHEMA):
            seeds = table.column("seed").to_pylist()
            pairs = zip(table.column("json").to_pylist(), seeds, strict=True)
            texts = [
                text.replace(f'"seed":{seed},', f'"seed":{seed + shift},').replace(
                    f'"seed.value":{seed},', f'"seed.value":{seed + shift},'
                )
                for text, seed in pairs
            ]
            columns = {"seed": pa.array([s + shift for s in seeds], pa.int64()),
                       "json": pa.array(texts, pa.large_string())}  # fmt: skip
            for name, values in columns.items():
                at = table.schema.get_field_index(name)
                table = table.set_column(at, name, values)
            yield table[: max(left, 0)]
            left -= table.num_rows

    write_store(folder, size, shifted())


def write_store(folder: Path, size: int, tables: Iterable[pa.Table]) -> None:
    """A folder as `parity merge` writes it."""
    folder.mkdir(parents=True)
    count = store.write(tables, folder / STORE)
    digest = file_digest(folder / STORE)
    manifest = Manifest(records=count, sha256=digest, damaged=[], problems=[])
    write_atomically(folder / MANIFEST, manifest.model_dump_json().encode())
    write_plan(plan(size), folder)


MEASURED = """
import json, resource, sys, time
begin = time.perf_counter()
{code}
user, system = resource.getrusage(resource.RUSAGE_SELF)[:2]
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
print(json.dumps([time.perf_counter() - begin, user + system, peak / 1e9]))
"""
AGGREGATE = """
from pathlib import Path
from parity.results.folder import read
run, records = read([Path({folder!r})])
result = run.aggregate(records)
"""
WRITE = """
from parity.report.write import write
write(result, Path({out!r}), [{format!r}])
"""
MERGE = """
from pathlib import Path
from parity.results.merge import merge
merge([Path(name) for name in {folders!r}], Path({folder!r}))
"""


def measured(code: str, name: str) -> dict[str, float]:
    """Seconds, seconds of all cores and gigabytes of a process that runs it, imports included."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURED.format(code=code)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        sys.exit(done.stderr)
    found = json.loads(done.stdout.splitlines()[-1])
    return {
        f"{name} {unit}": value for unit, value in zip(("s", "CPU s", "GB"), found, strict=True)
    }


def size_of(folder: Path) -> int:
    """Bytes of all files below."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def one(size: int, formats: list[str], scratch: Path) -> dict[str, object]:
    """All measurements of one number of records."""
    begin, made, whole = time.perf_counter(), scratch / "shards", scratch / "whole"
    if not made.exists():
        shards = write_shards(size, scratch / "part")
        shards = [made / file.relative_to(scratch / "part") for file in shards]
        (scratch / "part").rename(made)
    else:
        shards = sorted(made.glob("shard-*")) or [made]
    shutil.rmtree(whole, ignore_errors=True)
    print(f"{size}: made in {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
    found: dict[str, object] = {"records": size, "bytes of shards": size_of(scratch / "shards")}
    names = {"folders": [*map(str, shards)], "folder": str(whole)}
    found |= measured(MERGE.format(**names), "first read")
    found["bytes of store"] = size_of(whole)
    aggregate = AGGREGATE.format(**names)
    found |= measured(aggregate, "aggregate")
    for name in formats:
        out = scratch / name
        write = WRITE.format(out=str(out), format=name)
        found |= measured(aggregate + write, name) | {f"{name} bytes": size_of(out)}
    return found


def table(lines: list[dict[str, object]]) -> str:
    """As Markdown: a line for each number of records and step."""
    from parity.report.markdown import table as markdown

    rows = []
    for line in lines:
        for step in [key.removesuffix(" CPU s") for key in line if key.endswith(" CPU s")]:
            size = line.get("bytes of store" if step == "first read" else f"{step} bytes")
            rows.append([
                f"{line['records']:,}", step, *(f"{line[f'{step} {u}']:.2f}" for u in ("s", "CPU s", "GB")),
                "" if size is None else f"{size / 1e6:,.2f}",
            ])  # fmt: skip
    return markdown(["records", "step", "seconds", "seconds of CPU", "GB", "MB written"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", default="1000,10000")
    parser.add_argument("--formats", default="markdown,json,html")
    parser.add_argument("--keep", type=Path, help="keep the records here, and use them again")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    lines = []
    for size in map(int, arguments.sizes.split(",")):
        with tempfile.TemporaryDirectory() as scratch:
            kept = arguments.keep / str(size) if arguments.keep else Path(scratch)
            lines.append(one(size, [*filter(None, arguments.formats.split(","))], kept))
        print(json.dumps(lines[-1]), flush=True)
    text = table(lines)
    print(text)
    if arguments.out:
        arguments.out.write_text(text)
    most = lines[-1]  # seconds of CPU do not count what else the machine does
    if most["aggregate CPU s"] > LIMITS["seconds"] or most["aggregate GB"] > LIMITS["gigabytes"]:
        sys.exit("the aggregate takes more than 10 s or 1 GB")


if __name__ == "__main__":
    main()
