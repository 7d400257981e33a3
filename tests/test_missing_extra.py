"""A reference whose package is not installed: its pair is skipped, and no run is green by that."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from parity.cli import main

ABSENT = "tests.faulty_paths:NotInstalled"
HOW = "needs a-trainer-of-mine, not installed here: pip install a-trainer-of-mine"


def run(tmp_path, *words):
    out = tmp_path / "run"
    done = CliRunner().invoke(main, ["run", "--seeds", "1", "--out", str(out), *words])
    read = [json.loads(file.read_text()) for file in (out / "records").glob("*.json")]
    return done, {record["reference"]["path"]: record for record in read}


@pytest.mark.parametrize(
    ("changes", "code", "says"),
    [
        ((), 3, f"nothing was compared for mlx vs {ABSENT}"),
        (("--set-subject", "data.append_eos=false"), 1, "1 diverge, 1 skip"),
    ],
)
def test_the_exit_code_tells_it_apart_from_a_divergence(changes, code, says, tmp_path):
    references = ("--reference", "mlx-lm", "--reference", ABSENT)
    done, records = run(tmp_path, "--probes", "01", *references, *changes)
    assert done.exit_code == code, done.output
    assert says in " ".join(done.output.split())
    assert records[ABSENT]["verdict"] == "skip"
    assert HOW in records[ABSENT]["reason"]
    assert HOW in " ".join(done.output.split())
    again = CliRunner().invoke(main, ["report", str(tmp_path / "run")])
    assert again.exit_code == code


def test_with_nothing_else_nothing_was_compared(tmp_path):
    done, _ = run(tmp_path, "--probes", "01", "--reference", ABSENT)
    assert done.exit_code == 3, done.output
    assert "nothing was compared: 1 skip" in " ".join(done.output.split())


def test_without_the_subject_there_is_nothing_to_do(tmp_path):
    done, records = run(tmp_path, "--subject", ABSENT)
    assert (done.exit_code, records) == (2, {})
    assert HOW in done.output
