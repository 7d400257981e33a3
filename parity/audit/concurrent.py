"""Several captures at once, in the order in which they were asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
AT_ONCE = 4


def each(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """What a function gives for each item. Whoever stops early leaves nothing waiting (Ctrl-C)."""
    pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="audit")
    try:
        yield from pool.map(function, items)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
