"""Paths made of your own code: a loss, some parts, or a whole trainer that is watched from outside.

`docs/your-trainer.md` shows each. What you give is used; what you do not give is taken from the
reference stack, the path `mlx`, and every record says so. A function gets what its parameters name:
objects, listed with each function below, and factors of the recipe (`parity factors` lists them) by
the last part of their names where that is unique, such as `lr`, `rank`, `steps`, `batch_size`, else
by both, such as `optim_name`; `seed` is `seed.value`, `learning_rate` is `optim.lr`, `alpha` is rank ·
scale. A factor that your code takes is carried out; one that it does not take is decided by your code,
and what that does is compared with the reference.

The result is a class: `parity run --subject my_module:MyPath`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from parity.errors import UsageError
from parity.paths.plugin import trainer
from parity.paths.plugin.parts import make
from parity.paths.protocol import TrainingPath

__all__ = ["from_loss", "from_parts", "from_trainer"]

Function = Callable[..., Any]


def from_loss(
    fn: Function, *, name: str = "", batch: Function | None = None, framework: str = "mlx"
) -> type[TrainingPath]:
    """The reference stack with a loss of yours in its loop.

    Args:
        fn: `fn(model, ids, lengths)`, where ids (B, W) int32 are padded rows and lengths (B, 2) int32 the
            first supervised token and the number of tokens of each row; or `fn(model, ids)`, or
            `fn(model, inputs, targets)` or with `lengths` behind: inputs (B, W - 1) and targets
            (B, W - 1) are the rows without their last and without their first token. It returns the
            loss, a scalar, or (loss, tokens), a tuple whose second entry counts supervised tokens.
        name: Of the path in reports; that of the function by default.
        batch: Makes what the loss takes after the model from (ids, lengths), where the names of its
            parameters do not tell, such as a mask.
        framework: `mlx`.

    Raises:
        UsageError: It is no function, or what it takes cannot be told.
    """
    return from_parts(loss=fn, name=name, batch=batch, framework=framework, _frame=2)


def from_parts(
    *,
    load: Function | None = None,
    wire: Function | None = None,
    dataset: Function | None = None,
    batches: Function | None = None,
    loss: Function | None = None,
    clip: Function | None = None,
    optimizer: Function | None = None,
    save: Function | None = None,
    read: Function | None = None,
    fuse: Function | None = None,
    loop: Function | None = None,
    name: str = "",
    batch: Function | None = None,
    framework: str = "mlx",
    _frame: int = 1,
) -> type[TrainingPath]:
    """The reference stack with parts of yours in the place of its own.

    Args:
        load: Takes `path`, a folder; returns model and tokenizer.
        wire: Takes `model`; puts the adapter into it, its base frozen.
        dataset: Takes of `tokenizer`, `rows` (each line of train.jsonl as a dict), `folder`; returns the
            rows as lists of token ids, or as (ids, first supervised token).
        batches: Takes `dataset`, what that returned (without it: lists of ids), or `tokenizer`; yields what
            `loss` takes after the model. An iterator that ends is begun again.
        loss: See `from_loss`.
        clip: Takes the gradient, a tree, first; returns it.
        optimizer: Returns an MLX optimizer; a class such as `mlx.optimizers.Lion` will do.
        save: Takes of `model`, with its adapter, `tokenizer`, `folder`; writes the adapter's files into it.
        read: Takes of `model`, the base loaded anew, `folder`, what was saved; returns the model with the
            adapter, or nothing where it puts it into the one that it is given.
        fuse: Takes of `model`, with its adapter, `dequantize`, whether a quantized base is not to be
            quantized again; returns the model without adapter, or nothing as before.
        loop: Takes of `model`, `tokenizer`, `optimizer`, `loss`, `batches`, `clip`; trains for `steps`.
        name: Of the path in reports.
        batch: See `from_loss`.
        framework: `mlx`.

    Raises:
        UsageError: Nothing is given, or a function takes what is neither an object nor a factor.
    """
    if framework != "mlx":
        raise UsageError(f"framework={framework!r}: parts of yours can stand in the path mlx alone")
    given = {
        "load": load, "wire": wire, "dataset": dataset, "batches": batches, "loss": loss,
        "clip": clip, "optimizer": optimizer, "save": save, "read": read, "fuse": fuse, "loop": loop,
    }  # fmt: skip
    functions = {key: function for key, function in given.items() if function is not None}
    return make(functions, _caller(_frame + 1), name, batch)


def from_trainer(
    run: Function,
    *,
    name: str = "",
    batches: Function | None = None,
    batch: Function | None = None,
    packages: tuple[str, ...] = (),
    fixed: Mapping[str, Any] | None = None,
    shipped: Function | None = None,
) -> type[TrainingPath]:
    """A whole trainer, a script or what calls a class, that is run as it is and watched from outside.

    Loss, gradient, batches and adapter are taken where it calls MLX's own `nn.value_and_grad` and the
    `update` of an MLX optimizer, compiled or not. Watching changes no bit of the adapter it ends with.

    Args:
        run: Trains for `steps` updates. Beside factors it takes of

            - `path`, the model's folder, if it loads the model; or `model`, the loaded model without
              adapter; or `adapted`, the model with LoRA in it; `tokenizer`;
            - `folder`, which holds train.jsonl, or `rows`, its lines as dicts;
            - `batches`: None where it is to draw its own, else an iterator of what its loss takes after
              the model, to be trained on instead;
            - `out`, an empty folder, if it saves the adapter.
        name: Of the path in reports; that of the function by default.
        batches: The function of a module that draws its batches, looked up there when it trains: another
            stands in its place where batches are handed over. Needed unless `run` takes `batches`.
        batch: See `from_loss`; what the loss takes is read from the names of its parameters.
        packages: Distributions that it belongs to; their versions go into records.
        fixed: Factors that it has no option for, with the value it always has: a recipe with another value
            is skipped. Any other factor that `run` does not take is decided by the trainer and compared.
        shipped: Reads its defaults from the live library: factor to value. Defaults of the parameters of
            `run` are its defaults as well.

    Raises:
        UsageError: It is no function, or takes what is neither an object nor a factor.
    """
    return trainer.make(run, _caller(2), name, batches, batch, packages, fixed, shipped)


def _caller(depth: int) -> str:
    """The module that the path belongs to: where it is made."""
    return str(sys._getframe(depth).f_globals.get("__name__", "__main__"))
