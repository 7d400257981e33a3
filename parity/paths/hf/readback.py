"""Settings read from live torch objects: module outputs, dtypes, rope, LoRA, optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from parity.names import canonical, layer_of
from parity.paths.describe import row_digests, single
from parity.paths.hf.live import Batch, adapter_parameters, oriented, to_numpy
from parity.trace import Array, Trace


def dtype_name(dtype: Any) -> str:
    """`float32` of `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def dtype_census(parameters: Iterable[Any]) -> dict[str, int]:
    """Number of elements by dtype."""
    census: dict[str, int] = {}
    for parameter in parameters:
        name = dtype_name(parameter.dtype)
        census[name] = census.get(name, 0) + parameter.numel()
    return census


def rope_thetas(model: Any) -> list[float]:
    """Per layer the base of the rotary embedding, from the live frequencies base ** (-2 i / d)."""
    config = model.config.get_text_config()
    # Models with several kinds of layers have one buffer a kind.
    buffers = {
        name.rpartition(".")[2]: to_numpy(value).astype(np.float64)
        for name, value in model.named_buffers()
        if name.endswith("inv_freq") and not name.endswith("original_inv_freq")
    }
    kinds = getattr(config, "layer_types", None) or [""] * config.num_hidden_layers
    used = [buffers.get(f"{kind}_inv_freq", buffers.get("inv_freq")) for kind in kinds]
    return [rope_theta(frequencies) for frequencies in used if frequencies is not None]


def rope_theta(frequencies: Array) -> float:
    """The base of float32 frequencies, to 6 digits.

    Every frequency tells it, later ones more exactly; scaled kinds of rope leave the early ones
    alone, so the last that still agrees with the first is taken.
    """
    relative = frequencies / frequencies[0]
    half = len(relative)
    estimates = relative[1:] ** (-half / np.arange(1, half))
    consistent = estimates[np.isclose(estimates, estimates[0], rtol=1e-4)]
    return float(f"{consistent[-1]:.6g}")


def lora_facts(model: Any) -> dict[str, Any]:
    """Rank, scale, dropout, layers and modules as the live LoRA modules have them."""
    modules = {canonical(n): m for n, m in model.named_modules() if hasattr(m, "lora_A")}
    return {
        "rank": single({int(m.r["default"]) for m in modules.values()}),
        "scale": single({float(m.scaling["default"]) for m in modules.values()}),
        # without dropout PEFT puts an Identity there
        "dropout": single({getattr(m.lora_dropout["default"], "p", 0.0) for m in modules.values()}),
        "layers": sorted({n for name in modules if (n := layer_of(name)) is not None}),
        "modules": sorted({name.rpartition(".")[2] for name in modules}),
    }


def adapter_trace(model: Any) -> Trace:
    """The adapter of a live PEFT model and the settings of its LoRA modules; see `parity contract lora_init`."""
    parameters = adapter_parameters(model)
    scalars = {
        **lora_facts(model),
        "trainable": sorted(parameters),
        "dtype": single(set(dtype_census(parameters.values()))),
    }
    return Trace(scalars=scalars).with_group("adapter", oriented(parameters))


def model_facts(model: Any) -> dict[str, Any]:
    """Dtypes, rope, LoRA and seed, in the vocabulary of probe 00."""
    import torch

    parameters = adapter_parameters(model)
    return {
        "dtype.parameters": dtype_census(p for p in model.parameters() if not p.requires_grad),
        "dtype.adapter": dtype_census(parameters.values()),
        "rope.theta": rope_thetas(model),
        "lora.trainable": len(parameters),
        "lora.parameters": sum(p.numel() for p in parameters.values()),
        "lora.names": sorted(parameters),
        **{f"lora.{key}": value for key, value in lora_facts(model).items()},
        "seed.value": torch.initial_seed(),
    }


def checkpointed(model: Any) -> bool:
    """Whether any module of a live model forgets its activations."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def batch_facts(drawn: list[Batch], supervised: Array) -> dict[str, Any]:
    """Micro-batches, and what is supervised in the first of them, in the words of probe 00."""
    rows = range(len(drawn[0][0]))
    return {
        "batch.shapes": [list(ids.shape) for ids, _ in drawn],
        "batch.rows": [row_digests(*batch) for batch in drawn],
        "mask.supervised": [int((supervised[:, 0] == row).sum()) for row in rows],
        "loss.denominator": "supervised tokens",
    }


def optimizer_facts(optimizer: Any, schedule: Any, steps: int) -> dict[str, Any]:
    """Hyperparameters of the live optimizer; it must not hold gradients, for it is stepped."""
    group, rates = optimizer.param_groups[0], []
    for _ in range(steps):
        rates.append(float(group["lr"]))
        optimizer.step()
        schedule.step()
    betas = [float(beta) for beta in group.get("betas", ())]
    return {
        "optim.class": type(optimizer).__name__,
        "optim.betas": betas,
        "optim.eps": group.get("eps"),
        "optim.weight_decay": float(group["weight_decay"]),
        # torch's Adam knows no other way and so has no setting to read
        "optim.bias_correction": True if betas else None,
        "optim.lr": rates,
    }
