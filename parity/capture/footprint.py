"""What a process has that one path could change for the next: found before and after each call.

Paths of one framework share a process. That is sound while each leaves the libraries as it found them;
one that replaces a function of a library, or switches a setting of the process, gets a process of its
own from then on.
"""

from __future__ import annotations

import functools
import os
import random
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from parity.paths import describe

LIBRARIES = ("mlx", "mlx_lm", "transformers", "peft", "trl", "torch.nn", "torch.optim")
"""Their modules are looked through; not what lies below `torch.nn` in thousands of names elsewhere."""
_CODE = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, type, property)
VARIABLES = (*describe.VARIABLES, "OMP_", "CUDA_", "NVIDIA_", "HF_HOME")
"""Beginnings of variables that a path must leave as they are."""
_MOST = 3  # names that a message lists
_TORCH_SEED = 67280421310721  # default_rng_seed_val, c10/core/GeneratorImpl.h


class Footprint:
    """Functions, classes, methods and registries of the loaded libraries, and the process's settings."""

    def __init__(self) -> None:
        self._modules = {
            name: _module(module, name)
            for name, module in list(sys.modules.items())
            if name.startswith(LIBRARIES) and isinstance(module, types.ModuleType)
        }
        self._settings = dict(_settings())

    def changed(self, after: Footprint) -> list[str]:
        """What is another one afterwards, by name; what came with a new module is no change."""
        found = []
        for name, before in self._modules.items():
            now = after._modules.get(name, {})
            found += [
                f"{name}.{key}"
                for key, value in before.items()
                if key not in now or not (_same(value, now[key]) or _wraps(now[key], value))
            ]
            # A module may import more of itself. A class that grew was changed by somebody, be it
            # by another library: transformers adds a method of its own to `torch.nn.Module`.
            found += [
                f"{name}.{key}"
                for key in now.keys() - before.keys()
                if "." in key and not _of_library(now[key])
            ]
        for name, value in self._settings.items():
            if after._settings.get(name) != value:
                found.append(name)
        return sorted([*found, *(after._settings.keys() - self._settings.keys())])


def in_words(changed: list[str]) -> str:
    """The first few of them."""
    more = f" and {len(changed) - _MOST} more" if len(changed) > _MOST else ""
    return ", ".join(changed[:_MOST]) + more


def _module(module: types.ModuleType, name: str) -> dict[str, Any]:
    """Name to object: functions and classes, the classes' own attributes, tables of either."""
    found: dict[str, Any] = {}
    for key, value in list(vars(module).items()):
        if isinstance(value, _CODE):
            found[key] = value
        elif type(value) is dict and value and all(map(_is_code, value.values())):
            found[key] = tuple(value.values())
        if isinstance(value, type) and value.__module__ == name:
            found |= {
                f"{key}.{own}": item
                for own, item in list(vars(value).items())
                if isinstance(item, (*_CODE, staticmethod, classmethod, int, float, str))
            }
    return found


def _is_code(value: Any) -> bool:
    return isinstance(value, _CODE)


def _of_library(value: Any) -> bool:
    """Whether it was written in a library; a decorator may give a function another one's module."""
    if code := getattr(value, "__code__", None):
        return any(code.co_filename.startswith(folder) for folder in _folders())
    return str(getattr(value, "__module__", None)).startswith(LIBRARIES)


@functools.cache
def _folders() -> tuple[str, ...]:
    """Where the libraries lie that are loaded."""
    packages = {name.partition(".")[0] for name in LIBRARIES}
    files = (getattr(sys.modules.get(name), "__file__", None) for name in packages)
    return tuple(os.path.dirname(file) + os.sep for file in files if file)  # noqa: PTH120


def _wraps(value: Any, other: Any) -> bool:
    """Whether a library put a function of its own around another.

    torch does so when a kind of optimizer is first made.
    """
    return getattr(value, "__wrapped__", None) is other and _of_library(value)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))
    return a is b or (not isinstance(a, _CODE) and type(a) is type(b) and a == b)


def _settings() -> Iterator[tuple[str, Any]]:
    """Settings of the process that change what is computed."""
    for name, text in os.environ.items():
        if name.startswith(VARIABLES):
            yield f"variable {name}", text
    yield "working directory", os.getcwd()  # noqa: PTH109
    readers: Mapping[str, Mapping[str, Callable[[Any], Any]]] = {
        "mlx.core": {"default_device": lambda mx: str(mx.default_device())},
        "torch": {
            "get_default_dtype": lambda torch: str(torch.get_default_dtype()),
            "is_grad_enabled": lambda torch: torch.is_grad_enabled(),
            "get_num_threads": lambda torch: torch.get_num_threads(),
            "are_deterministic_algorithms_enabled": lambda torch: (
                torch.are_deterministic_algorithms_enabled()
            ),
            "get_float32_matmul_precision": lambda torch: torch.get_float32_matmul_precision(),
        },
    }
    for library, settings in readers.items():
        if module := sys.modules.get(library):
            for name, read in settings.items():
                yield f"{library}.{name}", read(module)


def restart_generators() -> None:
    """Puts random generators where a new process has them.

    What ran before must not be seen in what is drawn, and a path that forgets to seed must not repeat
    itself by accident: only torch starts from the same state each time.
    """
    random.seed()
    np.random.seed()
    if mx := sys.modules.get("mlx.core"):
        mx.random.seed(int.from_bytes(os.urandom(4)))
    if torch := sys.modules.get("torch"):
        torch.manual_seed(_TORCH_SEED)
