"""Skeletons of a new path: of a trainer that is run as a whole, and of one with every method of the contract."""

from __future__ import annotations

import re
import textwrap

from parity.errors import UsageError
from parity.paths.contract import METHODS, described
from parity.paths.method import Method
from parity.paths.plugin.calling import parameter_names
from parity.paths.plugin.given import PART
from parity.paths.plugin.whole import OBJECTS
from parity.recipe import Recipe

_HEAD = '''\
"""Path `{name}`. `parity run --subject MODULE:{kind} --reference hf` holds it against transformers.

Each method may be left out: what it would show is skipped then. Import frameworks inside methods.
"""

from __future__ import annotations

from typing import ClassVar

from parity.errors import Unsupported
from parity.paths.protocol import TrainingPath
from parity.recipe import Recipe
from parity.trace import Trace


class {kind}(TrainingPath):
    """What it trains with, in a line."""

    name = {name!r}
    # "mlx" or "torch": paths of one framework are expected to give the same bits.
    framework = "torch"
    # Distributions whose versions belong to a result.
    packages = ()
    # Factors that it carries out at any value; `parity factors` lists them. The sections are:
    # {sections}
    honours = ()
    # Factors without an option, with the one value that they always have.
    fixed: ClassVar[dict[str, object]] = {{}}
'''


def class_name(name: str) -> str:
    """`MyTrainer` of `my-trainer`.

    Raises:
        UsageError: No name of a path.
    """
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9]*([-_][A-Za-z0-9]+)*", name):
        raise UsageError(f"{name!r} is no name of a path: write letters and digits, as my-trainer")
    return "".join(part[0].upper() + part[1:] for part in re.split("[-_]", name))


_TRAINER = '''\
"""Path `{name}`: `parity run --subject MODULE:{kind} --reference mlx-lm`."""

from parity import plugin


def run(path, folder, out, steps, lr, rank, scale, batch_size, seed):
    """Calls the trainer for `steps` updates; it is watched from outside.

    It gets what its parameters name. Leave out what your trainer does not take: what it does instead is
    compared all the same. Objects:

{objects}

    Factors of the recipe (`parity factors` lists them with their values):

{factors}
    """
    raise NotImplementedError("{name}: call your trainer here")


# All that may be left out: `batches`, the function of your module that draws its batches, so that others
# can be handed over; `batch`, which makes what your loss takes from (ids, lengths) where the names of its
# parameters do not tell; `packages`, whose versions go into records; `fixed`, factors that always have one
# value; `shipped`, a function that reads your defaults.
{kind} = plugin.from_trainer(run, name="{name}")

# A trainer on torch: add framework="torch" to each.
# Without a trainer, parts of it; each may be left out and is then that of path mlx (of hf on torch):
# {kind} = plugin.from_parts({parts})
# {kind} = plugin.from_loss(loss)
'''


def trainer(name: str) -> str:
    """A module with a trainer that is run as a whole, and what it may take and leave out."""
    objects = "\n".join(f"    - `{key}`: {meaning}" for key, meaning in OBJECTS.items())
    shortest = {names: key for key, names in parameter_names().items()}
    factors = textwrap.fill(
        ", ".join(sorted(shortest.values())), 96, initial_indent="    ", subsequent_indent="    "
    )
    parts = ", ".join(f"{key}={key}" for key in PART)
    return _TRAINER.format(
        name=name, kind=class_name(name), objects=objects, factors=factors, parts=parts
    )


def skeleton(name: str) -> str:
    """A module with one class that has every method of the contract, none of them written yet."""
    sections = ", ".join(f'"{section}."' for section in Recipe.model_fields)
    head = _HEAD.format(name=name, kind=class_name(name), sections=sections)
    # What it sets by default it may tell; without that it has none.
    return head + "".join(map(_method, (m for m in METHODS.values() if m.name != "defaults")))


def _method(method: Method) -> str:
    first, *lines = described(method)
    summary = first.partition(": ")[2]
    wrapped = [
        part
        for line in lines
        for part in textwrap.wrap(
            re.sub(r" {2,}", "  ", line.strip()), 88, subsequent_indent="    "
        )
    ]
    text = textwrap.indent("\n".join(wrapped), "        ")
    return f'''
    def {method.name}(self, recipe: Recipe, inputs: Trace) -> Trace:
        """{summary[:1].upper()}{summary[1:]}.

{text}
        """
        raise Unsupported("{method.name} is not written yet")
'''
