"""unsloth-zoo's parts outside its trainer: rows, loss, optimizer, and what its clip really does."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from parity.errors import Unsupported
from parity.paths.mlx import live as _mlx
from parity.paths.mlx.live import Batch, Loss, to_numpy
from parity.paths.unsloth.knobs import UnslothKnobs
from parity.paths.unsloth.library import PACKAGE, Library
from parity.paths.unsloth.observer import Run
from parity.paths.unsloth.trainer import shifted, trainer
from parity.recipe import Recipe
from parity.trace import Array

LARGEST = 8192  # vocabulary for which an identity matrix as a head is small enough
CLIPPED = 1e4
"""Size of the gradient that is fed to see what a clip makes of it."""


class Rows(Sequence[tuple[list[int], int]]):
    """Training rows as (ids, offset), and the trainer's batches of them."""

    def __init__(
        self, found: Library, recipe: Recipe, model: Any, tokenizer: Any, rows: list[Any]
    ) -> None:
        import mlx.nn as nn

        self._found, self._recipe, self._tokenizer, self._rows = found, recipe, tokenizer, rows
        # The trainer asks a model for its type only, to choose a chat template.
        self._model = nn.Module() if model is None else model

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        """A row as it is trained on: the one batch of a data set of this row."""
        one = self._recipe.override({"train.batch_size": 1})
        [(ids, lengths)] = self._prepared(one, [self._rows[index]], 1)
        offset, end = to_numpy(lengths)[0].tolist()
        return to_numpy(ids)[0, :end].tolist(), offset

    def batches(self, count: int) -> list[Batch]:
        """Micro-batches in the order they are trained on."""
        return self._prepared(self._recipe, self._rows, count)

    def _prepared(self, recipe: Recipe, rows: list[Any], count: int) -> list[Batch]:
        one = recipe.override({"train.steps": count, "train.accumulation": 1})
        with tempfile.TemporaryDirectory() as folder:
            live = trainer(self._found, one, self._model, self._tokenizer, rows, folder)
            try:
                plan = live._prepare_data(False)[0]
            except ValueError as error:
                raise Unsupported(f"{PACKAGE}: {error}") from None
        return [_offsets(*plan[index]) for index in range(count)]


def _offsets(ids: Any, lengths: Any, labels: Any = None) -> Batch:
    """A batch whose labels, if it has them, are written as (offset, tokens)."""
    import mlx.core as mx

    if labels is None:
        return ids, lengths
    spans = []
    for row in to_numpy(labels) != -100:
        places = np.flatnonzero(row)
        if len(places) != places[-1] - places[0] + 1:
            raise Unsupported("a row is supervised in more than one piece")
        spans.append((int(places[0]), int(places[-1]) + 1))
    return ids, mx.array(spans, mx.int32)


def loss_of(found: Library, recipe: Recipe) -> Loss:
    """The loss that the trainer would make for a model, under mlx-lm's signature.

    Its chunked cross-entropy starts from hidden states. Given logits are the hidden states of a
    model whose head is the identity.
    """
    import mlx.core as mx
    import mlx.nn as nn

    made: dict[int, tuple[Any, Any]] = {}

    class Logits(nn.Module):  # type: ignore[misc]
        def __init__(self, give: Any, size: int, dtype: Any) -> None:
            super().__init__()
            self.model = give
            self.lm_head = nn.Linear(size, size, bias=False)
            self.lm_head.weight = mx.eye(size, dtype=dtype)
            self.freeze()

        def __call__(self, inputs: Any) -> Any:
            return self.lm_head(self.model(inputs))

    def loss(model: Any, ids: Any, lengths: Any) -> tuple[Any, Any]:
        lengths = shifted(recipe, found, lengths)
        if not recipe.knobs(UnslothKnobs).use_cce:
            return found.trainer.make_baseline_loss_fn()(model, ids, lengths)  # type: ignore[no-any-return]
        if not isinstance(model, nn.Module):
            logits = model(ids[:, :-1])
            if logits.shape[-1] > LARGEST:
                raise Unsupported(
                    f"{PACKAGE}'s CCE takes hidden states: logits of {logits.shape[-1]:,} tokens "
                    "would need a head of that size squared"
                )
            model = Logits(model, logits.shape[-1], logits.dtype).train()
            return found.trainer.make_cce_loss_fn(model)(model, ids, lengths)  # type: ignore[no-any-return]
        if id(model) not in made:
            made[id(model)] = model, found.trainer.make_cce_loss_fn(model)
        return made[id(model)][1](model, ids, lengths)  # type: ignore[no-any-return]

    return loss


@dataclass
class Stepping:
    """The trainer's optimizer and what it does around it."""

    trainer: Any

    def make(self, steps: int) -> Any:
        """The optimizer as the trainer builds it."""
        return self.trainer._build_optimizer(steps)

    def rates(self, steps: int) -> list[float]:
        """Learning rate of each step."""
        optimizer = self.make(steps)
        rates = []
        for step in range(steps):
            self.trainer._set_optimizer_lr_for_step(optimizer, step)
            rates.append(float(optimizer.learning_rate.item()))
        return rates

    def complete(self, steps: int) -> Any:
        """The optimizer with schedule and weight decay, for another stack's loop."""
        import mlx.core as mx

        rates, optimizer, live = mx.array(self.rates(steps)), self.make(steps), self.trainer
        optimizer._schedulers["learning_rate"] = lambda step: rates[step.astype(mx.int32)]
        update = optimizer.update

        def decayed(model: Any, gradient: Any) -> None:
            # The decay uses the rate of the step that is about to be made.
            optimizer.state["learning_rate"] = rates[optimizer.step.astype(mx.int32)]
            if hasattr(live, "_apply_coupled_weight_decay"):
                gradient = live._apply_coupled_weight_decay(model, gradient)
            if hasattr(live, "_apply_manual_weight_decay"):
                live._apply_manual_weight_decay(model, optimizer, gradient)
            update(model, gradient)

        optimizer.update = decayed
        return optimizer

    def facts(self, steps: int) -> dict[str, Any]:
        """Hyperparameters in effect, whoever applies them."""
        optimizer = self.make(steps)
        decays = ("_manual_weight_decay", "_coupled_weight_decay")
        outside = sum(float(getattr(self.trainer, name, 0.0) or 0.0) for name in decays)
        facts = _mlx.optimizer_facts(optimizer, 1)
        return facts | {
            "optim.weight_decay": facts["optim.weight_decay"] + outside,
            "optim.lr": self.rates(steps),
        }


def stepping(found: Library, args: Any) -> Stepping:
    """The optimizer's side of a trainer made with a configuration."""
    import mlx.nn as nn

    live = found.trainer.MLXTrainer(
        model=nn.Module(), tokenizer=None, train_dataset=None, args=args
    )
    return Stepping(live)


def tree_of(tensors: Mapping[str, Array], module: bool = False) -> Any:
    """Named arrays as the tree of a gradient or, with `module`, as the parameters of a module."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx.utils import tree_unflatten

    tree: Any = tree_unflatten([(name, mx.array(value)) for name, value in tensors.items()])
    if not module:
        return tree
    made = nn.Module()
    for name, value in tree.items():
        made[name] = value
    return made


def clip_in_effect(
    step: Callable[[Mapping[str, Array], list[dict[str, Array]]], Run],
) -> tuple[str, float | None]:
    """What is done to a gradient before the optimizer sees it, found by feeding one.

    Of two tensors one is far beyond any clip, with elements of two sizes, and one is small.
    """
    large, small = "layers.0.mlp.down_proj.lora_a", "layers.0.mlp.down_proj.lora_b"
    fed = {
        large: np.array([[CLIPPED, CLIPPED / 2]], np.float32),
        small: np.full((2, 1), 1e-2, np.float32),
    }
    clipped = step({name: np.zeros_like(value) for name, value in fed.items()}, [fed]).updates[0]
    factors = {name: (clipped[name] / fed[name]).ravel() for name in fed}
    if all(np.allclose(factor, 1, rtol=1e-5) for factor in factors.values()):
        return "none", None
    if not np.allclose(factors[large], factors[large][0], rtol=1e-5):
        return "value", _rounded(np.abs(clipped[large]).max())
    if np.allclose(factors[small], 1, rtol=1e-5):
        return "leaf_norm", _rounded(np.linalg.norm(clipped[large]))
    whole = np.concatenate([value.ravel() for value in clipped.values()])
    return "norm", _rounded(np.linalg.norm(whole))


def _rounded(value: Any) -> float:
    """A limit as it was meant: implementations add 1e-6 to what they divide by."""
    return float(f"{float(value):.5g}")
