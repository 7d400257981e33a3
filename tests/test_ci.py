"""The steps of the workflows as commands: what runs where, what is installed, what is reported."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from parity.cells.matrix import parse_probes, parse_seeds
from parity.cells.plan import Plan, load_plan, write_plan
from parity.ci import jobs, versions
from parity.ci.annotations import workflow_commands
from parity.cli import main
from parity.commands.run import run
from parity.results.aggregate import aggregate
from parity.stages import BY_NUMBER
from tests.made_records import matrix, put, record

ROOT = Path(__file__).parents[1]


def parity(*words: str | Path):
    return CliRunner().invoke(main, [str(word) for word in words])


def planned(folder: Path, *words: str):
    done = parity("ci", "plan", "--harness", ROOT, "--out", folder, *words)
    assert done.exit_code == 0, done.output
    return dict(line.split("=", 1) for line in done.stdout.splitlines())


def saved(folder: Path, records, plan: Plan | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    for one in records:
        one.save(folder / "records")
    if plan:
        write_plan(plan, folder)
    return folder


def test_the_jobs_fill_each_cell_of_the_plan_once(tmp_path):
    words = ("--runners", "macos-26 macos-15", "--seeds", "7", "--shards", "3",
             "--subject", "mlx unsloth@2026.5.2", "--settings", "train.steps=6")  # fmt: skip
    found = planned(tmp_path, *words)
    assert json.loads(found["runners"]) == ["macos-26", "macos-15"]
    listed = json.loads(found["jobs"])
    assert len(listed) == len({job["name"] for job in listed}) == 2 * 2 * 2 * 3
    for runner in ("macos-26", "macos-15"):
        cells = []
        for job in listed:
            if job["runner"] == runner:
                options = run.make_context("run", shlex.split(job["arguments"])).params
                assert options["settings"] == ("train.steps=6",)
                cells += [
                    (stage.number, (options["subject"], reference), seed)
                    for stage in parse_probes(options["probes"])
                    for reference in options["references"]
                    for seed in parse_seeds(options["seeds"])
                ]
        plan = load_plan(tmp_path / "plan.json")
        wanted = [(r.probe, (r.subject, r.reference), s) for r, of in plan.rows.items() for s in of]
        assert sorted(cells) == sorted(wanted)
    assert {row.model for row in plan.rows} == {"tiny-gemma3"}


def test_a_plan_asks_all_probes_unless_groups_are_given(tmp_path):
    planned(tmp_path)
    assert {row.probe for row in load_plan(tmp_path / "plan.json").rows} == {
        s.number for s in BY_NUMBER
    }


def test_a_single_seed_of_a_shard_is_a_seed_and_no_count(tmp_path):
    listed = json.loads(planned(tmp_path, "--seeds", "3407,5", "--shards", "2")["jobs"])
    seeds = {
        run.make_context("run", shlex.split(job["arguments"])).params["seeds"] for job in listed
    }
    assert {parse_seeds(text) for text in seeds} == {(3407,), (5,)}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--runners", ""], "give at least one"),
        (["--runners", "macos-26 macos-26"], "macos-26 stands twice"),
        (["--runners", "$(id)"], "a label such as"),
        (["--seeds", "2", "--shards", "3"], "shards 3: give a number from 1 to the 2 seeds"),
        (["--groups", "00,01 01"], "probe 01 stands twice"),
        (["--groups", "77"], "77"),
        (["--settings", "--out=/tmp"], "write FACTOR=VALUE"),
        (["--settings", "'"], "settings"),
        (["--pins", "mlx=0.3"], "pins 'mlx=0.3'"),
        (["--recipe", "default mixed"], "their models are tiny-gemma3, tiny-gemma3"),
        (["--recipe", "nothing"], "nothing"),
        (["--shards", "15", "--runners", " ".join(f"r{n}" for n in range(10))], "300 jobs"),
        (["--trainer", "/nowhere/at-all"], "/nowhere/at-all"),
    ],
)
def test_wrong_inputs_are_one_line_and_exit_code_2(tmp_path, words, message):
    done = parity("ci", "plan", "--harness", ROOT, "--out", tmp_path / "plan", *words)
    assert done.exit_code == 2, done.output
    assert message in done.stderr and "Traceback" not in done.output
    assert not (tmp_path / "plan").exists()


# What is installed


def test_pins_replace_the_tested_releases(tmp_path):
    planned(tmp_path, "--pins", "mlx-lm==0.31.3 Transformers>=5.1 unsloth-zoo==2026.5.2 other==1")
    fixed = (tmp_path / "constraints.txt").read_text().splitlines()
    assert [x for x in fixed if re.split("[=>]", x.lower())[0] in ("mlx-lm", "transformers", "unsloth-zoo")] == [
        "mlx-lm==0.31.3", "Transformers>=5.1", "unsloth-zoo==2026.5.2",
    ]  # fmt: skip
    assert "torch==2.13.0" in fixed
    needed = (tmp_path / "requirements.txt").read_text().split()
    assert needed == ["mlx-lm==0.31.3", "Transformers>=5.1", "other==1"]


def test_a_ref_of_the_trainer_becomes_the_commit_that_all_jobs_install(tmp_path):
    def git(*words: str) -> str:
        told = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *words]
        return subprocess.run(told, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q", "-b", "main")
    git("commit", "-q", "--allow-empty", "-m", "one")
    one = git("rev-parse", "HEAD")
    git("tag", "-a", "v1", "-m", "annotated")
    git("commit", "-q", "--allow-empty", "-m", "two")
    two = git("rev-parse", "HEAD")
    where = f"git+{tmp_path.as_uri()}@"
    for ref, commit in (("v1", one), ("main", two), ("", two), (one, one)):
        found = versions.commit(str(tmp_path), ref)
        assert found.rpartition("@")[2] == commit
        assert found == where + commit or ref == one
    done = parity("ci", "plan", "--harness", ROOT, "--trainer", tmp_path, "--trainer-ref", "v2")
    assert done.exit_code == 2 and "no branch or tag 'v2'" in done.stderr
    words = ("--trainer", str(tmp_path), "--trainer-ref", "v1")
    planned(tmp_path / "plan", *words)
    assert (tmp_path / "plan" / "requirements.txt").read_text() == f"{where}{one}\n"


@pytest.mark.long
def test_the_newest_releases_that_fit_together_on_a_mac(tmp_path, uv):
    project = tmp_path / "pyproject.toml"
    needs = '"mlx>=0.30; sys_platform == \'darwin\'", "tabulate", "click"'
    project.write_text(f'[project]\nname = "a"\nversion = "1"\ndependencies = [{needs}]\n')
    try:
        found = versions.newest(project, ["click==8.1.7"], "3.12").splitlines()
    except Exception as error:  # no index, no answer
        pytest.skip(f"the package index cannot be read: {error}")
    names = {line.partition("==")[0] for line in found}
    assert {"mlx", "mlx-metal", "tabulate", "click"} <= names
    assert [line for line in found if line.startswith("click")] == ["click==8.1.7"]


# One job


@pytest.mark.parametrize(("code", "ends"), [(0, 0), (1, 0), (2, 2), (3, 3)])
def test_a_divergence_is_no_failure_of_a_job(tmp_path, code, ends):
    assert jobs.outcome(tmp_path, code)[0] == ends


@pytest.mark.parametrize("code", [139, -11])
def test_a_process_that_died_is_judged_by_what_it_wrote(tmp_path, code):
    plan = Plan.product((0,), (("mlx", "mlx-lm"),), ("tiny",), (0, 1))
    assert jobs.outcome(tmp_path, code)[0] == 3
    saved(tmp_path, [record(0, 0)], plan)
    ended, reason = jobs.outcome(tmp_path, code)
    assert ended == 3 and f"ended with {code}" in reason and "1 missing" in reason
    saved(tmp_path, [record(0, 1, "diverge")])
    ended, reason = jobs.outcome(tmp_path, code)
    assert ended == 0 and "after all its records were written" in reason


def test_a_job_runs_its_cells(tmp_path):
    (job, *_) = json.loads(
        planned(tmp_path / "plan", "--groups", "01", "--seeds", "1", "--shards", "1",
                "--reference", "mlx-lm", "--runners", "here")["jobs"]
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "parity.cli", "ci", "shard", "--arguments", job["arguments"],
         "--out", str(tmp_path / "shard-1")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = jobs.read(tmp_path)  # the plan beside the shard: nothing is missing
    assert (found.verdict, found.counts) == ("identical", {"identical": 1})


# All jobs together


def test_annotations_are_one_for_each_probe_and_pair_the_worst_first():
    wrong = [record(p, s, "diverge", reason="50% off:\nso, there") for p in (6, 7) for s in (0, 1)]
    other = [record(3, 0, "inconclusive"), record(2, 1, "error", reason="it fell over")]
    lines = workflow_commands({"macos-26": aggregate(put(matrix(), *wrong, *other))})
    assert len(lines) == 4
    assert lines[0].startswith("::error title=02 logits%2C mlx vs mlx-lm::error on tiny")
    assert "seeds 0, 1: 50%25 off:%0Aso, there%0Areproduce: run --seeds 0" in lines[1]
    assert lines[3].startswith("::warning title=03 cross entropy")
    assert not any("\n" in line for line in lines)
    assert workflow_commands({"": aggregate(matrix())}) == []


def test_several_runners_share_an_annotation():
    wrong = aggregate(put(matrix(), record(2, 0, "diverge", reason="off")))
    lines = workflow_commands({"macos-26": wrong, "macos-15": wrong, "linux": aggregate(matrix())})
    assert len(lines) == 1
    assert "mlx vs mlx-lm (macos-26%2C macos-15)" in lines[0]
    assert lines[0].count(": off") == 2
    assert "macos-26: diverge" in lines[0] and "macos-15: diverge" in lines[0]


def test_no_more_annotations_than_github_shows_and_the_rest_is_counted():
    result = aggregate([record(p, 0, "diverge", reference=r) for p in range(11) for r in "ab"])
    lines = workflow_commands({"": result})
    assert len(lines) == 10
    assert "13 more probes and pairs are not green" in lines[-1]


def test_missing_cells_and_damaged_records_are_annotated(tmp_path):
    plan = Plan.product((0, 1), (("mlx", "mlx-lm"),), ("tiny",), (0,))
    folder = saved(tmp_path / "a", [record(0, 0)], plan)
    (folder / "records" / "b.json").write_text("{")
    done = parity("ci", "annotate", folder)
    assert done.exit_code == 0
    damaged, missing = done.stdout.splitlines()
    assert "Damaged records" in damaged and "b.json" in damaged
    assert "missing on tiny, seed 0: there is no record" in missing


def test_the_packages_that_moved_are_named_with_the_search_between_them(tmp_path):
    def at(version: str, verdict: str = "identical"):
        one = record(2, 0, verdict)
        one.subject.environment = {"versions": {"mlx": version, "numpy": "2.4"}, "python": "3.12"}
        return one

    before = saved(tmp_path / "before", [at("0.32.1")])
    same = saved(tmp_path / "same", [at("0.32.1")])
    worse = saved(tmp_path / "worse", [at("0.32.4", "diverge")])
    better = saved(tmp_path / "better", [at("0.32.4")])
    assert "No package" in parity("ci", "moved", before, same).stdout
    text = parity("ci", "moved", before, better).stdout
    assert "| mlx | 0.32.1 | 0.32.4 |" in text and "numpy" not in text and "bisect" not in text
    text = parity("ci", "moved", before, worse).stdout
    line = next(line for line in text.splitlines() if line.startswith("parity bisect"))
    wanted = "--package mlx==0.32.1..0.32.4 --subject mlx --reference mlx-lm --probe 02 --seed 0"
    assert line == f"parity bisect {wanted}"
    assert main.commands["bisect"].make_context("bisect", shlex.split(line)[2:])
    none = parity("ci", "moved", tmp_path / "nothing", better)
    assert none.exit_code == 0 and "There is no run before" in none.stdout
