"""Any training on MLX, watched from outside: what its loss is given and gives, and what its optimizer is.

MLX's own `nn.value_and_grad`, `Optimizer.update` and `mx.compile` are wrapped while it runs. Python sees
nothing of a compiled step; what happens in one leaves it as further outputs of the compiled function.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np

from parity.errors import Unsupported
from parity.names import canonical
from parity.paths.mlx import live as _mlx
from parity.paths.mlx.live import to_numpy
from parity.trace import Array

Hook = Callable[[Any], None]


class Stop(BaseException):
    """Ends a training from inside; no handler of a trainer catches it."""


@dataclass
class Forward:
    """One call of the loss under `value_and_grad`."""

    arguments: list[Array]
    """Its arrays beside the model."""
    loss: float
    rest: list[Array]
    """What it returned beside the loss."""
    gradient: dict[str, Array]
    """Of the loss, under canonical names, if asked for."""


@dataclass
class Step:
    """What went into one update of the optimizer."""

    forwards: list[Forward]
    norm: float
    """Global L2 norm of the gradient of the loss; with several that of what is made of them, before
    `clip_grad_norm` of mlx.optimizers or the clip that a loop is handed where one is called, else as the
    optimizer is given it."""
    clip_seen: bool
    """Whether that clip was called."""
    given: dict[str, Array]
    """What the optimizer was given, under canonical names, if asked for."""


@dataclass
class Watch:
    """One watched training.

    Attributes:
        begin: Called with the model just before the first step.
        stop_after: Updates after which the training is ended.
        skip: Let the loss give ones, its gradient zeros, and the optimizer do nothing: batches and live
            objects are all that is wanted.
        gain: What gradients of the loss are multiplied by.
        gradients: Whether to keep them, and what the optimizer is given.
        replaced: Makes the loss that is trained with of that of the training.
        passive: Only note which model trains, and begin where its `value_and_grad` is made; the steps of the
            run are left alone, and none of them is seen.
    """

    begin: Hook = lambda _: None
    stop_after: int | None = None
    skip: bool = False
    gain: float = 1.0
    gradients: bool = False
    replaced: Callable[[Any, Callable[..., Any]], Callable[..., Any]] = lambda _, function: function
    passive: bool = False
    steps: list[Step] = field(default_factory=list)
    model: Any = None
    loss: Callable[..., Any] | None = None
    optimizer: Any = None
    model_first: bool = True
    compiled: bool = False
    _norm: float = 0.0
    _unclipped: float | None = None
    _begun: bool = False
    _forwards: list[Forward] = field(default_factory=list)
    _recorders: list[list[dict[str, Any]]] = field(default_factory=list)
    _depth: int = 0
    _template: Any = None

    def run(self, training: Callable[[], Any]) -> Any:
        """Runs a training under watch.

        Raises:
            Unsupported: Nothing was seen of it, or what is seen cannot leave a step that was compiled
                before the training began.
        """
        result = None
        with self._patched(), contextlib.suppress(Stop):
            result = training()
        if self.loss is None or not (self.steps or self._begun or self.passive):
            raise Unsupported(
                "no training was seen: it must call `nn.value_and_grad` of mlx.nn by this name, and "
                "the `update` of an MLX optimizer"
            )
        return result

    # What is wrapped ---------------------------------------------------------------------------

    @contextlib.contextmanager
    def _patched(self) -> Iterator[None]:
        import mlx.core as mx
        import mlx.nn as nn
        import mlx.optimizers as optim

        kind = optim.Optimizer
        wrapped = [(nn, "value_and_grad", self._value_and_grad(nn.value_and_grad))]
        if not self.passive:
            wrapped += [
                (mx, "compile", self._compile(mx.compile)),
                (kind, "update", self._update(kind.update)),
                (kind, "apply_gradients", self._apply(kind.apply_gradients)),
                (optim, "clip_grad_norm", self._clip(optim.clip_grad_norm)),
            ]
        with contextlib.ExitStack() as stack:
            for where, name, made in wrapped:
                stack.enter_context(mock.patch.object(where, name, made))
            yield

    def _compile(self, compiler: Callable[..., Any]) -> Callable[..., Any]:
        def compiled(function: Any, *options: Any, **named: Any) -> Any:
            if not callable(function):
                return compiler(function, *options, **named)

            def recorded(*args: Any, **kwargs: Any) -> Any:
                self._recorders.append([])
                try:
                    result = function(*args, **kwargs)
                finally:
                    events = self._recorders.pop()
                return result, events

            inner = compiler(recorded, *options, **named)

            @functools.wraps(function, updated=())
            def call(*args: Any, **kwargs: Any) -> Any:
                if not self._recorders and self.model is not None:
                    self._begin()
                result, events = inner(*args, **kwargs)
                for event in events:
                    self._emit(event)
                return result

            return call

        return compiled

    def _value_and_grad(self, original: Callable[..., Any]) -> Callable[..., Any]:
        import mlx.core as mx
        from mlx.utils import tree_flatten, tree_map

        def value_and_grad(model: Any, function: Callable[..., Any]) -> Any:
            if self.model is not None and self.model is not model:
                return original(model, function)  # of the model that trains first all is taken
            self.model, self.loss = model, function
            inner = original(model, self.replaced(model, function))
            if self.passive:
                self._begin()
                return inner

            @functools.wraps(inner)
            def call(*args: Any, **kwargs: Any) -> Any:
                if not self._recorders:
                    self._begin()
                elif not self._begun:
                    raise Unsupported(
                        "`nn.value_and_grad` is made inside the compiled step: make it before"
                    )
                arrays = [a for _, a in tree_flatten([args, kwargs]) if isinstance(a, mx.array)]
                self._check(arrays)
                self.model_first = bool(args) and args[0] is model
                if self.model_first:  # its parameters are leaves of it as well
                    arrays = [
                        a for _, a in tree_flatten([args[1:], kwargs]) if isinstance(a, mx.array)
                    ]
                if self.skip and self._template is not None:
                    value, gradient = self._template
                else:
                    value, gradient = inner(*args, **kwargs)
                if self.skip:
                    value = tree_map(lambda v: mx.ones(v.shape, v.dtype), value)
                    gradient = tree_map(lambda g: mx.zeros(g.shape, g.dtype), gradient)
                    self._template = value, gradient
                elif self.gain != 1:
                    gradient = tree_map(lambda g: g * self.gain, gradient)
                event: dict[str, Any] = {f"forward/argument/{n}": a for n, a in enumerate(arrays)}
                values = value if isinstance(value, (tuple, list)) else [value]
                event["forward/loss"] = values[0]
                for number, (_, more) in enumerate(tree_flatten(list(values[1:]))):
                    event[f"forward/rest/{number}"] = more
                event["forward/norm"] = _mlx.gradient_norm(gradient)
                if self.gradients:
                    event |= {f"forward/gradient/{n}": g for n, g in _mlx.flat(gradient).items()}
                self.compiled |= bool(self._recorders)
                self._emit(event)
                return value, gradient

            return call

        return value_and_grad

    def _update(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def update(optimizer: Any, model: Any, gradients: Any) -> Any:
            if self._depth or (self.model is not None and model is not self.model):
                return original(optimizer, model, gradients)
            return self._around(optimizer, gradients, lambda: original(optimizer, model, gradients))

        return update

    def _apply(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def apply_gradients(optimizer: Any, gradients: Any, parameters: Any) -> Any:
            if self._depth or self.model is None:
                return original(optimizer, gradients, parameters)
            made = self._around(
                optimizer, gradients, lambda: original(optimizer, gradients, parameters)
            )
            return parameters if self.skip else made

        return apply_gradients

    def _clip(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def clip_grad_norm(*args: Any, **kwargs: Any) -> Any:
            clipped, norm = original(*args, **kwargs)
            self._emit({"clip/norm": norm})
            return clipped, norm

        return clip_grad_norm

    def noting(self, clip: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """A clip that is handed to a loop, which tells the norm of what it is given."""

        def noted(gradient: Any) -> Any:
            self._emit({"clip/norm": _mlx.gradient_norm(gradient)})
            return clip(gradient)

        return noted

    def _around(self, optimizer: Any, gradients: Any, real: Callable[[], Any]) -> Any:
        self.optimizer = optimizer
        event = {"update/norm": _mlx.gradient_norm(gradients)}
        if self.gradients:
            event |= {f"update/given/{n}": g for n, g in _mlx.flat(gradients).items()}
        self._depth += 1
        try:
            result = None if self.skip else real()
        finally:
            self._depth -= 1
        self._emit(event)
        return result

    # What it gives -----------------------------------------------------------------------------

    def _end(self) -> None:
        if self.stop_after is not None and len(self.steps) >= self.stop_after:
            raise Stop

    def _begin(self) -> None:
        self._end()  # only here the last update has reached the model
        if not self._begun:
            self._begun = True
            self.begin(self.model)

    def _check(self, arrays: list[Any]) -> None:
        """Arrays without a value that nobody carries out are those of a step compiled before."""
        import mlx.core as mx

        if self._recorders or not arrays:
            return
        try:
            mx.eval(arrays)
        except ValueError:
            raise Unsupported(
                "its step was compiled when its module was imported: compile it where it is trained"
            ) from None

    def _emit(self, event: Mapping[str, Any]) -> None:
        if self._recorders:
            self._recorders[-1].append(dict(event))
            return
        values = {name: to_numpy(value) for name, value in event.items()}
        if "clip/norm" in event:
            self._unclipped = float(values["clip/norm"])
            return
        if "forward/loss" in event:
            self._forwards.append(
                Forward(
                    _numbered(values, "forward/argument/"),
                    float(values["forward/loss"]),
                    _numbered(values, "forward/rest/"),
                    _named(values, "forward/gradient/"),
                )
            )
            self._norm = float(values["forward/norm"])
            return
        norm, clip_seen = self._norm, self._unclipped is not None
        if len(self._forwards) > 1:
            norm = float(values["update/norm"]) if self._unclipped is None else self._unclipped
        given = _named(values, "update/given/")
        self.steps.append(Step(self._forwards, norm, clip_seen, given))
        self._forwards, self._unclipped = [], None
        if self.skip:
            self._end()


def _numbered(values: Mapping[str, Array], prefix: str) -> list[Array]:
    found = {int(n.removeprefix(prefix)): v for n, v in values.items() if n.startswith(prefix)}
    return [found[number] for number in sorted(found)]


def _named(values: Mapping[str, Array], prefix: str) -> dict[str, Array]:
    return {
        canonical(name.removeprefix(prefix)): np.asarray(value)
        for name, value in values.items()
        if name.startswith(prefix)
    }
