"""Any training on torch, watched from outside: batches, forward passes, losses, gradients, updates.

torch's own `Module.__call__`, `Tensor.backward` and `DataLoader.__iter__` are wrapped while it runs, and
its hook for all optimizers is set. What is noted is read only; nothing of it is computed with.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np

from parity.errors import Unsupported
from parity.paths.hf import live as _torch
from parity.paths.hf.live import to_numpy
from parity.paths.plugin.on_torch.seen import Forward, Step, kept, supervised
from parity.trace import Array

Hook = Callable[[Any], None]


class Stop(BaseException):
    """Ends a training from inside; no handler of a trainer catches it."""


@dataclass
class TorchWatch:
    """One watched training.

    Attributes:
        begin: Called with the model just before its first forward pass in training.
        stop_after: Updates after which the training is ended, before its next forward pass.
        skip: Let the optimizer do nothing.
        gain: What losses are multiplied by before their backward pass.
        gradients: Whether to keep them, and what the optimizer is given.
        logits: Whether to see what losses supervise.
        given_logits: Stand in the place of what the head gives, pass by pass.
        batches: Are drawn instead of those of the training, in the form that `form` gives them.
        passive: Only note which model trains, hand over and begin: the steps of the run are left alone, and
            none of them is seen.
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
    passive: bool = False
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
    _head: Any = None
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
        if not self._begun or not (self.steps or self.passive):
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
        original = torch.Tensor.backward
        wrapped = (
            (torch.nn.Module, "__call__", self._call(torch.nn.Module.__call__)),
            (torch.Tensor, "backward", original if self.passive else self._backward(original)),
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

    def draw(self, own: Iterator[Any], most: int | None = None) -> Iterator[Any]:
        """What a training draws its batches from: noted, or others in their place, at `most` so many."""
        for raw in own:
            if self.batches is not None:
                yield from self.handed(raw, most)
                return
            self._queue.append(raw)
            yield raw

    def handed(self, example: Any = None, most: int | None = None) -> Iterator[Any]:
        """Batches that are handed over, in the form of an example."""
        assert self.batches is not None
        for made in itertools.islice(self.batches, most):
            self.drawn += 1
            raw = self.form(example, made)
            self._queue.append(raw)
            yield raw

    def _iterate(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def iterate(loader: Any) -> Iterator[Any]:
            try:
                most = len(loader)  # what is drawn ahead of an epoch's end would be lost
            except TypeError:
                most = None
            return self.draw(original(loader), most)

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
                if self.passive:
                    self._begun = True
            if self.given_logits is not None and isinstance(module, torch.nn.Embedding) and args:
                # Ids of another vocabulary: what comes of them is not used.
                args = (args[0].clamp(max=module.num_embeddings - 1), *args[1:])
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
            rows, width, _ = result.shape
            if made.shape[0] != rows or made.shape[1] not in (width, width - 1):
                raise Unsupported(
                    f"its model gives logits {tuple(result.shape)} where a batch of "
                    f"{tuple(made.shape)} was handed over"
                )
            # Losses take the size of the vocabulary from there.
            base = _torch.without_adapter(self.model)
            for holder in (base.config.get_text_config(), base):
                if hasattr(holder, "vocab_size"):
                    holder.vocab_size = made.shape[2]
            result = torch.nn.functional.pad(made, (0, 0, 0, width - made.shape[1]))
            result = result.detach().requires_grad_()
        if result.requires_grad:
            self._head = result
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
        raw = self._queue.pop(0) if self._queue else self._given()
        self._check(raw)
        gradient: dict[str, Array] = {}
        if self.gradients:
            now = self._gradient()
            gradient = {n: g - self._before[n] if n in self._before else g for n, g in now.items()}
            self._before = now
        self._norm = _torch.gradient_norm(_torch.trainable(self.model)) if self._any() else 0.0
        head = self._head
        seen = None if head is None or head.grad is None else supervised(head.detach(), head.grad)
        self._forwards.append(Forward(kept(raw), value, gradient, seen))
        self._asked = self._head = None

    def _any(self) -> bool:
        return any(p.grad is not None for p in _torch.trainable(self.model))

    def _check(self, raw: Any) -> None:
        """The batch is the one that the model was given."""
        args, kwargs = self._asked
        ids = kwargs.get("input_ids", args[0] if args else None)
        drawn = raw.get("input_ids") if isinstance(raw, Mapping) else raw
        drawn = drawn[0] if isinstance(drawn, (tuple, list)) else drawn
        if getattr(ids, "ndim", 0) != 2 or getattr(drawn, "ndim", 0) != 2:
            return
        if not np.array_equal(to_numpy(ids), to_numpy(drawn)[:, : ids.shape[1]]):
            raise Unsupported("its model is given other rows than those that were drawn before")

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
        rate = float(optimizer.param_groups[0]["lr"])
        self.steps.append(Step(self._forwards, self._norm, self._gradient(), rate))
        self._forwards, self._before = [], {}
        if self.skip:
            for parameter in self.model.parameters():
                parameter.grad = None

    def _end(self) -> None:
        if self.stop_after is not None and len(self.steps) >= self.stop_after:
            raise Stop
