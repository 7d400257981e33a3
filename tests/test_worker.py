"""Worker processes: what dies, hangs or refuses becomes an answer, and the run goes on."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from parity.capture.capacity import Jobs
from parity.capture.engine import Engine
from parity.cells.cell import Cell
from parity.cells.run import run_cell
from parity.errors import CaptureError, Unsupported
from parity.recipe import Recipe
from parity.record import Verdict
from parity.report.text import describe
from parity.stages import find
from parity.trace import Trace
from tests.cost import long

FAULTY = "tests.faulty_paths:Faulty"
ADAPTER = {
    "adapter/layers.0.q_proj.lora_a": np.zeros((4, 2), np.float32),
    "adapter/layers.0.q_proj.lora_b": np.zeros((2, 4), np.float32),
}
IDS = Trace({"ids.0": np.zeros((1, 3), np.int32)})
ROWS = {"ids": np.zeros((1, 3), np.int32), "lengths": np.array([[0, 3]], np.int32)}
BATCH = Trace({**ADAPTER, **ROWS})
PROMPTS = Trace(ADAPTER, {"prompts": ["a"], "expected": "b"})
TEXTS = Trace(scalars={"texts": [], "conversations": []})


@pytest.fixture
def fresh(empty_cache):
    with Engine(cache=empty_cache, timeout=60) as engine:
        yield engine


def pid(engine, seed):
    recipe = Recipe().override({"seed.value": seed})
    trace = engine.capture(FAULTY, "defaults", recipe, Trace(), f"-{seed}")
    return trace.scalars["pid"]


def test_one_process_lives_through_all_seeds_and_is_replaced_when_it_dies(fresh):
    first = pid(fresh, 1)
    assert pid(fresh, 2) == first
    with pytest.raises(CaptureError, match=r"died .signal 9. in logits") as caught:
        fresh.capture(FAULTY, "logits", Recipe(), IDS)
    assert "the last words of a dying process" in caught.value.detail
    assert pid(fresh, 3) != first


def test_a_hanging_path_is_ended_at_its_time_limit(fresh):
    fresh.timeout = 3
    with pytest.raises(CaptureError, match=r"longer than 3 s in gradient.*--timeout"):
        fresh.capture(FAULTY, "gradient", Recipe(), BATCH)
    fresh.timeout = 60
    assert pid(fresh, 1)


def test_an_exception_keeps_its_type_its_words_and_its_traceback(fresh):
    with pytest.raises(CaptureError, match="RuntimeError in train: shapes") as caught:
        fresh.capture(FAULTY, "train", Recipe(), Trace())
    assert "faulty_paths.py" in caught.value.detail
    with pytest.raises(Unsupported, match="it only trains"):
        fresh.capture(FAULTY, "decode", Recipe(), PROMPTS)
    with pytest.raises(Unsupported, match="has no tokenization"):
        fresh.capture(FAULTY, "tokenization", Recipe(), TEXTS)


def test_a_crash_becomes_the_record_of_its_cell(fresh):
    record = run_cell(fresh, Cell(find("lora_init"), FAULTY, "mlx", Recipe()))
    assert record.verdict is Verdict.ERROR
    assert "ContractError in lora_init: pid (1,) int64 is not part of it; scalar" in record.reason
    record = run_cell(fresh, Cell(find("config"), FAULTY, "mlx", Recipe()))
    assert record.verdict is Verdict.SKIP
    assert "has no config" in record.reason


def test_what_was_captured_is_not_run_again(fresh, empty_cache):
    first = pid(fresh, 1)
    assert fresh.captured == 1
    with Engine(cache=empty_cache) as other:
        assert pid(other, 1) == first
        assert other.captured == 0


def test_a_subject_that_is_the_reference_proves_nothing(fresh):
    record = run_cell(fresh, Cell(find("logits"), "mlx", "mlx", Recipe()))
    assert record.verdict is Verdict.INCONCLUSIVE
    assert "the subject is the reference" in record.reason


def test_what_does_not_repeat_itself_is_inconclusive(empty_cache, small):
    sgd_free = small.override({"optim.weight_decay": 0.1})  # one round: both decays are the same
    with Engine(cache=empty_cache) as engine:
        record = run_cell(
            engine, Cell(find("optimizer_step"), "tests.faulty_paths:Moody", "hf", sgd_free), True
        )
        assert record.verdict is Verdict.INCONCLUSIVE, describe(record)
        assert "does not repeat itself" in record.reason
        steady = {"subject": {"optim.lr": 1e-3}}
        record = run_cell(engine, Cell(find("optimizer_step"), "mlx", "hf", small, steady), True)
        assert record.verdict is Verdict.DIVERGE
        assert record.artifacts
        assert all(file.endswith(".safetensors") for file in record.artifacts)


def test_only_so_many_processes_stay_alive(empty_cache):
    """Memory must not grow with the paths that take part."""
    with Engine(cache=empty_cache, timeout=60, jobs=Jobs(2, alive=1)) as engine:
        first = pid(engine, 1)
        other = engine.capture("tests.faulty_paths:Packaging", "defaults", Recipe(), Trace())
        alone = engine.capture("tests.patching_paths:Declared", "defaults", Recipe(), Trace())
        assert len(engine._pool._idle) == 1
        assert other.environment["pid"] == first
        assert alone.environment["pid"] != first
        assert pid(engine, 2) not in (first, alone.environment["pid"])


def test_paths_on_the_same_libraries_share_a_process(empty_cache):
    recipe, texts = Recipe(), TEXTS
    with Engine(cache=empty_cache, jobs=Jobs(1, 5)) as engine:
        pids = [
            engine.capture(path, "tokenization", recipe, texts).environment["pid"]
            for path in ("mlx", "mlx-lm", "mlx+loss=mlx-lm")
        ]
        assert len(set(pids)) == 1
        # Who edits a trainer of their own does not make the others run again.
        own = engine.capture("tests.patching_paths:Clean", "tokenization", recipe, texts)
        assert own.environment["pid"] not in pids


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("Method", "mlx.nn.layers.linear.Linear.__call__"),
        long("Function", "mlx_lm.tuner.trainer.default_loss"),
        long("Attribute", "mlx.nn.layers.base.Module.patched"),
        ("Variable", "variable MLX_PARITY_TEST"),
    ],
)
def test_a_path_that_changes_its_libraries_gets_a_process_of_its_own(empty_cache, name, what):
    notices: list[str] = []
    changing, clean = f"tests.patching_paths:{name}", "tests.patching_paths:Clean"
    with Engine(cache=empty_cache, notice=notices.append, jobs=Jobs(1, 5)) as engine:
        before = engine.capture(clean, "tokenization", Recipe(), TEXTS)
        once = engine.capture(changing, "tokenization", Recipe(), TEXTS)
        after = engine.capture(clean, "tokenization", Recipe(), TEXTS, "-again")
        again = engine.capture(changing, "tokenization", Recipe(), TEXTS, "-again")
    assert before.environment["pid"] == once.environment["pid"]
    assert after.environment["pid"] != once.environment["pid"] == again.environment["pid"]
    [told] = [text for text in notices if "process of its own" in text]
    assert changing in told
    assert what in told


def test_a_path_that_does_not_seed_does_not_repeat_itself_in_a_shared_process(empty_cache):
    """What an earlier call left in a generator must not decide what is drawn."""
    one = Trace(scalars={"texts": ["a"], "conversations": []})
    with Engine(cache=empty_cache, jobs=Jobs(1, 5)) as engine:
        drawn = [
            engine.capture(
                "tests.patching_paths:Unseeded", "tokenization", Recipe(), one, attempt
            ).scalars["decoded"]
            for attempt in ("-1", "-2")
        ]
    assert drawn[0] != drawn[1]


def test_what_is_registered_for_the_end_of_a_process_is_done(empty_cache):
    with Engine(cache=empty_cache) as engine:
        engine.capture("tests.faulty_paths:Asleep", "defaults", Recipe(), Trace())
        assert not (empty_cache / "ended").exists()
    assert (empty_cache / "ended").exists()


@pytest.mark.parametrize(("request_line", "code"), [("", 0), ("no request", 1)])
def test_a_process_says_how_it_ended(empty_cache, request_line, code):
    command = [sys.executable, "-m", "parity.capture.serving", "numpy", str(empty_cache)]
    done = subprocess.run(command, input=request_line, capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert ("JSONDecodeError" in done.stderr) == bool(code)
