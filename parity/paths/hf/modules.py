"""Live torch modules seen from outside: what goes in and comes out, and the gradients there."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from parity.names import LOGITS, called, canonical
from parity.paths.module_calls import ModuleCalls
from parity.trace import Array


def watchable(model: Any) -> dict[str, Any]:
    """Canonical name → module, without what stands inside a LoRA module."""
    import torch

    modules = dict(model.named_modules())
    inside = tuple(f"{name}." for name, module in modules.items() if hasattr(module, "lora_A"))

    def same_elsewhere(module: Any) -> bool:
        # Gemma's embedding multiplies by its scale inside; in MLX the model does so afterwards.
        return type(module) is torch.nn.Embedding or not isinstance(module, torch.nn.Embedding)

    return {
        canonical(name): module
        for name, module in modules.items()
        if name and not name.startswith(inside) and same_elsewhere(module)
    }


@contextlib.contextmanager
def module_outputs(
    model: Any,
    wanted: bool,
    replace: Mapping[str, Array] | None = None,
    replace_inputs: Mapping[str, Array] | None = None,
) -> Iterator[ModuleCalls]:
    """Collects copies of the first argument and the output of every module, if wanted.

    Outputs of modules named in `replace`, and arguments of those in `replace_inputs`, are replaced.
    """
    import torch

    seen = ModuleCalls(list(watchable(model)))
    calls: Counter[str] = Counter()

    def kept(
        event: str, name: str, tensor: Any, given: Mapping[str, Array], group: dict[str, Any]
    ) -> Any:
        if name in given and tensor.shape == given[name].shape:
            tensor = torch.as_tensor(given[name]).to(tensor)
        # A copy: a model may go on with `hidden_states *= scale`.
        group[name] = tensor.detach().clone()
        seen.events.append((event, name))
        return tensor

    def before(name: str) -> Callable[..., Any]:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            calls[name] += 1
            seen.called.append(called(name, calls[name]))
            first = args[0] if args else kwargs.get("hidden_states")
            if not isinstance(first, torch.Tensor) or not first.is_floating_point():
                return None
            key = called(name, calls[name])
            first = kept("in", key, first, replace_inputs or {}, seen.inputs)
            return (
                ((first, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": first})
            )

        return hook

    def after(name: str) -> Callable[..., Any]:
        def hook(module: Any, arguments: Any, output: Any) -> Any:
            first = output[0] if isinstance(output, tuple) else output
            if not isinstance(first, torch.Tensor):
                return None
            key = called(name, calls[name])
            first = kept("out", key, first, replace or {}, seen.outputs)
            return (first, *output[1:]) if isinstance(output, tuple) else first

        return hook

    handles = []
    for name, module in watchable(model).items() if wanted or replace or replace_inputs else ():
        handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
        handles.append(module.register_forward_hook(after(name)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class WatchedGradients:
    """Gradients of one backward pass at every module by name; `order` is that of returns.

    `outputs` is the gradient of the loss with respect to a module's output, `inputs` that with
    respect to its first argument as far as it goes through this module. Tensors that need no
    gradient have none.
    """

    order: list[str] = field(default_factory=list)
    outputs: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, Any] = field(default_factory=dict)


def watch(
    model: Any, run: Callable[[], Any], replace: Mapping[str, Any]
) -> tuple[Any, WatchedGradients]:
    """What a forward and backward pass returns, and the gradients at the modules on the way.

    The gradient that arrives at an output named in `replace` is replaced on its way back. What the
    whole model returns is named `LOGITS`. Arguments have a pass of their own, in which the gradients
    of the first arrive at the outputs: a view for each module that shares one changes the order in
    which its gradients are summed. The parameters keep their gradients of the first pass.
    """
    found = WatchedGradients()
    with _hooks(model, found, replace, arguments=False):
        result = run()
    kept = [(p, p.grad) for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    again = WatchedGradients()
    with _hooks(model, again, {**found.outputs, **replace}, arguments=True):
        run()
    for parameter, gradient in kept:
        parameter.grad = gradient
    found.inputs = again.inputs
    return result, found


@contextlib.contextmanager
def _hooks(
    model: Any, found: WatchedGradients, replace: Mapping[str, Any], arguments: bool
) -> Iterator[None]:
    import torch

    calls: Counter[str] = Counter()

    def watched(tensor: Any, name: str, group: dict[str, Any], given: Any = None) -> Any:
        """A view, so that what two modules return or share is told apart."""
        view = tensor.view_as(tensor)

        def arrived(gradient: Any) -> Any:
            group[name] = gradient
            if given is None or given.shape != gradient.shape:
                return None
            return torch.as_tensor(given).to(gradient)

        view.register_hook(arrived)
        return view

    def before(name: str) -> Callable[..., Any]:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            key = called(name, calls[name] + 1)
            if args and isinstance(args[0], torch.Tensor) and args[0].requires_grad:
                return (watched(args[0], key, found.inputs), *args[1:]), kwargs
            hidden = kwargs.get("hidden_states")
            if isinstance(hidden, torch.Tensor) and hidden.requires_grad:
                return args, {**kwargs, "hidden_states": watched(hidden, key, found.inputs)}
            return None

        return hook

    def after(name: str) -> Callable[..., Any]:
        def hook(module: Any, args: tuple[Any, ...], output: Any) -> Any:
            first = output[0] if isinstance(output, tuple) else output
            if not isinstance(first, torch.Tensor) or not first.requires_grad:
                return None
            calls[name] += 1
            key = called(name, calls[name])
            found.order.append(key)
            first = watched(first, key, found.outputs, replace.get(key))
            return (first, *output[1:]) if isinstance(output, tuple) else first

        return hook

    def at_logits(module: Any, args: tuple[Any, ...], output: Any) -> None:
        # The loss has been made of this very tensor: a hook on it still sees its gradient.
        given = replace.get(LOGITS)

        def arrived(gradient: Any) -> Any:
            found.outputs[LOGITS] = gradient
            return None if given is None else torch.as_tensor(given).to(gradient)

        found.order.append(LOGITS)
        output.logits.register_hook(arrived)

    handles = [model.register_forward_hook(at_logits)]
    for name, module in watchable(model).items():
        if arguments:
            handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
        handles.append(module.register_forward_hook(after(name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
