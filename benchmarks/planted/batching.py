"""Faults in rows and batches: ids, ends, order, padding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.planted.registry import planted
from parity.paths.mlx.path import MlxPath

ROWS = {"data.source": "mixed", "train.batch_size": 4}


class Rows:
    """Training rows with something else done to each."""

    def __init__(self, inner: Any, change: Callable[[int, list[int], int], Any]) -> None:
        self.inner, self.change = inner, change

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> Any:
        ids, offset = self.inner[index]
        return self.change(index, list(ids), offset)

    def itemlen(self, index: int) -> int:
        return len(self[index][0])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def rows(change: Callable[[int, list[int], int], Any]) -> type[MlxPath]:
    """A path whose rows are changed."""

    class Path(MlxPath):
        def dataset(self, recipe: Any, tokenizer: Any) -> Any:
            return Rows(super().dataset(recipe, tokenizer), change)

    return Path


@planted(
    "batching",
    "tokenization",
    parts="batching",
    hints="double_bos",
    recipe=ROWS,
    settings="batch.rows batch.shapes mask.supervised",
)
def bos_twice() -> type[MlxPath]:
    """BOS stands twice at the start of each row."""
    return rows(lambda index, ids, offset: (ids[:1] + ids, offset))


@planted(
    "batching",
    "tokenization",
    parts="batching",
    recipe=ROWS,
    settings="batch.rows batch.shapes mask.supervised",
)
def no_end_of_sequence() -> type[MlxPath]:
    """The last id of each row is dropped."""
    return rows(lambda index, ids, offset: (ids[:-1], offset))


@planted(
    "batching",
    "tokenization",
    parts="batching",
    recipe=ROWS,
    settings="batch.rows batch.shapes mask.supervised",
)
def one_id_of_one_row() -> type[MlxPath]:
    """One id of the third row is another."""
    return rows(
        lambda index, ids, offset: (
            ([*ids[:5], ids[5] ^ 1, *ids[6:]], offset) if index == 2 else (ids, offset)
        )
    )


@planted(
    "batching",
    "tokenization",
    parts="batching",
    recipe={"data.source": "chat", "mask.prompt": True, "train.batch_size": 2},
    hints="prompt_offset",  # two of the three tokens of the turn's header
    settings="batch.rows batch.shapes mask.supervised",
)
def prompt_offset_short() -> type[MlxPath]:
    """The prompt mask ends two tokens early."""
    return rows(lambda index, ids, offset: (ids, max(offset - 2, 0)))


def batches(change: Callable[[int, Any, Any], Any]) -> type[MlxPath]:
    """A path whose batches are changed."""

    class Path(MlxPath):
        def iterate(self, recipe: Any, dataset: Any) -> Any:
            inner = super().iterate(recipe, dataset)

            def draw() -> Any:
                for index, (ids, lengths) in enumerate(inner()):
                    yield change(index, ids, lengths)

            return draw

    return Path


@planted(
    "batching",
    "supervised_positions",
    parts="batching",
    recipe=ROWS,
    settings="batch.rows mask.supervised",
)
def one_row_never() -> type[MlxPath]:
    """The last row of each batch is replaced by the first."""

    def change(index: int, ids: Any, lengths: Any) -> Any:
        import mlx.core as mx

        rows = mx.array([*range(ids.shape[0] - 1), 0])
        return ids[rows], lengths[rows]

    return batches(change)


@planted(
    "batching",
    "supervised_positions",
    parts="batching",
    recipe=ROWS,
    settings="batch.pad_id batch.rows mask.supervised",
    hints="padding_supervised",  # mlx-lm's own mask goes one further, and this one no more
)
def lengths_one_short() -> type[MlxPath]:
    """Lengths count one token less than a row has."""

    def change(index: int, ids: Any, lengths: Any) -> Any:
        import mlx.core as mx

        return ids, lengths - mx.array([0, 1])

    return batches(change)


@planted(
    "batching",
    "supervised_positions",
    parts="batching",
    recipe=ROWS,
    settings="batch.pad_id batch.rows batch.shapes mask.supervised",
)
def rows_cut() -> type[MlxPath]:
    """Rows longer than 16 tokens are cut."""

    def change(index: int, ids: Any, lengths: Any) -> Any:
        import mlx.core as mx

        return ids[:, :17], mx.minimum(lengths, 16)

    return batches(change)


@planted(
    "batching",
    "loss_curve",
    parts="loop",
    recipe=ROWS,
    references=("mlx-lm",),
    settings="batch.rows batch.shapes mask.supervised",
    steps=(1,),
    differs="the batches",
)
def another_order() -> type[MlxPath]:
    """Batches come in another order: the generator is seeded otherwise."""

    class Path(MlxPath):
        def seed(self, recipe: Any) -> None:
            super().seed(recipe.override({"seed.data": 99}))

    return Path


@planted(
    "batching",
    "supervised_positions",
    parts="batching",
    recipe=ROWS,
    references=("mlx-lm",),
    settings="batch.rows batch.shapes",
    steps=(2,),
)
def first_batch_forever() -> type[MlxPath]:
    """Only the first batch is ever trained on."""

    class Path(MlxPath):
        def iterate(self, recipe: Any, dataset: Any) -> Any:
            import itertools

            inner = super().iterate(recipe, dataset)
            return lambda: itertools.repeat(next(inner()))

    return Path
