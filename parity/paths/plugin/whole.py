"""What paths of whole trainers share: what a trainer is given, its defaults, and what it never does."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, NoReturn
from unittest import mock

import numpy as np

from parity import resources
from parity.errors import Unsupported, UsageError
from parity.paths import parts
from parity.paths.plugin.calling import call, defaults, taken, title
from parity.paths.plugin.given import Function, lines
from parity.paths.protocol import TrainingPath
from parity.recipe import PINNED, Recipe, factor_names
from parity.trace import Array, Trace

OBJECTS = {
    "path": "the model's folder, for a trainer that loads the model itself",
    "model": "else the loaded model without adapter",
    "adapted": "or the loaded model with LoRA in it",
    "tokenizer": "the tokenizer that comes with the model",
    "folder": "the folder of train.jsonl",
    "rows": "else its lines, as dicts",
    "batches": "None to draw its own, else an iterator of what its loss takes after the model",
    "out": "an empty folder for the adapter",
}
"""What a trainer may take beside factors."""


class WholeTrainer(TrainingPath):
    """A trainer that is run as a whole: subclasses hold its function."""

    trainer: ClassVar[Function]
    draws: ClassVar[Function | None] = None
    batch: ClassVar[Function | None] = None
    reads: ClassVar[Function | None] = None
    takes: ClassVar[frozenset[str]] = frozenset()

    def shipped(self) -> dict[str, Any]:
        """The defaults that its parameters have, and those that `shipped` reads.

        Raises:
            Unsupported: One that it takes is not known, so that no run is as it is shipped.
        """
        kind = type(self)
        found = {**defaults(kind.trainer), **(kind.reads() if kind.reads else {})}
        takes = taken(kind.trainer, OBJECTS, kind.name)
        if lacking := [f for f in takes if f not in found and not f.startswith(PINNED)]:
            raise Unsupported(
                f"{self.name} is given {', '.join(lacking)} and nobody knows its defaults: read them in "
                "from_trainer(…, shipped=), or give its parameters the defaults of the trainer"
            )
        return found

    def documents(self) -> dict[str, Any]:
        """Nothing: what documents the trainer is not known."""
        return {}

    @contextlib.contextmanager
    def objects(self, recipe: Recipe, out: str | None) -> Iterator[dict[str, Any]]:
        """Objects that need no framework, as a trainer takes them; its arguments are out of its sight."""
        with contextlib.ExitStack() as stack:
            rows, folder = lines(recipe) if "rows" in self.takes else (None, "")
            stack.enter_context(mock.patch.object(sys, "argv", [self.name]))
            yield {
                "path": resources.model_dir(recipe.model.source),
                "folder": folder or str(resources.data_dir(recipe.data.source)),
                "rows": rows,
                "out": out or stack.enter_context(tempfile.TemporaryDirectory()),
                "batches": None,
            }

    def called(self, recipe: Recipe, objects: Mapping[str, Any]) -> Any:
        """Runs it."""
        run = type(self).trainer
        return call(run, recipe, objects, f"trainer {title(run)}")

    def drawing(
        self, instead: Callable[[Function], Function]
    ) -> contextlib.AbstractContextManager[Any]:
        """Puts another function in the place of the one that draws its batches, if one is named."""
        if (own := type(self).draws) is None:
            return contextlib.nullcontext()
        home = importlib.import_module(own.__module__)
        return mock.patch.object(home, own.__name__, instead(own))

    def not_alone(self, part: str) -> NoReturn:
        """Refuses to give a part."""
        raise Unsupported(f"{self.name} is run as a whole: its {part} cannot be run by itself")

    def tokenization(self, recipe: Recipe, inputs: Trace) -> Trace:
        """Rows are seen in batches alone, in no order of their own."""
        raise Unsupported(
            f"{self.name} is run as a whole: its rows are seen in its batches (probe 09), not one by one"
        )

    def moved_by_optimizer(
        self, before: Mapping[str, Array], fed: Mapping[str, Array], after: Mapping[str, Array]
    ) -> None:
        """Refuses to feed an optimizer where an update of the trainer is more than a step of it.

        Args:
            before: Weights before an update of the trainer.
            fed: The same after a step of its optimizer with the gradient that it was given there.
            after: What the trainer made of them.
        """
        for name, value in after.items():
            start, moved = before[name].astype(np.float64), value.astype(np.float64)
            slack = 1e-4 * np.abs(moved - start).max() + 4 * np.finfo(np.float32).eps * np.abs(
                start
            )
            if (np.abs(fed[name] - moved) > slack).any():
                raise Unsupported(
                    f"{self.name} is run as a whole, and an update of it moves {name} otherwise than its "
                    "optimizer alone: no gradient can be fed to it"
                )

    def ended(self, recipe: Recipe, steps: int) -> None:
        """Refuses a run that made too few updates."""
        if steps < recipe.train.steps:
            raise Unsupported(
                f"{self.name} made {steps} updates where train.steps={recipe.train.steps}"
            )

    def draws_others(self) -> None:
        """Refuses batches that were handed over to a trainer that draws its own."""
        raise Unsupported(
            f"{self.name} draws its own batches: to train on others it must take "
            "`batches`, or name the function that draws them (from_trainer(…, batches=))"
        )

    def did_take(self, taken: int) -> None:
        """Refuses a run that trained on none of the batches that were handed over."""
        if not taken:
            raise Unsupported(
                f"{self.name} does not train on the batches that are handed over: the function that "
                "from_trainer(…, batches=) names must be the one that it looks up in that module"
            )

    def saves(self) -> None:
        """Refuses to say what a trainer saves that was given no folder."""
        if "out" not in self.takes:
            raise Unsupported(f"{self.name} takes no `out`, a folder: what it saves is not seen")


def declared(
    run: Function,
    module: str,
    name: str,
    batches: Function | None,
    batch: Function | None,
    fixed: Mapping[str, Any] | None,
    shipped: Function | None,
) -> dict[str, Any]:
    """What a class of a whole trainer declares; see `parity.plugin.from_trainer`.

    Raises:
        UsageError: It is no function, or takes what nobody can give.
    """
    given = {"run": run, "batches": batches, "batch": batch, "shipped": shipped}
    for what, function in given.items():
        if function is not None and not callable(function):
            raise UsageError(f"{what}={function!r} is no function")
    factors = factor_names()
    honoured = set(taken(run, OBJECTS, f"trainer {title(run)}"))
    takes = frozenset(inspect.signature(run).parameters) & set(OBJECTS)
    own = {*parts.TRAINING} - {"loader" if takes & {"model", "adapted"} else ""}
    own -= {"wiring" if "adapted" in takes else ""}
    honoured |= {"model.source", "train.compile", "decode.max_tokens"}
    if takes & {"folder", "rows"}:
        honoured.add("data.source")
    if "adapted" in takes:
        honoured |= {f for f in factors if f.startswith(("model.", "lora.", "seed.value"))}
    elif "model" in takes:
        honoured |= {f for f in factors if f.startswith("model.")}
    return {
        "__module__": module,
        "__doc__": f"The trainer {title(run)}.",
        "name": name or getattr(run, "__name__", "trainer"),
        "trainer": staticmethod(run),
        "draws": staticmethod(batches) if batches else None,
        "batch": staticmethod(batch) if batch else None,
        "takes": takes,
        "own_parts": tuple(part for part in parts.ALL if part in own),
        "honours": tuple(sorted(honoured)),
        "reads": staticmethod(shipped) if shipped else None,
        "fixed": dict(fixed or {}),
        "own_factors": tuple(
            f for f in factors if f not in {*honoured, *(fixed or {})} and "decode" not in f
        ),
        "patches": True,
    }
