"""What the MLX paths share: reading live MLX objects into NumPy, and observing them."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from parity.errors import UnmatchedNames
from parity.names import canonical
from parity.paths.describe import single, trained
from parity.trace import Array

Batch = tuple[Any, Any]
"""Ids (B, W) and lengths (B, 2), both mx.array of int32."""
Loss = Callable[[Any, Any, Any], tuple[Any, Any]]


@dataclass
class Setup:
    """The live objects of one run, just before its first step."""

    model: Any
    tokenizer: Any
    optimizer: Any
    dataset: Any
    loss: Loss
    iterate: Callable[[], Iterator[Batch]]
    clip: Callable[[Any], Any] | None
    facts: dict[str, Any] = field(default_factory=dict)


def to_numpy(array: Any) -> Array:
    """An mx.array as NumPy; bfloat16, which NumPy lacks, as float32 (exact)."""
    import mlx.core as mx

    if array.dtype == mx.bfloat16:
        array = array.astype(mx.float32)
    return np.array(array)


def dtype_name(dtype: Any) -> str:
    """`bfloat16` of mlx.core.bfloat16."""
    return str(dtype).removeprefix("mlx.core.")


def load_arrays(file: Any) -> dict[str, Any]:
    """The tensors of a safetensors file as mx.arrays."""
    import mlx.core as mx

    arrays: Any = mx.load(str(file))
    return dict(arrays)


def flat(tree: Any) -> dict[str, Any]:
    """A parameter tree as live name → mx.array."""
    from mlx.utils import tree_flatten

    return dict(tree_flatten(tree))


def adapter(model: Any) -> dict[str, Array]:
    """The trainable parameters under canonical names."""
    return {canonical(k): to_numpy(v) for k, v in flat(model.trainable_parameters()).items()}


def live_names(model: Any) -> dict[str, str]:
    """Canonical name → live name of every trainable parameter."""
    return {canonical(name): name for name in flat(model.trainable_parameters())}


def renamed(model: Any, arrays: Mapping[str, Array]) -> dict[str, Any]:
    """An adapter under the live names of a model, as mx.arrays.

    Raises:
        UnmatchedNames: Names that stand on one side only.
    """
    import mlx.core as mx

    names = live_names(model)
    if lone := sorted(names.keys() ^ arrays.keys()):
        raise UnmatchedNames(
            f"cannot hand over the adapter: {len(lone)} unmatched names, first {lone[0]!r} "
            f"({'in the model only' if lone[0] in names else 'not trainable in the model'})"
        )
    return {names[name]: mx.array(value) for name, value in arrays.items()}


def gradient_norm(gradients: Any) -> Any:
    """Global L2 norm in float32, accurate to a few ulps.

    All tensors are joined, for hundreds of small reductions cost several percent of a step, and
    summed in a tree: one running float32 sum of 1e5 squares is off by 1e-4.
    """
    import mlx.core as mx

    joined = mx.concatenate([g.astype(mx.float32).reshape(-1) for g in flat(gradients).values()])
    squares = joined.square()
    while squares.size > 1:
        squares = mx.pad(squares, (0, -squares.size % 64)).reshape(-1, 64).sum(axis=1)
    return mx.sqrt(squares[0])


@contextlib.contextmanager
def restored_layer_class(model: Any) -> Iterator[None]:
    """Undoes mlx-lm's `grad_checkpoint`, which patches the layer's class for the whole process."""
    kind = type(model.layers[0])
    original = kind.__call__
    try:
        yield
    finally:
        kind.__call__ = original


@contextlib.contextmanager
def compiled(enabled: bool) -> Iterator[None]:
    """Runs with mx.compile switched on or off."""
    import mlx.core as mx

    if enabled:
        yield
        return
    mx.disable_compile()
    try:
        yield
    finally:
        mx.enable_compile()


def own_dropout(model: Any) -> float:
    """The greatest probability with which the model itself drops out in training; not LoRA's."""
    import mlx.nn as nn

    found = [
        1 - module._p_1
        for name, module in model.named_modules()
        if isinstance(module, nn.Dropout | nn.Dropout2d | nn.Dropout3d)
        and not hasattr(_parent(model, name), "lora_a")
    ]
    return max(found, default=0.0)


def _parent(model: Any, name: str) -> Any:
    for part in name.split(".")[:-1]:
        model = model[int(part)] if isinstance(model, list) else getattr(model, part)
    return model


def clip_before(optimizer: Any, clip: Callable[[Any], Any] | None) -> None:
    """Lets an optimizer clip what it is given, for loops that have no clip of their own."""
    if clip is None:
        return
    inner = optimizer.apply_gradients

    def apply_gradients(gradient: Any, parameters: Any) -> Any:
        return inner(clip(gradient), parameters)

    optimizer.apply_gradients = apply_gradients


class Observer:
    """Carries gradient norms, and gradients if asked, out of a compiled step.

    Python cannot look into a compiled function, but its optimizer's state is among the outputs:
    an entry there leaves with it.
    """

    _NORM, _GRADIENT = "parity_norm", "parity_gradient"

    def __init__(self, optimizer: Any, gradients: bool = False) -> None:
        self.optimizer = optimizer
        inner = optimizer.apply_gradients

        def apply_gradients(gradient: Any, parameters: Any) -> Any:
            optimizer.state[self._NORM] = gradient_norm(gradient)
            if gradients:
                optimizer.state[self._GRADIENT] = dict(flat(gradient))
            return inner(gradient, parameters)

        optimizer.apply_gradients = apply_gradients

    def norm(self) -> float:
        """Gradient norm of the last update, before any clip of the optimizer."""
        return float(self.optimizer.state[self._NORM].item())

    def gradient(self) -> dict[str, Array]:
        """Gradient of the last update under canonical names."""
        return {
            canonical(name): to_numpy(value)
            for name, value in self.optimizer.state[self._GRADIENT].items()
        }


def rng_state() -> str:
    """A short content key of MLX's random generator."""
    import mlx.core as mx

    state: Any = mx.random.state
    return hashlib.sha256(to_numpy(state[0]).tobytes()).hexdigest()[:12]


def dtype_census(
    parameters: Any, packed: Mapping[str, tuple[int, Any]] | None = None
) -> dict[str, int]:
    """Number of elements by dtype.

    Args:
        parameters: A tree of arrays.
        packed: Quantized weights by name: the elements that each stands for, which count in the dtype
            of their scales; scales and biases themselves do not.
    """
    census: dict[str, int] = {}
    modules = {name.rpartition(".")[0] for name in packed or {}}
    for name, value in flat(parameters).items():
        module, _, last = name.rpartition(".")
        if module in modules and last in ("scales", "biases"):
            continue
        size, dtype = (packed or {}).get(name, (int(value.size), value.dtype))
        kind = dtype_name(dtype)
        census[kind] = census.get(kind, 0) + size
    return census


def activation_census(outputs: Iterable[Any]) -> dict[str, int]:
    """Number of modules by the dtype of their output, from `module_outputs`."""
    census: dict[str, int] = {}
    for value in outputs:
        name = dtype_name(value.dtype)
        census[name] = census.get(name, 0) + 1
    return census


def lora_modules(model: Any) -> dict[str, Any]:
    """Canonical name → live LoRA module."""
    return {
        canonical(name): module
        for name, module in model.named_modules()
        if hasattr(module, "lora_a")
    }


def lora_facts(model: Any) -> dict[str, Any]:
    """Rank, scale, dropout, layers and modules as the live LoRA modules have them."""
    modules = lora_modules(model)
    return {
        # (in, r), of experts (experts, r, in)
        "rank": single({int(m.lora_a.shape[1]) for m in modules.values()}),
        "scale": single({float(m.scale) for m in modules.values()}),
        # nn.Dropout keeps the probability of keeping an element
        "dropout": single({round(1 - m.dropout._p_1, 9) for m in modules.values()}),
        **trained(map(canonical, flat(model.trainable_parameters()))),
    }


def optimizer_facts(optimizer: Any, steps: int) -> dict[str, Any]:
    """Hyperparameters as the live optimizer has them; the learning rate step for step."""
    import mlx.core as mx

    schedule = optimizer._schedulers.get("learning_rate")
    if schedule:
        rates = [float(to_numpy(mx.array(schedule(mx.array(step))))) for step in range(steps)]
    else:
        rates = [float(optimizer.learning_rate.item())] * steps
    return {
        "optim.class": type(optimizer).__name__,
        "optim.betas": [float(b) for b in getattr(optimizer, "betas", ())],
        "optim.eps": getattr(optimizer, "eps", None),
        "optim.weight_decay": float(getattr(optimizer, "weight_decay", 0.0)),
        "optim.bias_correction": getattr(optimizer, "bias_correction", None),
        "optim.lr": rates,
    }
