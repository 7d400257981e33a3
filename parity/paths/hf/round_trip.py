"""An adapter on its way through files, on torch: read from live PEFT modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from parity.names import canonical
from parity.paths.hf.live import ids_tensor, oriented, to_numpy
from parity.paths.hf.readback import dtype_name
from parity.trace import Array, Trace


def forward(model: Any, ids: Array) -> Any:
    """Logits (B, T, V) in evaluation mode."""
    import torch

    with torch.no_grad():
        return model.eval()(input_ids=ids_tensor(ids), use_cache=False).logits


def round_trip_trace(live: Any, model: Any, ids: Array, folder: Path) -> Trace:
    """See `parity contract round_trip`.

    Args:
        live: Logits of the live model.
        model: The PeftModel that the adapter in the folder was loaded into.
        ids: (B, T) int32.
        folder: What was saved.
    """
    loaded = forward(model, ids)
    modules = {canonical(n): m for n, m in model.named_modules() if hasattr(m, "lora_A")}
    [name] = model.active_adapters
    factors = {
        f"{module}.{factor}": getattr(live_module, matrices)[name].weight
        for module, live_module in modules.items()
        for factor, matrices in (("lora_a", "lora_A"), ("lora_b", "lora_B"))
    }
    scalars = {
        "dtype": dtype_name(loaded.dtype),
        "scales": {module: float(m.scaling[name]) for module, m in modules.items()},
        "files": sorted(str(file.relative_to(folder)) for file in folder.rglob("*")),
    }
    arrays = {"live": to_numpy(live.float()), "loaded": to_numpy(loaded.float())}
    return Trace(arrays, scalars).with_group("adapter", oriented(factors))
