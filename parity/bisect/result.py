"""What a search for causes found, as plain data; `parity.bisect.answer` puts it into words."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from parity.bisect.minimize import Hypothesis, Question
from parity.bisect.place import Place

PART = "part "
"""What the name of a part begins with among the names that are searched."""
FOUND, AGREE, INCONCLUSIVE = "found", "agree", "inconclusive"
IN_PART, NOT_COMPARED = "agree in part", "not compared"


@dataclass
class Cause:
    """A set of factors or parts, or a place, that makes subject and reference differ."""

    stage: str
    factors: dict[str, tuple[Any, Any]]
    """Factor to (subject's value, reference's value); empty where the code differs."""
    sentence: str
    parts: tuple[str, ...] = ()
    """Parts of the subject that differ by themselves."""
    place: str = ""
    hints: list[str] = field(default_factory=list)
    reproduce: str = ""

    def named_parts(self) -> list[str]:
        """The parts as the search names them among factors."""
        return [PART + part for part in self.parts]


@dataclass
class StageVisit:
    """One stage on the path of a search: its verdict, and what was asked to explain it."""

    probe: int
    stage: str
    verdict: str
    reason: str
    seconds: float = 0.0
    """Of the verdict alone."""
    factors: tuple[str, ...] = ()
    questions: list[Question] = field(default_factory=list)
    place: Place | None = None


@dataclass
class SearchReport:
    """What a search for causes found."""

    subject: str
    reference: str
    verdict: str = AGREE
    """`found`; `agree`: all that could differ was compared; `agree in part`: some stages were not
    compared; `not compared`: none was; `inconclusive`."""
    reason: str = ""
    causes: list[Cause] = field(default_factory=list)
    repeats: list[str] = field(default_factory=list)
    """What is wrong with the subject before it is held against anything."""
    aligned: str = ""
    """What training is like once every cause is taken from the reference."""
    compared: list[str] = field(default_factory=list)
    """Stages that were compared."""
    skipped: list[str] = field(default_factory=list)
    """Stages that were not compared, and why."""
    settings: list[str] = field(default_factory=list)
    """What the effective configuration says differs, in words."""
    left: list[str] = field(default_factory=list)
    """Those of them that still differ once every cause is taken from the reference."""
    silent: list[str] = field(default_factory=list)
    """Factors that differ and change nothing in the subject, in sentences."""
    ledger: list[Hypothesis] = field(default_factory=list)
    path: list[StageVisit] = field(default_factory=list)
    """Stages in the order in which they were visited."""
    differing: int = 0
    runs: int = 0
    """Distinct recipes that the subject was run under."""
    seconds: float = 0.0
