"""Path `trl`: the real SFTTrainer, observed and not changed, on exactly what it is handed."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from parity import resources
from parity.capture.worker import environment
from parity.cells.cell import Cell
from parity.cells.run import context_of, run_cell
from parity.errors import Unsupported
from parity.names import canonical
from parity.paths.plugin.on_torch.seen import Step
from parity.paths.plugin.on_torch.watch import TorchWatch
from parity.paths.trl.trainer import check
from parity.record import Verdict
from parity.report.text import describe
from parity.stages import find
from parity.trace import Trace
from tests.cost import long

BARE = """
import json, sys
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.numpy import load_file, save_file
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

model, lr, *jobs = sys.argv[1:]
torch.set_num_threads(1)
targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
for data in jobs:
    options = {}
    if data.endswith(".jsonl"):
        rows = Dataset.from_list([json.loads(line) for line in open(data)])
    else:
        given = load_file(data)
        steps = range(len(given) // 2)
        ids = [row for step in steps for row in given[f"ids.{step}"].tolist()]
        ends = [n for step in steps for n in given[f"lengths.{step}"][:, 1].tolist()]
        # one position past the end is supervised, as in mlx-lm
        labels = [
            [-100] + [id if at <= n else -100 for at, id in enumerate(row[1:], 1)]
            for row, n in zip(ids, ends)
        ]
        rows = Dataset.from_dict({"input_ids": ids, "labels": labels})
        options["dataset_kwargs"] = {"skip_prepare_dataset": True}
        options["train_sampling_strategy"] = "sequential"
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            "output", use_cpu=True, bf16=False, gradient_checkpointing=False, max_steps=6,
            per_device_train_batch_size=6, optim="adamw_torch", learning_rate=float(lr),
            lr_scheduler_type="constant", max_grad_norm=0.0, seed=3407, report_to="none",
            save_strategy="no", model_init_kwargs={"attn_implementation": "eager"}, **options,
        ),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=LoraConfig(
            task_type="CAUSAL_LM", r=8, lora_alpha=16, lora_dropout=0.0, target_modules=targets
        ),
    )
    trainer.train()
    adapter = [(k, p) for k, p in trainer.model.named_parameters() if p.requires_grad]
    save_file({k: p.detach().numpy().T.copy() for k, p in adapter}, data.rpartition("/")[2] + ".out")
"""

OWN = {
    "data.source": "mixed",
    "data.pad_extra": 0,
    "data.pad_multiple": 1,
    "mask.end_shift": 0,
    "seed.placement": "before_load",
}
"""What SFTTrainer does with rows and a checkpoint that nobody prepared for it."""


@pytest.fixture(scope="module")
def handed_over(engine, small):
    return engine.capture("mlx", "batches", small, Trace()).arrays


def bare(file, engine, small, handed_over, folder):
    """The adapter of a script that nobody looks into, on rows or on batches."""
    save_file(handed_over, folder / "batches.safetensors")
    rows = resources.data_dir("mixed") / "train.jsonl"
    data = rows if file == rows.name else folder / file
    words = [resources.model_dir(small.model.source), str(small.optim.lr), str(data)]
    done = subprocess.run(
        [sys.executable, "-c", BARE, *words],
        env=environment("torch", engine.cache),
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return {canonical(k): v for k, v in load_file(folder / f"{file}.out").items()}


@pytest.mark.parametrize("file", [long("train.jsonl"), "batches.safetensors"])
def test_an_instrumented_run_ends_like_a_bare_script(file, engine, small, handed_over, tmp_path):
    recipe, inputs = small, Trace().with_group("batches", handed_over)
    if file == "train.jsonl":
        recipe, inputs = small.override(OWN), Trace()
    adapter = engine.capture("trl", "train", recipe, inputs).group("adapter")
    expected = bare(file, engine, small, handed_over, tmp_path)
    assert adapter.keys() == expected.keys()
    assert len(adapter) == 252
    for name, value in expected.items():
        assert adapter[name].tobytes() == value.tobytes(), name
    assert any(np.any(v) for k, v in adapter.items() if k.endswith("lora_b")), "nothing was trained"


def test_batches_handed_over_are_trained_on_as_given(engine, small, handed_over):
    inputs = Trace().with_group("batches", handed_over)
    ours, theirs = (engine.capture(path, "train", small, inputs) for path in ("trl", "hf"))
    for name, value in handed_over.items():
        np.testing.assert_array_equal(ours.arrays[f"batches/{name}"], value, err_msg=name)
    np.testing.assert_array_equal(ours.arrays["tokens"], theirs.arrays["tokens"])
    np.testing.assert_allclose(ours.arrays["loss"], theirs.arrays["loss"], rtol=1e-5)
    norms = ours.arrays["gradient_norm"]
    np.testing.assert_allclose(norms, theirs.arrays["gradient_norm"], rtol=1e-4)
    assert not np.array_equal(norms, norms.round(4)), "norms are read from tensors, not from a log"


def test_its_own_batches_are_those_it_trains_on(engine, small):
    recipe = small.override(OWN)
    shown = engine.capture("trl", "batches", recipe, Trace()).arrays
    trained = engine.capture("trl", "train", recipe, Trace()).group("batches")
    assert shown.keys() == trained.keys()
    assert len(shown) == 12
    assert all(np.array_equal(value, trained[name]) for name, value in shown.items())


@pytest.mark.parametrize(
    ("method", "changes", "reason"),
    [
        ("train", {}, "data.pad_extra=1"),
        ("train", {"data.pad_extra": 0}, "mask.end_shift=1"),
        ("config", {"optim.clip": "value"}, "optim.clip=value"),
        ("config", {"optim.bias_correction": False}, r"optim\.bias_correction=True, not False"),
        ("config", {"optim.name": "adam"}, "optim.name=adam"),
        ("config", {"train.accumulation": 2}, "train.accumulation_weighting=token, not mean"),
        ("lora_init", {"model.dtype": "float64"}, "float32"),
        ("batches", {**OWN, "mask.prompt": True}, "mask.prompt"),
        ("batches", {**OWN, "data.append_eos": False}, "data.append_eos=false"),
    ],
)
def test_a_factor_it_cannot_honour_is_refused_with_the_reason(
    method, changes, reason, engine, small
):
    with pytest.raises(Unsupported, match=reason):
        engine.capture("trl", method, small.override(changes), Trace())


@pytest.mark.parametrize("path", ["mlx", "mlx-lm"])
def test_mlx_has_no_autocast(path, engine, small):
    with pytest.raises(Unsupported, match=r"train\.autocast"):
        engine.capture(path, "config", small.override({"train.autocast": "bfloat16"}), Trace())


def test_a_prompt_is_masked_in_conversations(engine, small):
    recipe = small.override({"data.source": "chat", "mask.prompt": True})
    inputs = Trace(scalars={"texts": [], "conversations": []})
    ours, theirs = (engine.capture(path, "tokenization", recipe, inputs) for path in ("trl", "hf"))
    assert ours.digest() == theirs.digest()
    assert ours.arrays["offset.0"] > 1


@pytest.mark.long
@pytest.mark.parametrize("reference", [long("hf"), "mlx-lm"])
def test_what_differs_as_shipped_is_named(reference, engine, small):
    record = run_cell(engine, Cell(find("config"), "trl", reference, small))
    assert record.verdict.green, describe(record)
    said = "\n".join(record.findings)
    for what in (
        "autocast of the forward pass: bfloat16 in the subject, none",
        "gradient checkpointing: True in the subject, False",
        "gradient clip: norm in the subject, none",
        "learning rate at step 2: 0.0025 in the subject, 0.003",
        "the seed is set: before_load in the subject, before_lora",
    ):
        assert f"as shipped: {what}" in said
    own = {
        "hf": "weight decay: 0 in the subject, 0.01",
        "mlx-lm": "the subject supervises 1 position fewer per row",
    }
    assert f"as shipped: {own[reference]}" in said


def test_bits_are_expected_only_where_the_operations_are_the_same(engine, small):
    def exact(stage, subject, reference):
        return context_of(engine, Cell(find(stage), subject, reference, small)).exact

    assert exact("logits", "trl", "hf")
    assert not exact("gradient", "trl", "hf")
    assert exact("gradient", "trl", "trl")
    assert not exact("logits", "trl", "mlx")
    record = run_cell(engine, Cell(find("cross_entropy"), "trl", "hf", small))
    assert record.verdict is Verdict.AGREE, describe(record)
    assert record.expectation == "noise floor"
    assert "SFTTrainer computes head and loss in one function of its own" in record.findings[-1]
    assert (
        run_cell(engine, Cell(find("lora_init"), "trl", "hf", small)).verdict is Verdict.IDENTICAL
    )


def test_a_run_that_was_not_measured_is_an_error(small):
    def run(norms):
        return TorchWatch(steps=[Step([], norm, {}, 0.1) for norm in norms])

    steps = small.train.steps
    check(run(map(float, range(steps))), small)
    with pytest.raises(RuntimeError, match=f"made {steps} steps, the recipe has 7"):
        check(run(map(float, range(steps))), small.override({"train.steps": 7}))
    constant = run([0.5] * steps)
    with pytest.raises(RuntimeError, match=r"the gradient norm is 0\.5 at all 6 steps"):
        check(constant, small)
    check(constant, small.override({"optim.lr": 0.0}))
