"""A mixture of experts: its float64 run exists, so that its floors have their main source."""

from __future__ import annotations

import json
import shutil

import pytest

from parity import resources
from parity.cells.cell import Cell
from parity.cells.run import run_cell
from parity.judge.noise import REFEREE
from parity.report.text import describe
from parity.stages import find


@pytest.fixture(scope="module")
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


@pytest.mark.parametrize("probe", ["02", "05"])
def test_a_clean_mixture_of_experts_agrees_with_all_sources(probe, experts, engine, small):
    recipe = small.override(
        {"model.source": str(experts), "lora.target_modules": ["q_proj", "k_proj", "v_proj"]}
    )
    record = run_cell(engine, Cell(find(probe), "mlx", "hf", recipe))
    assert record.verdict.green, describe(record)
    floors = [metric for metric in record.metrics if metric.floor]
    assert floors
    for metric in floors:
        assert isinstance(metric.sources[REFEREE], float), metric.sources
