"""Checkpoints of the tiny models, kept in the cache: each is made once for a release of transformers."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from parity import resources
from parity.files import write_atomically
from parity.sweep.consistent import consistent
from parity.sweep.maker import Maker, NotMade
from parity.sweep.shrink import VOCABULARY, completed, shrunk
from parity.sweep.traps import Configuration, Configurations, Trap, changed, configurations

TEXT = (2, 80)
"""Rows and positions of the text: longer than every window and number of positions of the traps."""
SEED = 3407
FIRST = 3
"""The first token id that is no special token."""


def text(rows: int = TEXT[0], length: int = TEXT[1]) -> np.ndarray:
    """Seeded random token ids (rows, length) int32, none of them special."""
    drawn = np.random.default_rng([SEED, rows, length]).integers(FIRST, VOCABULARY, (rows, length))
    return drawn.astype(np.int32)


@dataclass(frozen=True)
class Model:
    """A checkpoint: its folder, its modules by class, its configuration as it was saved."""

    folder: Path
    modules: dict[str, str]
    parameters: list[str]
    config: dict[str, Any]


@dataclass
class Architecture:
    """What is asked of one model type; without configurations it says why it was not made."""

    name: str
    kind: str
    found: Configurations = field(default_factory=lambda: Configurations([], [], {}))
    why_not: str = ""


class Store:
    """Makes and keeps configurations and checkpoints.

    Args:
        cache: Below `sweep/` in it everything is kept.
        maker: Makes what is not there yet.
    """

    def __init__(self, cache: Path, maker: Maker) -> None:
        self.root, self.maker = cache.resolve() / "sweep", maker
        self.registry = maker.ask("registry")
        self._key = _digest(self.registry["version"], _code())

    def architecture(self, name: str) -> Architecture:
        """The configurations of a model type, or why there are none."""
        kind = self.registry["causal"].get(name, "")
        file = self.root / "configurations" / f"{name}-{self._key}.json"
        if file.is_file():
            return _read(json.loads(file.read_text("utf-8")))
        made = Architecture(name, kind)
        try:
            default = self.maker.ask("defaults", kind=name)
            plain, ids = consistent(shrunk(default["config"])), text().tolist()
            try:
                self.maker.ask("attempt", config=plain, ids=ids)
            except NotMade:
                plain = completed(plain, default["kinds"])
            made.found = configurations(self.maker, plain, self.registry["ropes"], ids)
        except NotMade as error:
            made.why_not = f"transformers does not build it tiny: {error}"
        write_atomically(file, json.dumps(_written(made), indent=1).encode())
        return made

    def model(self, name: str, config: Mapping[str, Any], ties: bool = False) -> Model:
        """The checkpoint of a configuration.

        Raises:
            NotMade: transformers does not build or save it.
        """
        folder = (
            self.root
            / "models"
            / f"{name}-{_digest(self._key, json.dumps(config, sort_keys=True), ties)}"
        )
        about = folder / "about.json"
        if not about.is_file():
            folder.parent.mkdir(parents=True, exist_ok=True)
            made = Path(tempfile.mkdtemp(dir=folder.parent))
            try:
                answer = self.maker.ask("save", config=config, folder=str(made), ties=ties)
                for file in (resources.fixtures() / "models" / "tiny-llama").glob("*token*"):
                    shutil.copy(file, made)
                (made / "about.json").write_text(json.dumps(answer), "utf-8")
                if not folder.exists():
                    made.rename(folder)
            finally:
                shutil.rmtree(made, ignore_errors=True)
        known = json.loads(about.read_text("utf-8"))
        return Model(folder, known["modules"], known["parameters"], known["config"])

    def edited(
        self, model: Model, changes: Mapping[str, Any], without: tuple[str, ...] = ()
    ) -> Model:
        """The same weights with another config.json: values by dotted key, top-level keys left out."""
        config = changed(model.config, changes)
        for key in without:
            config.pop(key, None)
        folder = self.root / "edited" / _digest(model.folder, json.dumps(config, sort_keys=True))
        if not (folder / "config.json").is_file():
            made = Path(tempfile.mkdtemp(dir=_made(folder.parent)))
            for file in model.folder.iterdir():
                if file.name != "config.json":
                    (made / file.name).symlink_to(file.resolve())
            (made / "config.json").write_text(json.dumps(config, indent=1), "utf-8")
            if folder.exists():
                shutil.rmtree(made, ignore_errors=True)
            else:
                made.rename(folder)
        return Model(folder, model.modules, model.parameters, config)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _digest(*parts: object) -> str:
    return sha256("\n".join(map(str, parts)).encode()).hexdigest()[:16]


def _code() -> str:
    """Hash of the code that decides what is made."""
    here = Path(__file__).resolve().parent
    names = ("consistent.py", "models.py", "shrink.py", "traps.py")
    files = [*(here / name for name in names), here.parent / "paths" / "hf" / "tiny.py"]
    return _digest(*(sha256(file.read_bytes()).hexdigest() for file in files))


def _written(made: Architecture) -> dict[str, Any]:
    return {
        "name": made.name, "kind": made.kind, "why_not": made.why_not,
        "idle": made.found.idle, "refused": made.found.refused,
        "made": [c.to_json() for c in made.found.made],
    }  # fmt: skip


def _read(data: Mapping[str, Any]) -> Architecture:
    made = [
        Configuration(c["name"], c["config"], [Trap(**trap) for trap in c["traps"]], c["ties"])
        for c in data["made"]
    ]
    found = Configurations(made, data["idle"], data["refused"])
    return Architecture(data["name"], data["kind"], found, data["why_not"])
