"""Trainable torch tensors under canonical names and in MLX's orientation.

Each is a view of a live parameter (or of its gradient), so that it can be written as well as read. This
is the one place that knows how PEFT and transformers store what MLX stores otherwise:

- LoRA's factors are (r, in) and (out, r), in MLX (in, r) and (r, out);
- PEFT keeps A and B of all experts in one matrix each, (experts * r, in) and (out, r * experts);
- transformers keeps gate and up projection of experts in one tensor (experts, 2 * out, in);
- kernels of convolutions are (out, in, width), in MLX (out, width, in);
- what mlx-lm adds to a weight while it loads it (`parity.paths.hf.conventions`) is added to the view.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from parity.errors import UnmatchedNames
from parity.names import canonical, is_factor
from parity.trace import Array

View = Callable[[Any], Any]
OFFSETS = "parity_offsets"
"""Attribute of a live model: canonical name → `Tensor.offset`, of those that have one."""
EXPERTS = re.compile(r"\.experts\.(gate_up_proj|gate_proj|up_proj|down_proj)$")
"""Weights of experts as transformers names them, all experts in one; in MLX they are modules."""


@dataclass(frozen=True)
class Tensor:
    """A parameter and how it is seen in canonical orientation.

    Attributes:
        parameter: The live one.
        view: Its values as MLX orients them.
        offset: What MLX's weight has more than torch's in each element. The gradient has no offset.
    """

    parameter: Any
    view: View
    offset: float = 0.0

    @property
    def value(self) -> Any:
        """What the parameter holds, oriented; to be read."""
        oriented = self.view(self.parameter.data)
        return oriented + self.offset if self.offset else oriented

    def write(self, array: Array) -> None:
        """Copies a canonical array into the parameter."""
        import torch

        given = torch.from_numpy(np.ascontiguousarray(array))
        # In float64 the difference of two float32 numbers is exact.
        self.view(self.parameter.data).copy_(given.double() - self.offset if self.offset else given)

    @property
    def gradient(self) -> Any:
        """Its gradient, oriented; None where there is none."""
        return None if self.parameter.grad is None else self.view(self.parameter.grad)


def trainable(model: Any) -> dict[str, Tensor]:
    """Canonical name → every trainable tensor of a live model."""
    return tensors(model, lambda parameter: bool(parameter.requires_grad))


def tensors(model: Any, wanted: Callable[[Any], bool] = lambda _: True) -> dict[str, Tensor]:
    """Canonical name → each tensor of a live model that is wanted."""
    modules = dict(model.named_modules())
    offsets: Mapping[str, float] = getattr(model, OFFSETS, {})
    return {
        canonical_name: Tensor(parameter, view, offsets.get(canonical_name, 0.0))
        for name, parameter in model.named_parameters()
        if wanted(parameter)
        for canonical_name, view in _views(name, parameter, modules)
    }


def _views(name: str, parameter: Any, modules: Mapping[str, Any]) -> Iterator[tuple[str, View]]:
    """Canonical names of what a parameter holds, with the view of each."""
    import torch

    ours = canonical(name)
    if is_factor(ours):
        holder = modules[re.sub(r"\.lora_(?:embedding_)?[AB]\..*$", "", name)]
        if experts := getattr(holder, "num_experts", 0):
            ours = expert_name(f"{ours.rpartition('.')[0]}.{holder.parameter_name}") + ours[-7:]
            rows = ours.endswith(".lora_a")
            yield ours, (_rows_of if rows else _columns_of)(experts)
        else:
            yield ours, _transposed
    elif match := EXPERTS.search(ours):
        if match[1] == "gate_up_proj":
            for half, view in (("gate_proj", _first_half), ("up_proj", _second_half)):
                yield f"{expert_name(ours.replace('gate_up_proj', half))}.weight", view
        else:
            yield f"{expert_name(ours)}.weight", _itself
    elif isinstance(modules[name.rpartition(".")[0]], torch.nn.Conv1d) and parameter.ndim == 3:
        yield ours, lambda t: t.movedim(1, 2)
    else:
        yield ours, _itself


def expert_name(name: str) -> str:
    """`mlp.switch_mlp.down_proj` of transformers' `mlp.experts.down_proj`."""
    return name.replace(".experts.", ".switch_mlp.")


def _itself(tensor: Any) -> Any:
    return tensor


def _transposed(tensor: Any) -> Any:
    return tensor.T


def _first_half(tensor: Any) -> Any:
    return tensor.chunk(2, dim=1)[0]


def _second_half(tensor: Any) -> Any:
    return tensor.chunk(2, dim=1)[1]


def _rows_of(experts: int) -> View:
    return lambda t: t.reshape(experts, -1, t.shape[-1])


def _columns_of(experts: int) -> View:
    return lambda t: t.reshape(t.shape[0], -1, experts).permute(2, 0, 1)


def transplant(tensors: Mapping[str, Tensor], arrays: Mapping[str, Array]) -> None:
    """Copies canonical arrays into live parameters.

    Raises:
        UnmatchedNames: Names that stand on one side only.
        ValueError: A shape that does not fit.
    """
    check_names(tensors, arrays)
    for name, tensor in tensors.items():
        if tuple(tensor.value.shape) != arrays[name].shape:
            raise ValueError(f"{name}: shape {arrays[name].shape} does not fit")
        tensor.write(arrays[name])


def check_names(ours: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raises UnmatchedNames unless both sides name the same tensors."""
    missing, strange = sorted(ours.keys() - given.keys()), sorted(given.keys() - ours.keys())
    if missing or strange:
        raise UnmatchedNames(
            f"cannot hand over the tensors: {len(missing)} of the model were not given "
            f"({', '.join(missing[:3])}), {len(strange)} that were given are not in the model "
            f"({', '.join(strange[:3])})"
        )
