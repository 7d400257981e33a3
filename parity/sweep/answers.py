"""What a sweep finds: answers by architecture, release, question and configuration, and their causes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

GREEN, RED = ("identical", "agree"), ("diverge", "error", "inconclusive")
ABSENT, NOT_ASKED = "absent", "not asked"


@dataclass
class Cause:
    """Why a cell is red, as far as it was proven.

    Attributes:
        kind: `setting` (a key of the configuration), `loading`, `module`, `follows` or `unknown`.
        name: The key, or the module.
        sentence: What each side does, each part of it checked by a run.
        fix: What makes both sides agree, where something was found that does.
        proofs: What was run, and what came of it.
    """

    kind: str
    name: str
    sentence: str
    fix: str = ""
    proofs: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """A setting without a name is a mistake of the search.

        Raises:
            ValueError: It is one.
        """
        if self.kind == "setting" and not self.name:
            raise ValueError(f"a setting without a name: {self.sentence}")


@dataclass
class Answer:
    """One question of one configuration: a verdict with its reason in numbers."""

    question: str
    configuration: str
    verdict: str
    reason: str = ""
    value: float = 0.0
    tolerance: float = 0.0
    seconds: float = 0.0
    causes: list[Cause] = field(default_factory=list)
    reproduce: str = ""

    @property
    def green(self) -> bool:
        """Whether both sides agree."""
        return self.verdict in GREEN

    @property
    def red(self) -> bool:
        """Whether they do not, or something failed."""
        return self.verdict in RED


@dataclass
class Cell:
    """All answers of one architecture on one release."""

    architecture: str
    release: str
    answers: list[Answer] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    file: str = ""
    """The file of mlx-lm that serves the architecture."""
    note: str = ""
    """Why there are no answers."""
    remark: str = ""
    """Of which file the answers are, where it is not that of the architecture's own name."""
    seconds: float = 0.0

    def of(self, question: str) -> list[Answer]:
        """Answers to one question."""
        return [answer for answer in self.answers if answer.question == question]

    def verdict(self, question: str) -> str:
        """The worst of all configurations."""
        order = [*RED, *reversed(GREEN), NOT_ASKED, ABSENT]
        found = {answer.verdict for answer in self.of(question)}
        return next((verdict for verdict in order if verdict in found), ABSENT)

    def to_json(self) -> dict[str, Any]:
        """For files."""
        return asdict(self)


def read(data: dict[str, Any]) -> Cell:
    """A cell from its file."""
    answers = []
    for one in data["answers"]:
        causes = [Cause(**cause) for cause in one.pop("causes")]
        answers.append(Answer(**one, causes=causes))
    return Cell(**{**data, "answers": answers})
