"""Live MLX modules seen from outside: what goes in and comes out, and the gradients there."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from parity.names import LOGITS, called, canonical
from parity.paths.mlx.live import Batch, Loss
from parity.paths.module_calls import ModuleCalls
from parity.trace import Array

Tap = Callable[[str, Any], Any]
"""Is given a name and an array, and gives the array that takes its place."""


def watchable(model: Any) -> dict[int, str]:
    """Identity → canonical name of each module, without what stands inside a LoRA module."""
    modules = dict(model.named_modules())
    inside = tuple(f"{name}." for name, module in modules.items() if hasattr(module, "lora_a"))
    names = {id(m): canonical(n) for n, m in modules.items() if n and not n.startswith(inside)}
    return names | {id(model): LOGITS}


@contextlib.contextmanager
def tapped(
    model: Any, output: Tap, argument: Tap | None = None, called_names: list[str] | None = None
) -> Iterator[None]:
    """Passes each module's output, and its first argument if wanted, through a function.

    Names are canonical, further calls of one module get `#2`, `#3`; what the whole model returns is
    `LOGITS`. Modules inside a LoRA module are part of it.

    nn.Module has no hooks and `__call__` is looked up on the type: the types are patched for the
    length of the capture and instances told apart by identity.
    """
    import mlx.core as mx

    names = watchable(model)
    calls: Counter[str] = Counter()
    originals: dict[type, Any] = {}

    def floats(value: Any) -> bool:
        return isinstance(value, mx.array) and mx.issubdtype(value.dtype, mx.floating)

    def patched(original: Any) -> Any:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            name = names.get(id(self))
            if name is None:
                return original(self, *args, **kwargs)
            calls[name] += 1
            name = called(name, calls[name])
            if called_names is not None:
                called_names.append(name)
            if argument and args and floats(args[0]):
                args = (argument(name, args[0]), *args[1:])
            result = original(self, *args, **kwargs)
            if isinstance(result, tuple) and result and floats(result[0]):
                return (output(name, result[0]), *result[1:])
            return output(name, result) if floats(result) else result

        return call

    for _, module in model.named_modules():
        kind = type(module)
        if kind not in originals and "__call__" in vars(kind):
            originals[kind] = kind.__call__
    for kind, original in originals.items():
        kind.__call__ = patched(original)
    try:
        yield
    finally:
        for kind, original in originals.items():
            kind.__call__ = original


@contextlib.contextmanager
def module_outputs(
    model: Any,
    replace: Mapping[str, Array] | None = None,
    replace_inputs: Mapping[str, Array] | None = None,
) -> Iterator[ModuleCalls]:
    """Collects copies of the first argument and the output of every module, in the order of calls.

    Outputs of modules named in `replace`, and arguments of those in `replace_inputs`, are replaced.
    """
    import mlx.core as mx

    seen = ModuleCalls(present=[n for n in watchable(model).values() if n != LOGITS])

    def tap(event: str, kept: dict[str, Any], given: Mapping[str, Array]) -> Tap:
        def keep(name: str, array: Any) -> Any:
            if name == LOGITS:
                return array
            if name in given and array.shape == given[name].shape:
                array = mx.array(given[name]).astype(array.dtype)
            # Another array object: `h *= scale` in a model changes the one that it was handed.
            kept[name] = mx.array(array)
            seen.events.append((event, name))
            return array

        return keep

    output = tap("out", seen.outputs, replace or {})
    with tapped(model, output, tap("in", seen.inputs, replace_inputs or {}), seen.called):
        yield seen


@dataclass
class BackwardPass:
    """One backward pass: of the parameters, and at every module by name, in the order of calls.

    `outputs` is the gradient of the loss with respect to a module's output, `inputs` that with
    respect to its first argument as far as it goes through this module.
    """

    loss: Any
    tokens: Any
    parameters: Any
    outputs: dict[str, Any]
    inputs: dict[str, Any]


def gradients(model: Any, loss: Loss, batch: Batch, replace: Mapping[str, Array]) -> BackwardPass:
    """Differentiates with respect to zeros that are added to each module's output and argument.

    The gradient that arrives at an output named in `replace` is replaced on its way back. Arguments
    have a pass of their own, in which the gradients of the first arrive at the outputs: a copy for
    each module that shares one changes the order in which its gradients are summed.
    """
    import mlx.core as mx

    zeros: tuple[dict[str, Any], dict[str, Any]] = {}, {}

    def measured(at: int) -> Tap:
        def tap(name: str, array: Any) -> Any:
            zeros[at][name] = mx.zeros(array.shape, array.dtype)
            return array

        return tap

    with tapped(model, measured(0), measured(1)):
        loss(model, *batch)  # never evaluated: shapes are known without
    parameters = model.trainable_parameters()
    arriving = {
        name: mx.array(replace[name]).astype(zero.dtype)
        for name, zero in zeros[0].items()
        if name in replace and zero.shape == replace[name].shape
    }

    answering: list[Any] = []

    def answered(name: str, array: Any) -> Any:
        if name not in arriving:
            return array
        answering.append(_answering(array, arriving[name]))
        return answering[-1]

    def differentiated() -> Any:
        answering.clear()
        value, tokens = loss(model, *batch)
        return (_reached(value, answering) if answering else value), tokens

    def at_outputs(parameters: Any, zeros: Mapping[str, Any]) -> Any:
        model.update(parameters)
        with tapped(model, lambda name, array: answered(name, array) + zeros[name]):
            return differentiated()

    def at_arguments(zeros: Mapping[str, Any]) -> Any:
        with tapped(model, answered, lambda name, array: array + zeros[name]):
            return differentiated()

    try:
        (value, tokens), (found, outputs) = mx.value_and_grad(at_outputs, (0, 1))(
            parameters, zeros[0]
        )
        mx.eval(value, tokens, found, outputs)
    finally:
        model.update(parameters)
    arriving = {**outputs, **arriving}
    _, inputs = mx.value_and_grad(at_arguments)(zeros[1])
    mx.eval(inputs)
    # In the order of calls, whatever order the trees come back in.
    outputs, inputs = (
        {n: at[n] for n in zero} for at, zero in zip((outputs, inputs), zeros, strict=True)
    )
    return BackwardPass(value, tokens, found, outputs, inputs)


def _reached(value: Any, arrays: list[Any]) -> Any:
    """The same loss, from which a zero goes back to each array.

    Where a model lets no gradient through to an output, nothing would ask for the one in its place.
    """
    import mlx.core as mx

    @mx.custom_function
    def same(value: Any, *arrays: Any) -> Any:
        return value

    @same.vjp
    def same_vjp(primals: Any, cotangent: Any, output: Any) -> Any:
        return cotangent, *map(mx.zeros_like, primals[1:])

    return same(value, *arrays)


def _answering(array: Any, gradient: Any) -> Any:
    """The same array; whatever gradient arrives at it, this one is passed on."""
    import mlx.core as mx

    @mx.custom_function
    def same(x: Any) -> Any:
        return x

    @same.vjp
    def same_vjp(primals: Any, cotangents: Any, outputs: Any) -> Any:
        return gradient

    return same(array)
