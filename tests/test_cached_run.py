"""A run whose captures are all cached does nothing twice and gives the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from parity import derived, resources
from parity.results.statistics import mcnemar, wilson
from parity.trace import Trace
from tests.cost import long

SCRIPT = """
import sys
from parity.cli import main
try:
    few = ["--set", "train.steps=3", "--set", "train.compile=false"]
    main(["run", "--seeds", "1", *few, "--out", *sys.argv[1:]])
finally:
    print("LOADED", *(n for n in ("scipy.stats", "torch", "mlx.core") if n in sys.modules))
"""


def run(folder: Path, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), *words],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def records(folder: Path) -> list:
    found = [json.loads(file.read_text()) for file in sorted((folder / "records").glob("*.json"))]
    return [{k: v for k, v in record.items() if k not in ("seconds", "digest")} for record in found]


@pytest.mark.parametrize(("reference", "probes"), [("mlx-lm", "01,07"), long("hf", "01,04,07")])
def test_it_starts_no_worker_and_no_library_that_is_slow_to_start(reference, probes, tmp_path):
    words = ["--reference", reference, "--probes", probes]
    run(tmp_path / "first", *words)
    again = run(tmp_path / "again", *words)
    assert not (tmp_path / "again" / "logs").exists()
    assert again.splitlines()[-1] == "LOADED"
    assert records(tmp_path / "again") == records(tmp_path / "first")
    pages = [(tmp_path / name / "report.html").read_text() for name in ("first", "again")]
    assert pages[0].count("<svg") == pages[1].count("<svg") > 0


def test_what_is_derived_is_made_once_and_again_where_its_input_or_file_is_gone(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("PARITY_CACHE", str(tmp_path))
    made = []

    def make():
        made.append(1)
        return "é"

    assert [derived.kept("kind", ("a", 1), make) for _ in range(2)] == ["é", "é"]
    assert len(made) == 1
    derived.kept("kind", ("a", "1"), make)
    assert len(made) == 2
    for file in (tmp_path / derived.FOLDER).rglob("*"):
        if file.is_file():
            file.write_bytes(b"\xff")
    assert derived.kept("kind", ("a", 1), make) == "é"
    assert len(made) == 3


def test_a_compiled_template_is_used_again_and_a_damaged_one_is_not(tmp_path, monkeypatch):
    from jinja2 import Environment

    from parity.report.html import templates
    from parity.report.profile import TEMPLATE

    monkeypatch.setenv("PARITY_CACHE", str(tmp_path))
    compiled = []
    plain = Environment._compile
    monkeypatch.setattr(Environment, "_compile", lambda *given: compiled.append(1) or plain(*given))
    for expected in (1, 1):
        templates().get_template(TEMPLATE)
        assert len(compiled) == expected
    [file] = (tmp_path / "derived" / "templates").iterdir()
    for damaged in (b"", file.read_bytes()[:-9], b"x" * 200):
        file.write_bytes(damaged)
        compiled.clear()
        templates().get_template(TEMPLATE)
        assert compiled == [1]
    monkeypatch.setenv("PARITY_CACHE", str(file))
    templates().get_template(TEMPLATE)


def test_a_cache_that_cannot_be_written_changes_nothing(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PARITY_CACHE", str(tmp_path / "file"))
    assert derived.kept("kind", (), lambda: "text") == "text"


def test_the_keys_of_folders_and_traces_are_those_of_earlier_versions(tmp_path):
    """Captures of earlier versions are found by them."""
    (tmp_path / "b").mkdir()
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b" / "c.txt").write_text("cc")
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "d.pyc").write_text("d")
    for file in (tmp_path / "a.txt", tmp_path / "b" / "c.txt"):
        os.utime(file, ns=(0, 5))
    import hashlib

    text = f"{tmp_path}a.txt15b/c.txt25"
    assert resources.fingerprint(tmp_path) == hashlib.sha256(text.encode()).hexdigest()[:16]
    trace = Trace(
        {
            "x": np.arange(6, dtype=np.float32).reshape(2, 3).T,
            "empty": np.zeros((0, 3), np.int32),
            "one": np.array(2.5),
        },
        {"n": 1},
    )
    h = hashlib.sha256(b'{"n": 1}')
    for name in sorted(trace.arrays):
        value = trace.arrays[name]
        h.update(f"{name}{value.dtype}{value.shape}".encode())
        h.update(value.tobytes())
    assert trace.digest() == h.hexdigest()[:16]


@pytest.mark.parametrize("n", [1, 2, 3, 15, 59, 1000])
def test_wilson_is_scipys_and_mcnemar_is_as_near_as_scipys(n):
    from scipy.stats import binomtest

    for passed in {0, 1, n // 3, n - 1, n}:
        ci = binomtest(passed, n).proportion_ci(0.95, "wilson")
        assert (wilson(passed, n).low, wilson(passed, n).high) == (ci.low, ci.high)
        exact = mcnemar(np.int64(passed), np.int64(n - passed)).exact_p
        assert exact == pytest.approx(binomtest(passed, n).pvalue, rel=1e-12)
