"""An adapter read back from live PEFT modules, and what the model gives with it."""

from __future__ import annotations

from typing import Any

from parity.names import canonical
from parity.paths.hf.live import ids_tensor, to_numpy
from parity.paths.hf.readback import dtype_name
from parity.paths.round_trip import Logits
from parity.trace import Array


def forward(model: Any, ids: Array) -> Logits:
    """What a model gives in evaluation mode."""
    import torch

    with torch.no_grad():
        logits = model.eval()(input_ids=ids_tensor(ids), use_cache=False).logits
    return Logits(to_numpy(logits.float()), dtype_name(logits.dtype))


def adapter_of(model: Any) -> tuple[dict[str, Array], dict[str, float]]:
    """A (in, r) and B (r, out) of each module, and its scale, of the one active adapter.

    DoRA's magnitude is (out).
    """
    adapter, scales = dict[str, Array](), dict[str, float]()
    # Without an adapter there is no such attribute.
    [name] = getattr(model, "active_adapters", None) or [""]
    for module, live in model.named_modules():
        # Of bare parameters A and B have shapes of their own.
        if not hasattr(live, "lora_A") or hasattr(live, "parameter_name"):
            continue
        scales[canonical(module)] = float(live.scaling[name])
        # Embeddings hold bare parameters, other layers modules with a weight.
        embedded = name in live.lora_embedding_A
        stem = "lora_embedding_" if embedded else "lora_"
        for factor, letter in (("lora_a", "A"), ("lora_b", "B")):
            found = getattr(live, f"{stem}{letter}")[name]
            values = to_numpy(found if embedded else found.weight)
            adapter[f"{canonical(module)}.{factor}"] = values.T
        if name in live.lora_magnitude_vector:
            magnitude = to_numpy(live.lora_magnitude_vector[name].weight)
            adapter[f"{canonical(module)}.m"] = magnitude
    return adapter, scales
