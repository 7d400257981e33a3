"""Shared by the tests: an engine on a cache that outlives the test run, and a small recipe."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from fixtures.random_models import make
from parity import resources
from parity.capture import forking
from parity.capture.engine import Engine
from parity.recipe import Recipe


def pytest_configure():
    """Workers of all processes of a test run are forked from the same parents."""
    forking.folder()


FEW = Recipe().override({"train.steps": 6, "optim.lr": 3e-3})


@pytest.fixture(scope="session")
def engine():
    """Real workers; captures are cached by content, so a test never sees another code's result."""
    with Engine(timeout=900) as engine:
        yield engine


@pytest.fixture
def empty_cache(engine, tmp_path):
    """A cache without captures. Compiled kernels are those of all tests: they decide no result."""
    kernels = engine.cache / "kernels"
    kernels.mkdir(parents=True, exist_ok=True)
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "kernels").symlink_to(kernels)
    return cache


@pytest.fixture(scope="session")
def small():
    """A few steps on the tiny Gemma 3.

    Nothing is compiled: MLX's kernels take a C++ compiler about a second each, and hundreds of them more
    time than all tests. Tests in which a compiled step matters say so.
    """
    return FEW.override({"train.compile": False})


@pytest.fixture(scope="session")
def compiled():
    """The same with a compiled step, as trainers run it."""
    return FEW


@pytest.fixture
def uv():
    """What makes environments; it is no dependency of the package."""
    beside = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    if not shutil.which("uv", path=beside):
        pytest.skip("environments are made with uv, which is not installed")


@pytest.fixture(scope="session")
def experts(tmp_path_factory):
    """Folder of a Qwen 3 mixture of experts with random weights and the tiny Qwen's tokenizer."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    folder = tmp_path_factory.mktemp("models") / "tiny-experts"
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, moe_intermediate_size=32,
        num_experts=4, num_experts_per_tok=2, norm_topk_prob=True, decoder_sparse_step=1,
        tie_word_embeddings=False, initializer_range=0.06, max_position_embeddings=512,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    # mlx-lm reads these two where older releases of transformers wrote them.
    file = folder / "config.json"
    saved = json.loads(file.read_text())
    theta = saved["rope_parameters"]["rope_theta"]
    file.write_text(json.dumps({**saved, "num_experts": 4, "rope_theta": theta}))
    for file in (resources.fixtures() / "models" / "tiny-qwen3").glob("*token*"):
        shutil.copy(file, folder)
    for name in ("chat_template.jinja", "generation_config.json"):
        file = resources.fixtures() / "models" / "tiny-qwen3" / name
        if file.exists():
            shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="session")
def random_model(tmp_path_factory):
    """Makes a folder with a random model of an architecture, which a function may change."""

    def made(kind, change=None, top_level=None, **config):
        return make(tmp_path_factory.mktemp(kind), kind, config, top_level, change)

    return made
