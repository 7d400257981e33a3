"""An adapter read back from live PEFT modules, and what the model gives with it."""

from __future__ import annotations

from typing import Any

from parity.names import canonical, is_factor
from parity.paths.hf import tensors
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
    """A (in, r) and B (r, out) of each module, or (experts, r, in) and (experts, out, r); its scale.

    DoRA's magnitude is (out).
    """
    scales = dict[str, float]()
    for module, live in model.named_modules():
        if hasattr(live, "lora_A"):
            # Of experts it is the parameter that is adapted, not the module.
            parameter = getattr(live, "parameter_name", "")
            name = canonical(module) + f".{parameter}" * bool(parameter)
            scales[tensors.expert_name(name)] = float(live.scaling["default"])
    found = tensors.tensors(model).items() if scales else ()
    kept = {name: to_numpy(t.value) for name, t in found if is_factor(name) or name.endswith(".m")}
    return kept, scales
