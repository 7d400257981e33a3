"""Batches among the inputs, which a path trains on instead of drawing its own."""

from __future__ import annotations

from collections.abc import Iterator

from parity.names import each
from parity.recipe import Recipe
from parity.trace import Array, Trace


def input_batches(inputs: Trace, recipe: Recipe | None) -> Iterator[tuple[Array, Array]]:
    """Ids (B, W) and lengths (B, 2) of `batches/…`, larger batches cut to a recipe's size.

    So a path that accumulates over micro-batches of 2 trains on the same rows as one with batches
    of 6.

    Raises:
        ValueError: A batch cannot be cut evenly.
    """
    pairs = (each(inputs.arrays, f"batches/{stem}") for stem in ("ids", "lengths"))
    for ids, lengths in zip(*pairs, strict=True):
        size = recipe.train.batch_size if recipe else len(ids)
        if len(ids) > size and len(ids) % size:
            raise ValueError(f"a batch of {len(ids)} rows cannot be cut into batches of {size}")
        for start in range(0, len(ids), size):
            yield ids[start : start + size], lengths[start : start + size]
