"""Traps: settings of a configuration moved from their usual value, so that who does not read them shows.

What is moved follows from the configuration itself: every key that is no size has another value. A trap
counts only where transformers builds the model and its logits move; the others are listed as without effect.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from parity.sweep.maker import Maker, NotMade
from parity.sweep.shrink import HEAD, LAYERS, NOT_TEXT, PERIODS, SERVED, SIZES, TOKENS

Path = tuple[str, ...]
"""Where in a configuration a value stands: the keys from the outside in."""
WINDOW, BEYOND, CAP = 16, 40, 2.0
"""A sliding window and a number of positions shorter than the texts, and a tight soft cap."""
ACTIVATIONS = (
    "silu",
    "gelu_pytorch_tanh",
    "gelu",
    "relu",
    "relu2",
    "gelu_new",
    "gelu_fast",
    "swish",
    "tanh",
    "xielu",
)
ROPE = "rope_parameters"
TIES = "router ties"
"""The configuration whose weights, not settings, are the trap."""
ODD = "odd head count"
POSITIONS_KEY = "max_position_embeddings"
IGNORED = (*SERVED, *TOKENS, "is_encoder_decoder", "add_cross_attention", "model_type", "problem_type",
           "output_hidden_states", "output_attentions", "return_dict", "use_cache", "initializer_range")  # fmt: skip


@dataclass(frozen=True)
class Trap:
    """One setting, or several that belong together, moved.

    Attributes:
        kind: What it is about, in words.
        changes: Dotted key → value.
    """

    kind: str
    changes: dict[str, Any]

    @property
    def name(self) -> str:
        """Its keys and values, as a person would write them."""
        shown = [f"{key}={_short(value)}" for key, value in self.changes.items()]
        return ", ".join(shown)


@dataclass(frozen=True)
class Configuration:
    """A configuration of an architecture with the traps that it sets."""

    name: str
    config: dict[str, Any]
    traps: list[Trap] = field(default_factory=list)
    ties: bool = False
    """Whether the weights give all experts the same score."""

    def to_json(self) -> dict[str, Any]:
        """For files."""
        return asdict(self)


@dataclass(frozen=True)
class Configurations:
    """All that is asked of one architecture.

    Attributes:
        made: `plain` first, then all traps at once, then one for each kind of rope.
        idle: Keys whose change leaves the logits of transformers as they are.
        refused: Change → why transformers does not build it.
    """

    made: list[Configuration]
    idle: list[str]
    refused: dict[str, str]


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        inside = ", ".join(f"{k}={_short(v)}" for k, v in value.items())
        return f"{{{inside}}}"
    if isinstance(value, list) and len(value) > 4:
        return f"[{_short(value[0])}, … {len(value)}]"
    return str(value)


def leaves(config: Mapping[str, Any], above: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Path and value of all that is no mapping, of text alone."""
    for key, value in config.items():
        if key in IGNORED or re.fullmatch(NOT_TEXT, key):
            continue
        if isinstance(value, Mapping):
            yield from leaves(value, (*above, key))
        else:
            yield (*above, key), value


def changed(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with values by dotted key; `None` removes nothing, it is a value."""
    found = copy.deepcopy(dict(config))
    for key, value in changes.items():
        *outer, last = key.split(".")
        inner = found
        for name in outer:
            inner = inner.setdefault(name, {})
        inner[last] = copy.deepcopy(value)
    return found


def value_at(config: Mapping[str, Any], key: str) -> Any:
    """What stands at a dotted key, or None."""
    inner: Any = config
    for name in key.split("."):
        if not isinstance(inner, Mapping) or name not in inner:
            return None
        inner = inner[name]
    return inner


def proposed(config: Mapping[str, Any]) -> Iterator[Trap]:
    """Traps of a tiny configuration, as far as its keys tell."""
    yield from _heads(config)
    yield from _windows(config)
    count = 0
    for path, value in leaves(config):
        key, dotted = path[-1], ".".join(path)
        found = _moved(key, value, inside_rope=any(p.startswith("rope_") for p in path[:-1]))
        if found is None:
            continue
        kind, other = found
        if kind == "rope theta":
            count += 1
            other = round(other * (1 + 0.5 * (count - 1)), 1)
        yield Trap(kind, {dotted: other})


def _heads(config: Mapping[str, Any], above: str = "") -> Iterator[Trap]:
    for key, value in config.items():
        if isinstance(value, Mapping) and "text" in key:
            yield from _heads(value, f"{above}{key}.")
    heads = next((k for k in ("num_attention_heads", "n_head", "n_heads") if k in config), "")
    if not heads or not isinstance(config[heads], int):
        return
    pairs = {
        f"{above}{k}": 1 if config[k] != config[heads] else 3
        for k in ("num_key_value_heads",)
        if isinstance(config.get(k), int)
    }
    if config.get("kv_lora_rank"):
        return
    own_width = isinstance(config.get("head_dim"), int)
    if own_width:
        yield Trap(ODD, {f"{above}{heads}": 3, **pairs})
    width = next((k for k in ("hidden_size", "n_embd", "d_model") if k in config), "")
    if width:
        yield Trap(ODD, {f"{above}{heads}": 3, f"{above}{width}": 3 * HEAD, **pairs})
    if own_width:
        yield Trap("head width", {f"{above}head_dim": HEAD + 8})


def _windows(config: Mapping[str, Any], above: str = "") -> Iterator[Trap]:
    """A sliding window in every other layer where the default has none."""
    for key, value in config.items():
        if isinstance(value, Mapping) and "text" in key:
            yield from _windows(value, f"{above}{key}.")
    kinds = config.get("layer_types")
    if (
        not isinstance(kinds, list)
        or set(kinds) != {"full_attention"}
        or "sliding_window" not in config
    ):
        return
    new: dict[str, Any] = {
        f"{above}sliding_window": WINDOW,
        f"{above}layer_types": [
            ("full_attention", "sliding_attention")[i % 2] for i in range(len(kinds))
        ],
    }
    for key, value in (("use_sliding_window", True), ("max_window_layers", 1)):
        if key in config:
            new[f"{above}{key}"] = value
    yield Trap("sliding window shorter than the text", new)


def _moved(key: str, value: Any, inside_rope: bool) -> tuple[str, Any] | None:
    """The kind of a setting and another value for it; None for what is a size or no setting."""
    if key == "rope_theta" or re.fullmatch(r"(rotary_emb|rope).*base.*|.*rope_theta", key):
        return ("rope theta", value * 3.7) if isinstance(value, (int, float)) else None
    if key in ("partial_rotary_factor", "rotary_pct"):
        return ("partial rotary", 0.75 if value == 0.5 else 0.5) if value else None
    if inside_rope:
        return None
    if re.fullmatch(r".*soft_?cap.*", key) and not isinstance(value, bool):
        return "soft cap", CAP
    if re.fullmatch(r".*(sliding_window|window_size)(_size)?", key) and not isinstance(value, bool):
        return (
            ("sliding window shorter than the text", WINDOW)
            if value is None or isinstance(value, int)
            else None
        )
    if re.fullmatch(r"clip_.*", key) and not isinstance(value, bool):
        return "clipping", 0.5
    if isinstance(value, bool):
        return _switch(key), not value
    if isinstance(value, str):
        return _activation(key, value)
    if re.fullmatch(r"max_position_embeddings|n_positions|max_seq_len|model_max_length", key):
        return "positions beyond the greatest", BEYOND
    if isinstance(value, float):
        if "eps" in key:
            return "norm epsilon", 0.03
        return "factor", value * 1.5 if value else 0.5
    if isinstance(value, list):
        return _list(key, value)
    if isinstance(value, int) and not _is_size(key):
        return "number", value * 2 if value else 1
    if key == "query_pre_attn_scalar":
        return "factor", HEAD + 8
    return None


def _is_size(key: str) -> bool:
    names = (LAYERS, PERIODS, *(pattern for pattern, _ in SIZES))
    return any(re.fullmatch(pattern, key) for pattern in names)


def _switch(key: str) -> str:
    for pattern, kind in (
        ("tie", "tied or untied head"),
        ("bias", "bias"),
        ("qk.*norm|norm.*qk|q_norm|use_qk", "qk norm"),
        ("topk|router|expert|moe|prob|renorm", "router"),
        ("window", "sliding window shorter than the text"),
        ("norm", "norm"),
    ):
        if re.search(pattern, key):
            return kind
    return "switch"


def _activation(key: str, value: str) -> tuple[str, Any] | None:
    if value not in ACTIVATIONS or "vision" in key:
        return None
    return "activation", "gelu_pytorch_tanh" if not value.startswith("gelu") else "silu"


def _list(key: str, value: list[Any]) -> tuple[str, Any] | None:
    if value and all(isinstance(v, float) for v in value):
        return "factor", [v * 1.5 for v in value]
    if len(set(map(str, value))) > 1 and all(isinstance(v, str) for v in value):
        return "kinds of layers", value[::-1]
    if len(set(map(str, value))) > 1 and all(isinstance(v, int) for v in value):
        return "kinds of layers", value[::-1]
    return None


def ropes(config: Mapping[str, Any], kinds: list[str]) -> Iterator[Trap]:
    """The rope settings of a configuration turned into each kind that transformers knows."""
    for path in _rope_paths(config):
        place = value_at(config, path)
        nested = {k: v for k, v in place.items() if isinstance(v, Mapping)}
        usual = {str(r.get("rope_type")) for r in (*nested.values(), place)}
        for kind in kinds:
            if kind == "proportional" and kind not in usual:
                continue  # made for layers of one family: no other has it unless it has it by default
            new: dict[str, Any] = {}
            for key, rope in nested.items() or {"": place}.items():
                if not (settings := _rope(kind, rope, config, path)):
                    continue
                prefix = f"{path}.{key}" if key else path
                new[prefix] = settings
            outer = path.rpartition(".")[0]
            longest = f"{outer}.{POSITIONS_KEY}" if outer else POSITIONS_KEY
            if kind == "dynamic" and value_at(config, longest):
                new[longest] = BEYOND  # it does nothing to shorter texts
            ropes = [value_at(config, k) for k in new if k != longest]
            if ropes and all(rope.get("rope_type") != kind for rope in ropes):
                yield Trap(f"rope {kind}", new)


def _rope_paths(config: Mapping[str, Any], above: str = "") -> Iterator[str]:
    for key, value in config.items():
        if key == ROPE and isinstance(value, Mapping) and value:
            yield f"{above}{key}"
        elif isinstance(value, Mapping) and not re.fullmatch(NOT_TEXT, key):
            yield from _rope_paths(value, f"{above}{key}.")


def _rope(
    kind: str, rope: Mapping[str, Any], config: Mapping[str, Any], path: str
) -> dict[str, Any]:
    """Settings of one kind of rope; the texts are longer than what it was first trained on."""
    outer = path.rpartition(".")[0]
    around: Any = value_at(config, outer) if outer else config
    width = around.get("qk_rope_head_dim") or around.get("head_dim") or HEAD
    pairs = max(1, int(width * rope.get("partial_rotary_factor", 1.0)) // 2)
    base = {k: v for k, v in rope.items() if k in ("rope_theta", "partial_rotary_factor")}
    base["rope_type"] = kind
    own: dict[str, dict[str, Any]] = {
        "linear": {"factor": 3.0},
        "dynamic": {"factor": 3.0},
        "yarn": {"factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 16.0, "beta_slow": 2.0},
        "llama3": {"factor": 4.0, "original_max_position_embeddings": 32, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "longrope": {
            "factor": 4.0, "original_max_position_embeddings": 32,
            "short_factor": [round(1.0 + 0.05 * i, 2) for i in range(pairs)],
            "long_factor": [round(1.5 + 0.5 * i, 2) for i in range(pairs)],
        },
        "proportional": {"factor": 2.0, "partial_rotary_factor": 0.5},
    }  # fmt: skip
    return {**base, **own[kind]} if kind in own else {}


def configurations(
    maker: Maker, plain: dict[str, Any], kinds: list[str], ids: list[list[int]]
) -> Configurations:
    """Plain, all traps that work together, and a configuration for each kind of rope.

    Args:
        maker: Builds them, so that a trap without effect is none.
        plain: The tiny configuration.
        kinds: Kinds of rope that transformers knows.
        ids: The text that traps must have an effect on.

    Raises:
        NotMade: The plain one is not built.
    """
    before = start = maker.ask("attempt", config=plain, ids=ids)
    config, traps, idle, refused = plain, list[Trap](), list[str](), dict[str, str]()
    for trap in proposed(plain):
        if trap.kind == ODD and any(other.kind == ODD for other in traps):
            continue  # the other way to an odd number of heads worked
        new = changed(config, trap.changes)
        try:
            found = maker.ask("attempt", config=new, ids=ids)
        except NotMade as error:
            refused[trap.name] = str(error)
            continue
        if found["digest"] == before["digest"]:
            idle.append(trap.name)
            continue
        structural = found["weights"] != before["weights"]
        if structural and trap.kind in ("number", "factor"):
            idle.append(trap.name)  # a size after all
            continue
        config, before = new, found
        traps.append(trap)
    made = [Configuration("plain", plain)]
    if traps:
        made.append(Configuration("traps", config, traps))
    for trap in ropes(plain, kinds):
        new = changed(plain, trap.changes)
        try:
            found = maker.ask("attempt", config=new, ids=ids)
        except NotMade as error:
            refused[trap.kind] = str(error)
            continue
        if found["digest"] == start["digest"]:
            idle.append(trap.kind)
        else:
            made.append(Configuration(trap.kind, new, [trap]))
    try:
        if maker.ask("attempt", config=plain, ids=ids, ties=True)["digest"] != start["digest"]:
            made.append(Configuration(TIES, plain, ties=True))
    except NotMade as error:
        refused[TIES] = str(error)
    return Configurations(made, idle, refused)
