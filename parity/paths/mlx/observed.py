"""What a live MLX path is seen to do: in its forward passes, and with the random generator."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from parity.paths.measured import Calls


@contextlib.contextmanager
def calls(model: Any, seen: Calls) -> Iterator[None]:
    """Notes calls of the modules of a model, and of others of the same classes, but for layers.

    MLX does not tell in which pass it is. What is called after the call that was given the token ids has
    returned, and was called in it, belongs to the backward pass.
    """
    import mlx.core as mx

    layers = {type(layer) for layer in model.layers}
    kinds = {type(module) for _, module in model.named_modules()} - layers

    open_calls, in_pass = 0, set[int]()

    def noting(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal open_calls
            if args and isinstance(args[0], mx.array) and mx.issubdtype(args[0].dtype, mx.integer):
                seen.layer_of |= _layers(self)
                seen.compiled.append(_traced(args[0]))
                if not open_calls:
                    in_pass.clear()
                open_calls += 1
                try:
                    return original(self, *args, **kwargs)
                finally:
                    open_calls -= 1
            if seen.compiled and _trained(self):
                late = not open_calls and id(self) in in_pass
                (seen.again if late else seen.once).add(id(self))
                in_pass.add(id(self))
            return original(self, *args, **kwargs)

        return call

    with contextlib.ExitStack() as stack:
        for kind in kinds:
            if "__call__" in vars(kind):
                put = mock.patch.object(kind, "__call__", noting(kind.__call__))
                stack.enter_context(put)
        yield


def _layers(model: Any) -> dict[int, int]:
    """The layer that each module of a model is in; empty of what has no layers."""
    layers = getattr(model, "layers", None)
    return {
        id(module): index
        for index, layer in enumerate(layers if isinstance(layers, list) else [])
        for _, module in layer.named_modules()
    }


def _trained(module: Any) -> bool:
    """Whether a parameter of its own, not one of a module inside, is trainable."""
    import mlx.core as mx

    # Frequencies of a rotary embedding are an array as well, and no parameter.
    return any(
        isinstance(value, mx.array) and module.trainable_parameter_filter(module, name, value)
        for name, value in module.items()
    )


def _traced(ids: Any) -> bool:
    """Whether an array has no value yet, because a function is being compiled."""
    import mlx.core as mx

    try:
        mx.eval(ids)
    except ValueError:
        return True
    return False


@contextlib.contextmanager
def seeding() -> Iterator[list[tuple[str, Any]]]:
    """Seeds that are set, weights that are read and random numbers that are drawn, in their order."""
    import mlx.core as mx

    events: list[tuple[str, Any]] = []

    def noting(what: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            events.append((what, args[0] if what == "seed" and args else kwargs.get("seed")))
            return original(*args, **kwargs)

        return call

    with (
        mock.patch.object(mx.random, "seed", noting("seed", mx.random.seed)),
        mock.patch.object(mx.random, "uniform", noting("draw", mx.random.uniform)),
        mock.patch.object(mx.random, "normal", noting("draw", mx.random.normal)),
        mock.patch.object(mx, "load", noting("load", mx.load)),
    ):
        yield events
