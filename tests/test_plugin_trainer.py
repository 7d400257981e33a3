"""A whole trainer as a path: watched from outside, without changing what it does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from parity import resources
from parity.bisect.causes import CauseSearch
from parity.capture.worker import environment
from parity.cells.cell import Cell
from parity.cells.run import run_cell
from parity.errors import Unsupported
from parity.names import canonical
from parity.paths import parts
from parity.paths.measured import known
from parity.paths.registry import resolve
from parity.record import Verdict
from parity.report.text import describe
from parity.stages import find
from parity.trace import Trace
from tests.cost import long

HERE = "tests.user_trainers"
EXAMPLES = Path(__file__).parents[1] / "examples"
BARE = """
import json, sys
from pathlib import Path
import {module}
given = json.loads(sys.argv[1])
{module}.{function}(**given)
"""


@pytest.fixture(autouse=True)
def examples(monkeypatch):
    """The examples as they lie where somebody works on them."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setenv("PYTHONPATH", f"{EXAMPLES}:{EXAMPLES.parent}")


def bare(engine, module, function, **given):
    """The adapter that a trainer leaves in `out` in a process that nobody looks into."""
    done = subprocess.run(
        [sys.executable, "-c", BARE.format(module=module, function=function), json.dumps(given)],
        env=environment("mlx", engine.cache),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    [file] = Path(given["out"]).glob("*.safetensors")
    return {canonical(name): value for name, value in load_file(file).items()}


def same_bytes(adapter, left):
    assert adapter.keys() == left.keys() and len(left) == 252
    for name, value in left.items():
        assert adapter[name].tobytes() == value.tobytes(), name
    assert any(value.any() for name, value in left.items() if name.endswith("lora_b"))


def settings(recipe):
    return {
        "steps": recipe.train.steps, "lr": recipe.optim.lr, "rank": 8, "scale": 2.0,
        "batch_size": recipe.train.batch_size, "seed": recipe.seed.value,
    }  # fmt: skip


def test_a_compiled_script_ends_in_the_bytes_of_its_bare_run(engine, compiled, tmp_path):
    left = bare(
        engine, "finetune", "train", model_path=resources.model_dir(compiled.model.source),
        data=str(resources.data_dir(compiled.data.source)), out=str(tmp_path), **settings(compiled),
    )  # fmt: skip
    trace = engine.capture("finetune_path:Finetune", "train", compiled, Trace())
    same_bytes(trace.group("adapter"), left)


@pytest.mark.long
def test_so_does_one_without_a_compiled_step(engine, small, tmp_path):
    lines = resources.data_dir(small.data.source).joinpath("train.jsonl").read_text().splitlines()
    left = bare(
        engine, HERE, "eager", path=resources.model_dir(small.model.source),
        rows=[json.loads(line) for line in lines], out=str(tmp_path), **settings(small),
    )  # fmt: skip
    trace = engine.capture(f"{HERE}:Eager", "train", small, Trace())
    same_bytes(trace.group("adapter"), left)


def test_the_script_of_sixty_lines_is_a_path_of_twelve():
    script, path = (
        (EXAMPLES / name).read_text().splitlines() for name in ("finetune.py", "finetune_path.py")
    )
    assert len(script) <= 60
    assert len(path) <= 12
    assert not [line for line in path if "import" in line and "parity." in line]
    kind = resolve("finetune_path:Finetune")
    assert kind.own_parts == parts.TRAINING


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        (
            "00",
            "the loss is divided by: all positions in the subject, supervised tokens in the reference",
        ),
        ("03", "the subject averages over padding: on"),
        long("05", "supervised tokens / all positions: does its mean count padding as well?"),
        long("06", "Adam without bias correction"),
    ],
)
def test_what_is_wrong_with_it_is_named(stage, words, engine, small):
    record = run_cell(engine, Cell(find(stage), "finetune_path:Finetune", "mlx-lm", small))
    assert record.verdict is Verdict.DIVERGE
    assert words in describe(record)


@pytest.mark.parametrize("stage", ["05", long("06"), long("07"), long("09")])
def test_a_right_trainer_agrees(stage, engine, small):
    """Against another framework, with batches handed over where each would draw its own."""
    record = run_cell(engine, Cell(find(stage), f"{HERE}:Eager", "hf", small))
    assert record.verdict is Verdict.AGREE or stage == "09", describe(record)
    assert record.verdict.green, describe(record)


@pytest.mark.long
def test_clip_and_accumulation_are_found_by_what_it_does(engine, compiled):
    recipe = compiled.override({"train.accumulation": 2, "train.batch_size": 3})
    found = engine.capture(f"{HERE}:Accumulating", "config", recipe, Trace()).scalars
    assert (found["clip.mode"], found["clip.value"]) == ("norm", 0.25)
    assert found["accumulation.weighting"] == "each in full"
    assert found["train.compile"] is True
    assert found["optim.class"] == "SGD"
    eager = engine.capture(f"{HERE}:Eager", "config", compiled, Trace()).scalars
    assert (eager["clip.mode"], eager["accumulation.steps"]) == ("none", 1)
    assert eager["train.compile"] is False
    assert eager["loss.denominator"] == "supervised tokens"


def test_a_gradient_norm_is_that_before_a_clip(engine, small):
    """With micro-batches only the clip, or the optimizer, is given their sum."""
    recipe = small.override({"train.accumulation": 2, "train.batch_size": 3, "train.steps": 2})
    norms = engine.capture(f"{HERE}:Accumulating", "train", recipe, Trace()).arrays["gradient_norm"]
    assert (norms > 0.3).all(), norms  # it clips at 0.25
    with pytest.raises(
        Unsupported, match=r"clips \(value\) what it makes of several micro-batches"
    ):
        engine.capture(f"{HERE}:ClippingByItself", "train", recipe, Trace())


def test_defaults_that_are_not_known_make_no_shipped_run(engine, small):
    with pytest.raises(Unsupported, match=r"is given .* and nobody knows its defaults"):
        engine.capture("mlx_lm_lora_path:MlxLmLora", "defaults", small, Trace())


def test_a_seed_that_comes_too_late_is_none(engine, small):
    found = engine.capture(f"{HERE}:LateSeed", "config", small, Trace()).scalars
    assert found["seed.placement"] == "after_lora"
    assert not known(found["seed.value"])


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("Without", "no training was seen"),
        ("Inside", "is made inside the compiled step"),
        long("Tired", "made 2 updates where train.steps=6"),
        long("Misread", "what 'weights' is cannot be told; give `batch=`"),
    ],
)
def test_what_cannot_be_watched_is_one_clear_reason(name, says, engine, small):
    with pytest.raises(Unsupported, match=says):
        engine.capture(f"{HERE}:{name}", "train", small, Trace())


@pytest.mark.long
def test_the_search_names_the_loss_of_a_trainer_that_is_run_as_a_whole(engine, small):
    stages = tuple(map(find, ("00", "03", "04")))
    report = CauseSearch(
        engine, "finetune_path:Finetune", "mlx-lm", small, {}, stages=stages
    ).search()
    first, second = report.causes
    assert first.sentence.startswith("the loss of finetune_path:Finetune makes cross_entropy")
    assert "the subject averages over padding" in str(first.hints)
    assert second.sentence.startswith("the code of finetune_path:Finetune beside its loss makes")
    assert "the seed is set: before_load in the subject" in second.sentence


@pytest.mark.parametrize("part", ["wiring", long("clip")])
def test_a_part_of_a_whole_trainer_that_cannot_be_lent_is_refused(part, engine, small):
    with pytest.raises(Unsupported, match=f"its {part} cannot be run by itself"):
        engine.capture(f"mlx+{part}=finetune_path:Finetune", "train", small, Trace())


def test_a_bare_run_is_one_that_nobody_watches(engine, small):
    """`parity check-path` holds the watched run against it."""
    path = "finetune_path:Finetune"
    start = engine.capture(path, "lora_init", small, Trace()).group("adapter")
    inputs = Trace({"ids": np.ones((1, 4), np.int32)}).with_group("adapter", start)
    watched = engine.capture(path, "train", small, Trace().with_group("adapter", start))
    left = engine.capture(path, "train_and_load", small, inputs)
    same_bytes(left.group("trained"), watched.group("adapter"))
