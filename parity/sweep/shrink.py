"""A tiny configuration of any architecture, from its default one: sizes by what their keys are called."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

HIDDEN, HEADS, PAIRS, HEAD = 64, 4, 2, 16
"""Width, attention heads, key-value heads and width of a head."""
VOCABULARY = 512
POSITIONS = 256
"""Positions that the configuration promises; texts are shorter than that unless a trap says otherwise."""
MOST_LAYERS = 8

SIZES: tuple[tuple[str, Any], ...] = (
    (r".*vocab_size.*", VOCABULARY),
    (r"num_nextn_predict_layers|num_mtp_layers|mtp_num_layers", 0),
    (r"num_kv_shared_layers", 0),
    (r"altup_num_inputs", 2),
    (r"laurel_rank", 8),
    (r"hidden_size_per_layer_input", 8),
    (r"q_lora_rank", 24),
    (r"kv_lora_rank", 32),
    (r"qk_rope_head_dim", 8),
    (r"qk_nope_head_dim", 16),
    (r"qk_head_dim", 24),
    (r"index_head_dim", HEAD),
    (r"index_topk", 24),
    (r"index_.*heads", PAIRS),
    (r"(linear_)?num_(global_)?key_value_heads|n_head_kv|num_kv_heads|kv_n_heads|multi_query_group_num", PAIRS),
    (r"linear_num_key_heads", PAIRS),
    (r"linear_num_value_heads|linear_n_heads", HEADS),
    (r"mamba_(n|num)_heads|n_mamba_heads", 8),
    (r"mamba_d_head|mamba_head_dim", HEAD),
    (r"mamba_d_ssm", 2 * HIDDEN),
    (r".*(n_groups|ngroups|num_groups).*", 2),
    (r"(encoder_|decoder_)?(attention_heads|num_attention_heads|n_heads?|num_heads|(swa|linear)_num_(attention_)?heads)", HEADS),
    (r"swa_num_key_value_heads", PAIRS),
    (r"(linear_|swa_|global_|attention_|qk_|v_)?(key_|value_|v_)?(head_dim|head_size|d_kv|d_head)", HEAD),
    (r"rotary_dim", HEAD // 2),
    (r"(num_|n_|moe_num_)?(routed_|local_|total_)?experts|n_routed_experts|moe_num_experts|num_experts", 4),
    (r"(n|num)_group|n_expert_groups?|num_expert_group", 2),
    (r"topk_group|num_limited_groups|limited_groups|topk_groups", 1),
    (r"(num_|moe_)?(experts_per_tok|experts_per_token|top_?k|topk|k|num_experts_per_tok|top_k_experts)", 2),
    (r"zero_expert_num|num_zero_experts", 2),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index|first_dense_layers?", 1),
    (r"(mamba_d_state|state_size|ssm_state_size)", HEAD),
    (r"(time_step_rank|mamba_dt_rank|dt_rank)", 4),
    (r".*chunk_size.*", 32),
    (r"lru_width", HIDDEN),
    (r"(hidden_size|n_embd|d_model|model_dim|embed_dim|dim|embedding_size|input_hidden_size)", HIDDEN),
    (r"(moe|expert|shared_expert).*(intermediate|ffn).*|.*moe_intermediate.*|expert_ffn_hidden_size", 32),
    (r"(intermediate_size|ffn_dim|n_inner|d_ff|d_inner|ffn_hidden_size|intermediate_dim|block_ff_dim|.*intermediate_size.*)", 96),
    (r"(linear_)?(mamba_)?(inner|proj)_?(dim|size)", 2 * HIDDEN),
    (r"(max_position_embeddings|n_positions|n_ctx|max_seq_len|max_sequence_length|model_max_length|seq_length|max_seq_length)", POSITIONS),
    (r"original_max_position_embeddings", POSITIONS // 4),
    (r"(query_pre_attn_scalar)", HEAD),
    (r"(image_size)", 28),
    (r"(patch_size)", 14),
    (r"(projection_dim|out_hidden_size|output_dim|projector_hidden_size|vision_output_dim)", HIDDEN),
    (r"(depth)", 2),
)  # fmt: skip
"""Key (the whole name) → its value in a tiny configuration, where the default is an integer."""
NAMED: tuple[tuple[str, int], ...] = (
    (r"head_dim", HEAD),
    (r"num_key_value_heads", PAIRS),
    (r"n_routed_experts|num_experts", 4),
    (r"n_shared_experts", 1),
    (r"num_experts_per_tok", 2),
)
"""Sizes that some defaults leave open although nothing can be built without."""
LAYERS = (
    r"num_hidden_layers|n_layers?|num_layers|n_layer|num_hidden_layer|encoder_layers|decoder_layers"
)
PERIODS = r".*(period|interval|step|every|frequency|sliding_window_pattern|layer_freq)$"
NOT_TEXT = r".*(vision|audio|image|video|speech).*"
SERVED = ("id2label", "label2id", "transformers_version", "_name_or_path", "architectures", "dtype")
"""Keys that say nothing of the model."""
RANDOM = r".*(dropout|pdrop|drop_path|layerdrop|jitter).*"
"""What a library draws at random while it trains: a gradient under it is another one each time."""
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def shrunk(config: Mapping[str, Any]) -> dict[str, Any]:
    """The default configuration of an architecture, made tiny.

    Layers are as many as it takes to have each kind that the default has, at most `MOST_LAYERS`: lists
    with an entry for each layer are cut at that number.
    """
    found: dict[str, Any] = {}
    total, count = _layers(config)
    for key, value in config.items():
        if key in SERVED:
            continue
        if isinstance(value, Mapping):
            found[key] = (
                shrunk(value) if not re.fullmatch(r"rope_.*|id2label", key) else dict(value)
            )
        elif total and isinstance(value, (list, str)) and len(value) == total and total > 4:
            found[key] = value[:count]
        else:
            found[key] = _tiny(key, value, count)
    if "rope_parameters" in found:
        found["rope_parameters"] = _rope(found["rope_parameters"])
    return found | _kept_relations(config, found, count)


def _kept_relations(
    config: Mapping[str, Any], found: Mapping[str, Any], layers: int
) -> dict[str, Any]:
    """Sizes that follow from others in the default configuration follow from them here as well."""
    kept: dict[str, Any] = {}
    if config.get("qk_rope_head_dim") and config.get("head_dim") == config["qk_rope_head_dim"]:
        kept["head_dim"] = found["qk_rope_head_dim"]
    if config.get("kv_lora_rank") and "num_key_value_heads" in config:
        kept["num_key_value_heads"] = found[
            "num_attention_heads"
        ]  # of latent attention all are its own
    if "expand" in config and "head_dim" in config and "num_heads" in config:
        kept["num_heads"] = config["expand"] * HIDDEN // found["head_dim"]
    each = config.get("per_layer_config")
    if isinstance(each, Mapping):
        own = {k: v for k, v in each.items() if str(k).isdigit() and int(k) < layers}
        # As much wider than the others as in the default.
        kept["per_layer_config"] = {
            k: {n: _scaled(x, config.get(n), found.get(n)) for n, x in v.items()}
            for k, v in own.items()
        }
    return kept


def _scaled(value: Any, usual: Any, tiny: Any) -> Any:
    whole = all(isinstance(x, int) and not isinstance(x, bool) for x in (value, usual, tiny))
    return value * tiny // usual if whole and usual else value


def completed(config: Mapping[str, Any], kinds: list[str]) -> dict[str, Any]:
    """The same with sizes where the default has none, for architectures that do not build without.

    Args:
        config: A tiny configuration.
        kinds: Kinds of layers that the architecture's code names.
    """
    found = dict(config)
    layers = int(found.get("num_hidden_layers") or 2)
    for key, value in config.items():
        if value is not None:
            continue
        if key == "layer_types" and kinds:
            layers = max(layers, len(kinds))
            found[key] = [kinds[i % len(kinds)] for i in range(layers)]
            found["num_hidden_layers"] = layers
        else:
            size = next((size for pattern, size in NAMED if re.fullmatch(pattern, key)), None)
            found[key] = size
    return found


def _tiny(key: str, value: Any, layers: int) -> Any:
    if key in TOKENS:
        return TOKENS[key]
    if re.fullmatch(RANDOM, key) and isinstance(value, (int, float)):
        return type(value)(0)
    if isinstance(value, bool) or not isinstance(value, int):
        # A setting that is off by default stays off.
        return value
    if re.fullmatch(LAYERS, key):
        return layers
    if re.fullmatch(r".*token_(id|index).*|(image|audio|video)_token", key):
        return min(value, VOCABULARY - 1)
    if re.fullmatch(PERIODS, key) and value > 1:
        return min(value, layers)
    for pattern, size in SIZES:
        if re.fullmatch(pattern, key) and value > 0:
            return min(value, size) if re.search("group|topk|top_k|experts_per", key) else size
    return value


def _layers(config: Mapping[str, Any]) -> tuple[int, int]:
    """How many layers the default has, and how many the tiny model has."""
    total = next(
        (v for k, v in config.items() if re.fullmatch(LAYERS, k) and isinstance(v, int)), 0
    )
    lists = [
        v for k, v in config.items() if isinstance(v, (list, str)) and total and len(v) == total
    ]
    wanted = 2
    for kinds in lists:
        try:
            wanted = max(wanted, max(list(kinds).index(kind) + 1 for kind in set(kinds)))
        except TypeError:  # entries that are lists
            continue
    periods = [
        v
        for k, v in config.items()
        if re.fullmatch(PERIODS, k) and isinstance(v, int) and not isinstance(v, bool) and v > 1
    ]
    wanted = max([wanted, *[p for p in periods if p <= MOST_LAYERS]])
    return total, min(wanted, MOST_LAYERS)


def _rope(parameters: Any) -> Any:
    """Rope settings at the size of the tiny model; those of each kind of layer alike."""
    if not isinstance(parameters, Mapping):
        return parameters
    found: dict[str, Any] = {}
    for key, value in parameters.items():
        if isinstance(value, Mapping):
            found[key] = _rope(value)
        elif key == "original_max_position_embeddings" and isinstance(value, int):
            found[key] = POSITIONS // 4
        else:
            found[key] = value
    return found
