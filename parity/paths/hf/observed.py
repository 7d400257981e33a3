"""What a live torch path is seen to do: in its forward passes, and with the random generator."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from parity.paths.hf.live import device
from parity.paths.measured import Calls


@contextlib.contextmanager
def calls(seen: Calls) -> Iterator[None]:
    """Notes calls of trained modules, of whichever model, in forward and in backward passes."""
    import torch
    from torch.nn.modules.module import register_module_forward_pre_hook

    def before(module: Any, _: Any) -> None:
        layers = getattr(module, "layers", None)
        if isinstance(layers, torch.nn.ModuleList):  # the model, before any of its modules
            seen.layer_of |= {id(m): at for at, layer in enumerate(layers) for m in layer.modules()}
        elif isinstance(module, torch.nn.Embedding):
            kind = device().type
            cast = torch.is_autocast_enabled(kind)
            seen.compiled.append(bool(torch.compiler.is_compiling()))
            name = str(torch.get_autocast_dtype(kind)) if cast else "none"
            seen.autocast.add(name.removeprefix("torch."))
        elif seen.compiled and _trained(module):
            # As torch's own checkpointing asks: there is a graph that is being run backward.
            backward = torch._C._current_graph_task_id() != -1
            (seen.again if backward else seen.once).add(id(module))

    hook = register_module_forward_pre_hook(before)
    try:
        yield
    finally:
        hook.remove()


def _trained(module: Any) -> bool:
    """Whether it is adapted, or a parameter of its own is trainable."""
    own = module.parameters(recurse=False)
    return hasattr(module, "lora_A") or any(parameter.requires_grad for parameter in own)


def rng_state() -> str:
    """A short content key of torch's random generator."""
    import torch

    return hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest()[:12]


@contextlib.contextmanager
def seeding() -> Iterator[list[tuple[str, Any]]]:
    """Seeds that are set, models that are loaded and adapters that are drawn, in their order."""
    import torch
    from peft.tuners.lora import LoraLayer
    from transformers import PreTrainedModel

    events: list[tuple[str, Any]] = []

    def noting(what: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            value = args[0] if what == "seed" and args else kwargs.get("seed")
            events.append((what, rng_state() if what == "draw" else value))
            return result

        return call

    load = noting("load", PreTrainedModel.from_pretrained.__func__)
    draw = noting("draw", LoraLayer.reset_lora_parameters)
    with (
        mock.patch.object(torch, "manual_seed", noting("seed", torch.manual_seed)),
        mock.patch.object(PreTrainedModel, "from_pretrained", classmethod(load)),
        mock.patch.object(LoraLayer, "reset_lora_parameters", draw),
    ):
        yield events
