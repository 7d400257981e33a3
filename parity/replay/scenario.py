"""Scenarios: real cases with the stage and the cause that are expected, read from TOML."""

from __future__ import annotations

import contextlib
import itertools
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from parity import recipe as recipes
from parity import resources
from parity.errors import UsageError, closest
from parity.factors import Knobs
from parity.paths.parts import LOOP, PARTS
from parity.paths.registry import knobs
from parity.recipe import DEFAULT, Recipe, factor_names
from parity.stages import find
from parity.stages.context import Stage

Factors = dict[str, Any]
Share = Literal["none", "some", "all"]


class Table(BaseModel):
    """A frozen, strictly validated table; `set_subject` is written `set-subject`."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        alias_generator=lambda name: name.replace("_", "-"),
        populate_by_name=True,
    )


class Expect(Table):
    """The expected outcome.

    Either a cause at a stage, or the release in which a package changed its behaviour, or (with
    `agree`) that the suspected factors are no cause.
    """

    verdict: Literal["found", "agree"] = "found"
    stage: str = ""
    cause: tuple[str, ...] = ()
    """Factors, or parts of a path, that make the difference together."""
    release: str = ""
    gates: dict[str, Share] = {}
    """Prompt, or `teacher-forced`, to how many of the seeds pass on both sides."""

    @model_validator(mode="after")
    def _whole(self) -> Expect:
        found = bool(self.stage and self.cause) or bool(self.release)
        if (self.verdict == "found") != found:
            raise ValueError("`found` needs stage and cause, or release; `agree` has none of them")
        if self.stage:
            find(self.stage)
        return self

    def searched(self) -> str:
        """What a search must find, as text."""
        if self.release:
            return f"moved in {self.release}"
        if self.verdict == "agree":
            return "no cause"
        return f"{self.stage}: {' with '.join(self.cause)}"

    def text(self) -> str:
        """The expectation in one cell of a table."""
        return self.searched() + passing(self.gates)


def passing(shares: Mapping[str, str]) -> str:
    """How many seeds pass each gate, as a clause that follows a sentence."""
    counts = ", ".join(f"{share} pass {gate!r}" for gate, share in shares.items())
    return f"; of the seeds {counts}" if counts else ""


class Scenario(Table):
    """One case.

    Attributes:
        title: The case in a few words.
        source: Where it happened.
        about: The question, in a sentence or two.
        package: A range of releases to be searched, as `parity bisect --package` takes it.
        side: Which side runs them. At probe 12 the reference writes an adapter that the subject reads.
        sweep: Factor to values, set on both sides; every combination must come out as expected.
        set: Factors changed on both sides.
        set_subject: Factors changed in the subject; the search looks for the cause among them.
        set_reference: Factors changed in the reference throughout.
    """

    title: str
    source: Annotated[str, Field(pattern=r"^https://")]
    about: str
    recipe: str = DEFAULT
    subject: str = "mlx"
    reference: str = "mlx-lm"
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (3407,)
    probes: tuple[str, ...] = ()
    package: str = ""
    side: Literal["subject", "reference", "both"] = "subject"
    set: Factors = {}
    set_subject: Factors = {}
    set_reference: Factors = {}
    sweep: dict[str, list[Any]] = {}
    expect: Expect
    name: str = ""

    def recipes(self) -> Iterator[Recipe]:
        """The shared recipe of each seed and each point of the sweep."""
        base = recipes.load(self.recipe, knobs=self.knobs()).override(self.set)
        for values in itertools.product(*self.sweep.values()):
            point = base.override(dict(zip(self.sweep, values, strict=True)))
            for seed in self.seeds:
                yield point.override({"seed.value": seed})

    def knobs(self) -> tuple[type[Knobs], ...]:
        """Those of its paths; a path that cannot be imported is found when it is to be run."""
        with contextlib.suppress(UsageError):
            return knobs([self.subject, self.reference])
        return ()

    def stages(self) -> tuple[Stage, ...]:
        """The stages that are searched; empty: all."""
        return tuple(find(probe) for probe in self.probes)


def names() -> list[str]:
    """The scenarios of the fixtures."""
    return resources.names("scenarios")


def load(source: str) -> Scenario:
    """A scenario by name or from a TOML file.

    Raises:
        UsageError: There is none, or it is not valid; the message names the value.
    """
    file = resources.fixtures() / "scenarios" / f"{source}.toml"
    if source.endswith(".toml"):
        file = Path(source)
    if not file.is_file():
        raise UsageError(
            f"no scenario {source!r}: {closest(source, names())}give a file ending in .toml "
            "or a name that `parity replay --list` shows"
        )
    try:
        data = tomllib.loads(file.read_text(encoding="utf-8"))
        scenario = Scenario.model_validate({**data, "name": file.stem})
        for changes in (scenario.set_subject, scenario.set_reference):
            next(scenario.recipes()).override(changes)
        known = {*factor_names(scenario.knobs()), *PARTS, LOOP}
        if wrong := [name for name in scenario.expect.cause if name not in known]:
            raise UsageError(f"expect.cause: {wrong[0]!r} is neither a factor nor a part")
        gates = (*next(scenario.recipes()).decode.prompts, "teacher-forced")
        if wrong := [gate for gate in scenario.expect.gates if gate not in gates]:
            raise UsageError(f"no gate {wrong[0]!r}: there are {', '.join(map(repr, gates))}")
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{file}: not valid TOML: {error}") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "scenario"
        message = first["msg"].removeprefix("Value error, ")
        raise UsageError(f"{file}: {where}: {message}, got {first['input']!r}") from None
    except UsageError as error:
        raise UsageError(f"{file}: {error}") from None
    return scenario
