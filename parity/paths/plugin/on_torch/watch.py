"""Any training on torch, watched from outside: batches, forward passes, losses, gradients, updates.

torch's own `Module.__call__`, `Tensor.backward` and `DataLoader.__iter__` are wrapped while it runs, and
its hook for all optimizers is set. What is noted is read only; nothing of it is computed with.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np

from parity.errors import Unsupported
from parity.paths.hf import live as _torch
from parity.paths.hf.live import to_numpy
from parity.trace import Array

Hook = Callable[[Any], None]


class Stop(BaseException):
    """Ends a training from inside; no handler of a trainer catches it."""


@dataclass
class Forward:
    """One backward pass and what led to it."""

    raw: Any
    """The batch that was drawn for it, or what the model was given."""
    loss: float
    gradient: dict[str, Array]
    """What it added to the gradient, under canonical names, if asked for."""
    slope: Array | None
    """Gradient (B, T, V) of its loss at the logits that the model's head gave, if asked for."""
    logits: Array | None
    """Those logits."""


@dataclass
class Step:
    """What went into one update of the optimizer."""

    forwards: list[Forward]
    norm: float
    """Global L2 norm of the gradient after the last backward pass, before any clip."""
    given: dict[str, Array]
    """What the optimizer was given, under canonical names, if asked for."""


@dataclass
class TorchWatch:
    """One watched training.

    Attributes:
        begin: Called with the model just before its first forward pass in training.
        stop_after: Updates after which the training is ended, before its next forward pass.
        skip: Let the optimizer do nothing.
        gain: What losses are multiplied by before their backward pass.
        gradients: Whether to keep them, and what the optimizer is given.
        logits: Whether to keep logits and the gradient at them.
        given_logits: Stand in the place of what the head gives, pass by pass.
        batches: Are drawn instead of those of the training, in the form that `form` gives them.
    """

    begin: Hook = lambda _: None
    stop_after: int | None = None
    skip: bool = False
    gain: float = 1.0
    gradients: bool = False
    logits: bool = False
    given_logits: Iterator[Any] | None = None
    batches: Iterator[Any] | None = None
    form: Callable[[Any, Any], Any] = lambda _, made: made
    steps: list[Step] = field(default_factory=list)
    model: Any = None
    optimizer: Any = None
    drawn: int = 0
    """Batches that were handed over and taken."""
    _parameters: set[int] = field(default_factory=set)
    _begun: bool = False
    _depth: int = 0
    _queue: list[Any] = field(default_factory=list)
    _asked: Any = None
    _head: tuple[Any, Any] | None = None
    _before: dict[str, Array] = field(default_factory=dict)
    _forwards: list[Forward] = field(default_factory=list)
    _norm: float = 0.0

    def run(self, training: Callable[[], Any]) -> Any:
        """Runs a training under watch.

        Raises:
            Unsupported: Nothing was seen of it.
        """
        result = None
        with self._patched(), contextlib.suppress(Stop):
            result = training()
        if not self._begun or not self.steps:
            raise Unsupported(
                "no training was seen: it must call `backward` of a loss that a forward pass of the "
                "model led to, and `step` of a torch optimizer"
            )
        return result

    @contextlib.contextmanager
    def _patched(self) -> Iterator[None]:
        import torch
        from torch.optim import Optimizer
        from torch.optim.optimizer import register_optimizer_step_pre_hook
        from torch.utils.data import DataLoader

        handle = register_optimizer_step_pre_hook(self._step)
        wrapped = (
            (torch.nn.Module, "__call__", self._call(torch.nn.Module.__call__)),
            (torch.Tensor, "backward", self._backward(torch.Tensor.backward)),
            (DataLoader, "__iter__", self._iterate(DataLoader.__iter__)),
            (Optimizer, "add_param_group", self._group(Optimizer.add_param_group)),
        )
        try:
            with contextlib.ExitStack() as stack:
                for where, name, made in wrapped:
                    stack.enter_context(mock.patch.object(where, name, made))
                yield
        finally:
            handle.remove()

    # Batches -----------------------------------------------------------------------------------

    def draw(self, own: Iterator[Any]) -> Iterator[Any]:
        """What a training draws its batches from: noted, or others in their place."""
        for raw in own:
            if self.batches is not None:
                yield from self._handed(raw)
                return
            self._queue.append(raw)
            yield raw

    def _handed(self, example: Any) -> Iterator[Any]:
        assert self.batches is not None
        for made in self.batches:
            self.drawn += 1
            raw = self.form(example, made)
            self._queue.append(raw)
            yield raw

    def _iterate(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def iterate(loader: Any) -> Iterator[Any]:
            return self.draw(original(loader))

        return iterate

    # The model ---------------------------------------------------------------------------------

    def _group(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def add_param_group(optimizer: Any, group: Any) -> Any:
            result = original(optimizer, group)
            self._parameters |= {id(p) for p in optimizer.param_groups[-1]["params"]}
            return result

        return add_param_group

    def _call(self, original: Callable[..., Any]) -> Callable[..., Any]:
        import torch

        def call(module: Any, *args: Any, **kwargs: Any) -> Any:
            if self._depth == 0 and torch.is_grad_enabled() and self._trains(module):
                self._end()
                if not self._begun:
                    self._begun = True
                    self.begin(module)
                    self._before = self._gradient()
                self._asked, self._head = (args, kwargs), None
            self._depth += 1
            try:
                result = original(module, *args, **kwargs)
            finally:
                self._depth -= 1
            if self._depth and self._is_head(module) and torch.is_grad_enabled():
                return self._at_head(result)
            return result

        return call

    def _trains(self, module: Any) -> bool:
        if self.model is not None:
            return module is self.model
        if not self._parameters or not any(id(p) in self._parameters for p in module.parameters()):
            return False
        self.model = module
        return True

    def _is_head(self, module: Any) -> bool:
        if self.model is None or not (self.logits or self.given_logits):
            return False
        base = _torch.without_adapter(self.model)
        return getattr(base, "get_output_embeddings", lambda: None)() is module

    def _at_head(self, result: Any) -> Any:
        import torch

        if self.given_logits is not None:
            made = next(self.given_logits).to(result.device, result.dtype)
            rows, width, entries = result.shape
            if made.shape[0] != rows or made.shape[1] not in (width, width - 1):
                raise Unsupported(
                    f"its model gives logits {tuple(result.shape)} where a batch of "
                    f"{tuple(made.shape)} was handed over"
                )
            made = torch.nn.functional.pad(
                made, (0, entries - made.shape[2]), value=float("-inf")
            )  # no token has what a small vocabulary lacks
            result = torch.nn.functional.pad(made, (0, 0, 0, width - made.shape[1]))
            result = result.detach().requires_grad_()
        if result.requires_grad:
            self._head = result, result.detach()
            result.retain_grad()
        return result

    # Losses and updates --------------------------------------------------------------------------

    def _backward(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def backward(loss: Any, *args: Any, **kwargs: Any) -> Any:
            if self._asked is None or loss.numel() != 1:
                return original(loss, *args, **kwargs)
            value = float(loss.detach())
            if self.gain != 1:
                loss = loss * self.gain
            result = original(loss, *args, **kwargs)
            self._note(value)
            return result

        return backward

    def _note(self, value: float) -> None:
        import torch

        raw = self._queue.pop(0) if self._queue else self._given()
        gradient: dict[str, Array] = {}
        if self.gradients:
            now = self._gradient()
            gradient = {n: g - self._before[n] if n in self._before else g for n, g in now.items()}
            self._before = now
        self._norm = _torch.gradient_norm(_torch.trainable(self.model)) if self._any() else 0.0
        slope = logits = None
        if self._head is not None and self._head[0].grad is not None:
            slope, logits = (to_numpy(t.float()) for t in (self._head[0].grad, self._head[1]))
        self._forwards.append(Forward(_kept(raw, torch), value, gradient, slope, logits))
        self._asked = self._head = None

    def _any(self) -> bool:
        return any(p.grad is not None for p in _torch.trainable(self.model))

    def _given(self) -> Any:
        args, kwargs = self._asked
        return kwargs or (args if len(args) > 1 else args[0])

    def _gradient(self) -> dict[str, Array]:
        from parity.paths.hf.tensors import trainable

        if not self.gradients:
            return {}
        found = trainable(self.model)
        return {n: to_numpy(t.gradient) for n, t in found.items() if t.gradient is not None}

    def _step(self, optimizer: Any, *_: Any) -> None:
        if self.model is None or not self._forwards:
            return
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not any(id(p) in own for p in self.model.parameters()):
            return
        self.optimizer = optimizer
        self.steps.append(Step(self._forwards, self._norm, self._gradient()))
        self._forwards, self._before = [], {}
        if self.skip:
            for parameter in self.model.parameters():
                parameter.grad = None

    def _end(self) -> None:
        if self.stop_after is not None and len(self.steps) >= self.stop_after:
            raise Stop


def _kept(raw: Any, torch: Any) -> Any:
    """A batch as it is now: the training may change it."""
    if isinstance(raw, torch.Tensor):
        return raw.detach().clone()
    if isinstance(raw, Mapping):
        return {key: _kept(value, torch) for key, value in raw.items()}
    if isinstance(raw, (tuple, list)):
        return tuple(_kept(value, torch) for value in raw)
    return np.copy(raw) if isinstance(raw, np.ndarray) else raw
