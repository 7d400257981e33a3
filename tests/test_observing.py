"""Observing must not change what is observed: adapters end byte for byte as in a bare run."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from parity import resources
from parity.capture.worker import environment
from parity.names import canonical
from parity.trace import Trace


@pytest.fixture(scope="module")
def small(compiled):
    """Watched as it is run: with a compiled step."""
    return compiled


@pytest.fixture(scope="module")
def bare_cli(tmp_path_factory, small, engine):
    """The adapter that the plain command line saves, in a process nobody looks into."""
    folder = tmp_path_factory.mktemp("cli")
    keys = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    keys += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    config = {
        "model": resources.model_dir(small.model.source),
        "train": True,
        "data": str(resources.data_dir(small.data.source)),
        "seed": small.seed.value,
        "num_layers": -1,
        "lora_parameters": {"rank": 8, "scale": 2.0, "dropout": 0.0, "keys": keys},
        "batch_size": small.train.batch_size,
        "iters": small.train.steps,
        "learning_rate": small.optim.lr,
        "optimizer": "adamw",
        "optimizer_config": {
            "adamw": {
                "bias_correction": True,
                "weight_decay": 0.0,
                "betas": [0.9, 0.999],
                "eps": 1e-8,
            }
        },
        "adapter_path": str(folder),
        "steps_per_report": 1,
        "val_batches": 0,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    done = subprocess.run(
        [sys.executable, "-m", "mlx_lm", "lora", "--config", str(folder / "config.yaml")],
        env=environment("mlx", engine.cache),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    saved = load_file(folder / "adapters.safetensors")
    return {canonical(name): value for name, value in saved.items()}, done.stdout


def assert_same_bytes(adapter, bare):
    assert adapter.keys() == bare.keys()
    assert len(adapter) == 252
    for name, value in bare.items():
        assert adapter[name].tobytes() == value.tobytes(), name
    assert any(np.any(v) for k, v in bare.items() if k.endswith("lora_b")), "nothing was trained"


@pytest.mark.parametrize("path", ["mlx-lm", "mlx"])
def test_an_instrumented_mlx_run_ends_like_the_bare_cli(path, engine, small, bare_cli):
    adapter, printed = bare_cli
    trace = engine.capture(path, "train", small, Trace())
    assert_same_bytes(trace.group("adapter"), adapter)
    assert f"{trace.arrays['loss'][-1]:.3f}" in printed, "the CLI prints the loss that was recorded"


def test_the_cli_as_a_black_box_agrees_with_what_is_read_at_its_door(engine, small):
    """SGD at rate 1 moves the adapter by exactly the gradient; rate 0 leaves the init."""
    once = small.override({"train.steps": 1, "optim.name": "sgd", "optim.lr": 1.0})
    init = engine.capture("mlx-lm", "lora_init", once, Trace()).group("adapter")
    still = engine.capture("mlx-lm", "train", once.override({"optim.lr": 0.0}), Trace())
    assert_same = still.group("adapter")
    assert all(np.array_equal(init[name], assert_same[name]) for name in init)
    moved = engine.capture("mlx-lm", "train", once, Trace())
    batch = moved.group("batches")
    inputs = Trace({"ids": batch["ids.0"], "lengths": batch["lengths.0"]}).with_group(
        "adapter", init
    )
    gradient = engine.capture("mlx-lm", "gradient", small, inputs).group("gradient")
    for name, value in moved.group("adapter").items():
        np.testing.assert_array_equal(value, init[name] - gradient[name], err_msg=name)


@pytest.mark.long
def test_a_worker_gives_the_same_bits_again_and_after_other_work(engine, empty_cache, small):
    """One process lives through all seeds: nothing of one run may reach the next."""
    from parity.capture.engine import Engine

    first = engine.capture("mlx", "train", small, Trace())
    with Engine(cache=empty_cache) as other:
        other.capture("mlx", "train", small.override({"seed.value": 1}), Trace())
        other.capture(
            "mlx", "train", small.override({"train.gradient_checkpointing": True}), Trace()
        )
        again = other.capture("mlx", "train", small, Trace())
    assert first.digest() == again.digest()


BARE_TORCH = """
import sys
import torch
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

model_dir, batches, out, lr = sys.argv[1:5]
torch.set_num_threads(1)
given = load_file(batches)
torch.manual_seed(3407)
base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager")
targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
torch.manual_seed(3407)
model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=targets))
model.train()
trainable = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(trainable, lr=float(lr), weight_decay=0.0)
for step in range(len(given) // 2):
    ids = torch.tensor(given[f"ids.{step}"], dtype=torch.long)
    n = torch.tensor(given[f"lengths.{step}"], dtype=torch.long)[:, 1:]
    places = torch.arange(1, ids.shape[1])
    labels = torch.where(places <= n, ids[:, 1:], -100)  # one past the end, as mlx-lm does
    loss = model(ids[:, :-1], labels=labels, shift_labels=labels).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
save_file({k: p.detach().numpy().T.copy() for k, p in model.named_parameters() if p.requires_grad}, out)
"""


def test_an_instrumented_hf_run_ends_like_a_bare_torch_loop(engine, small, tmp_path):
    from safetensors.numpy import save_file

    batches = engine.capture("mlx", "batches", small, Trace()).arrays
    save_file(batches, tmp_path / "batches.safetensors")
    model = resources.model_dir(small.model.source)
    files = str(tmp_path / "batches.safetensors"), str(tmp_path / "out.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", BARE_TORCH, model, *files, str(small.optim.lr)],
        env=environment("torch", engine.cache),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    trace = engine.capture("hf", "train", small, Trace().with_group("batches", batches))
    bare = {canonical(name): value for name, value in load_file(files[1]).items()}
    assert_same_bytes(trace.group("adapter"), bare)
