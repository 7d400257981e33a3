"""Cells: one probe for one pair and one seed; their verdict in words and their command line."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from parity.capture import devices
from parity.capture.bundle import name_of
from parity.recipe import DEFAULT, Recipe, load
from parity.stages.context import Stage


@dataclass(frozen=True)
class Cell:
    """One probe for one subject, one reference and one seed.

    Attributes:
        subject: A path as the registry takes it, or the file of a bundle; so is `reference`.
        recipe: What both share.
        changes: Factors changed on one side: side to name to value.
        origin: The name or file that the recipe was read from.
    """

    stage: Stage
    subject: str
    reference: str
    recipe: Recipe
    changes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    origin: str = DEFAULT

    @property
    def model(self) -> str:
        """Short name of the model."""
        return Path(self.recipe.model.source).name

    @property
    def names(self) -> dict[str, str]:
        """The path of each side, which a bundle stands in for."""
        return {"subject": name_of(self.subject), "reference": name_of(self.reference)}

    @property
    def id(self) -> str:
        """What pytest shows and `-k` selects."""
        pair = "-vs-".join(self.names.values())
        return f"{self.model}-{pair}-seed{self.recipe.seed.value}"


def reproduce(cell: Cell) -> str:
    """The command line that runs this cell again."""
    words = [
        f"parity run --probes {cell.stage.number:02d} --subject {cell.subject}",
        f"--reference {cell.reference} --seeds {cell.recipe.seed.value},",
    ]
    if (device := devices.current()) != devices.DEFAULT:
        words.append(f"--device {device}")
    if cell.origin != DEFAULT:
        words.append(f"--recipe {cell.origin}")
    named = load(cell.origin, knobs=cell.recipe.knob_types()).override(
        {"seed.value": cell.recipe.seed.value}
    )
    for name, (value, _) in cell.recipe.difference(named).items():
        words.append(f"--set {setting(name, value)}")
    for side, changes in cell.changes.items():
        words += [f"--set-{side} {setting(name, value)}" for name, value in changes.items()]
    return " ".join(words)


def setting(name: str, value: Any) -> str:
    """`FACTOR=VALUE` as a word of a command line."""
    # Bare words are read as strings; everything else is TOML, of which JSON's values are a part.
    plain = isinstance(value, str) and re.fullmatch(r"[A-Za-z_][\w./-]*", value)
    return shlex.quote(f"{name}={value if plain else json.dumps(value, ensure_ascii=False)}")
