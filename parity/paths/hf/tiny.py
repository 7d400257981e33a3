"""Tiny random models of any architecture that transformers can build, made in a process of its own.

The process (`python -m parity.paths.hf.tiny`) reads one JSON request a line and answers one JSON line.
Weights follow from their names alone, so that two configurations of one architecture share every
tensor of equal name and shape, and what a setting does can be told from what it does to the logits.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

LARGEST = 20_000_000
"""Parameters that a tiny model may have: more was not made small."""
GAIN = 1.2
"""Standard deviation of a product with unit inputs: attention and gates must not be flat."""


def registry() -> dict[str, Any]:
    """The architectures that transformers knows: model type → class of the causal language model."""
    import transformers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    named = {
        kind: names if isinstance(names, str) else names[0]
        for kind, names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()
    }
    return {
        "version": transformers.__version__,
        "causal": named,
        "known": list(CONFIG_MAPPING_NAMES),
        "ropes": list(ROPE_INIT_FUNCTIONS),
    }


def defaults(kind: str) -> dict[str, Any]:
    """The configuration of an architecture as it is when nothing is set; the kinds of layers it names."""
    from transformers.configuration_utils import ALLOWED_LAYER_TYPES
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    made = CONFIG_MAPPING[kind]()
    folder = Path(inspect.getfile(type(made))).parent
    text = "".join(file.read_text("utf-8") for file in sorted(folder.glob("*.py")))
    named = set(re.findall(r'"(\w+)"', text))
    return {
        "config": _plain(made.to_dict()),
        "kinds": [name for name in ALLOWED_LAYER_TYPES if name in named],
    }


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def draw(name: str, value: Any) -> Any:
    """The random value of a tensor: matrices by their fan-in, the rest moved from what it starts as.

    A norm of unit weights, a zero bias or a router without a correction would hide what is read otherwise.
    """
    import torch

    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    noise = np.random.default_rng(seed).standard_normal(tuple(value.shape)).astype(np.float32)
    noise = torch.from_numpy(noise)
    if "embed" in name and value.ndim == 2:
        return noise
    if value.ndim >= 2 and min(value.shape[-2:]) > 1 and name.endswith(("weight", "_proj")):
        # transformers keeps experts as (experts, out, in), GPT-2's products as (in, out): square root of
        # the smaller side would not matter to what is asked here.
        return noise * (GAIN / value.shape[-1] ** 0.5)
    if value.ndim >= 2 and min(value.shape[-2:]) > 1 and value.std() < 0.1:
        return noise * (GAIN / value.shape[-1] ** 0.5)
    start = value.float()
    start = torch.where(torch.isfinite(start), start, torch.zeros_like(start))
    return start + noise * (0.2 if value.numel() > 1 else 0.1)


def tie(model: Any) -> None:
    """Gives every expert the same score: which of them are taken is then a matter of order alone."""
    counts = {
        value
        for key, value in _numbers(model.config.to_dict())
        if "expert" in key and isinstance(value, int) and value > 1
    }
    for name, value in model.state_dict(keep_vars=True).items():
        parts = name.split(".")
        routes = re.search(r"(^|_)(gate|router|wg)($|_)", parts[-2]) if len(parts) > 1 else None
        alone = re.search(r"router|correction_bias|expert_bias", name)
        if not (routes or alone) or value.shape[0] not in counts or value.ndim > 2:
            continue
        value.data.copy_(value.data[:1].expand_as(value) if value.ndim == 2 else value.data * 0)


def _numbers(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _numbers(value)
        else:
            yield str(key), value


def build(config: Mapping[str, Any], ties: bool = False) -> Any:
    """A model of a configuration with weights drawn by name; eager attention and experts.

    Args:
        config: Its configuration.
        ties: Whether all experts get the same score.

    Raises:
        ValueError: It is too large.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from parity.paths.hf.loading import OPTIONS

    made = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
    with torch.device("meta"):
        size = sum(
            p.numel() for p in AutoModelForCausalLM.from_config(made, **OPTIONS).parameters()
        )
    if size > LARGEST:
        raise ValueError(f"the model has {size:,} parameters: not made small")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(made, dtype=torch.float32, **OPTIONS).eval()
    kept = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, value in kept.items():
            if value.is_floating_point():
                value.copy_(draw(name, value))
        model.tie_weights()
        if ties:
            tie(model)
    return model


def attempt(config: Mapping[str, Any], ids: list[list[int]], ties: bool = False) -> dict[str, Any]:
    """What the logits of a configuration are: their digest, greatest size, and the parameters."""
    import torch

    model = build(config, ties)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(ids), use_cache=False).logits.float()
    if not torch.isfinite(logits).all():
        raise ValueError("the logits are not finite")
    rounded = logits.numpy()
    return {
        "digest": hashlib.sha256(np.ascontiguousarray(rounded).tobytes()).hexdigest(),
        "weights": _weights(model),
        "size": float(np.abs(rounded).max()),
        "spread": float(rounded.std()),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def _weights(model: Any) -> str:
    """Digest of all tensors with their names."""
    h = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        h.update(name.encode() + np.ascontiguousarray(value.float().numpy()).tobytes())
    return h.hexdigest()


def save(config: Mapping[str, Any], folder: str, ties: bool = False) -> dict[str, Any]:
    """A checkpoint as transformers saves it; the names of its linear modules by their class."""
    import torch

    model = build(config, ties)
    model.generation_config = type(model.generation_config)()
    model.save_pretrained(folder)
    kinds: dict[str, str] = {}
    for name, module in model.named_modules():
        if name:
            linear = type(module) is torch.nn.Linear
            kinds[name] = "linear" if linear else type(module).__name__
    file = Path(folder, "config.json")
    return {
        "modules": kinds,
        "parameters": [name for name, _ in model.named_parameters()],
        "config": json.loads(file.read_text("utf-8")),
    }


def parsed(config: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    """Attributes of a configuration as transformers reads it, of those that it has."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    made = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
    return {name: _plain(getattr(made, name)) for name in names if hasattr(made, name)}


OPERATIONS: dict[str, Callable[..., dict[str, Any]]] = {
    "registry": registry,
    "defaults": defaults,
    "attempt": attempt,
    "save": save,
    "parsed": parsed,
}


def serve() -> None:
    """Answers requests `{"do": operation, ...arguments}` until stdin closes."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not end up among the answers
    import torch

    torch.set_num_threads(1)
    import transformers

    transformers.logging.set_verbosity_error()
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any]
        try:
            answer = {"ok": OPERATIONS[request.pop("do")](**request)}
        except Exception as error:
            text = " ".join(str(error).split())[:400]
            detail = traceback.format_exc()[-2000:]
            answer = {"error": f"{type(error).__name__}: {text}", "detail": detail}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve()
