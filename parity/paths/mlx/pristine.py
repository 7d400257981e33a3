"""A loaded MLX model as it was, whatever training has put into it since."""

from __future__ import annotations

from typing import Any


class Pristine:
    """Remembers the modules, their classes, arrays and flags; `restore` puts them back.

    Wrapping a module (LoRA, DoRA, of linear layers, embeddings, experts), quantizing, casting and
    training put other objects into the places of these, and leave the objects themselves alone. No
    array is copied.
    """

    def __init__(self, model: Any) -> None:
        modules = {id(module): module for _, module in model.named_modules()}
        self._model = model
        self._kept = [(m, type(m), _copied(dict(m)), _copied(vars(m))) for m in modules.values()]

    def restore(self) -> Any:
        """The model, as it was when this was made."""
        for module, kind, children, attributes in self._kept:
            if type(module) is not kind:
                module.__class__ = kind
            # A module is a dict whose own `update` is that of parameters.
            dict.clear(module)
            dict.update(module, _copied(children))
            vars(module).clear()
            vars(module).update(_copied(attributes))
        return self._model


def without_adapter(model: Any) -> Any:
    """A model whose adapter somebody else put in, each adapted module replaced by what is in it.

    For models that were never seen without: mlx-lm's `remove_lora_layers` knows `LoRALinear` alone.

    Raises:
        RuntimeError: An adapted module with no single module inside that could be its base.
    """
    import mlx.nn as nn
    from mlx.utils import tree_unflatten

    bases = []
    for name, module in model.named_modules():
        if "lora_a" not in module:
            continue
        inside = [m for m in module.children().values() if isinstance(m, nn.Module)]
        found = [m for m in inside if not isinstance(m, nn.Dropout)]
        if len(found) != 1:
            raise RuntimeError(
                f"{name} is a {type(module).__name__}: which module it adapts cannot be seen"
            )
        bases.append((name, found[0]))
    if bases:
        model.update_modules(tree_unflatten(bases))
    return model


def _copied(value: Any) -> Any:
    """Containers anew, for they are changed in place; modules and arrays themselves."""
    if type(value) in (list, tuple):
        return type(value)(_copied(item) for item in value)
    if type(value) is dict:
        return {name: _copied(item) for name, item in value.items()}
    return set(value) if type(value) is set else value
