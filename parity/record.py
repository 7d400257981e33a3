"""The JSON that a probe emits: verdict, metrics, environment and the line that reproduces it."""

from __future__ import annotations

import hashlib
from enum import StrEnum
from math import inf
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from parity.errors import UsageError
from parity.files import write_atomically

SCHEMA = 3
MODULE = "module "
"""Prefix of the series that hold the difference of a module's output."""


class Verdict(StrEnum):
    """What a probe concludes. Only `identical` and `agree` are green."""

    IDENTICAL = "identical"
    AGREE = "agree"
    DIVERGE = "diverge"
    INCONCLUSIVE = "inconclusive"
    ERROR = "error"
    SKIP = "skip"

    @property
    def green(self) -> bool:
        """Whether both sides did the same thing, shown and not merely assumed."""
        return self in (Verdict.IDENTICAL, Verdict.AGREE)


# From best to worst: the verdict of a record is the worst of its metrics'.
SEVERITY = [
    Verdict.IDENTICAL,
    Verdict.AGREE,
    Verdict.SKIP,
    Verdict.INCONCLUSIVE,
    Verdict.DIVERGE,
    Verdict.ERROR,
]


def worst(verdicts: list[Verdict]) -> Verdict:
    """The verdict that decides; nothing compared is inconclusive."""
    return max(verdicts, key=SEVERITY.index, default=Verdict.INCONCLUSIVE)


Count = Annotated[int, Field(ge=0, lt=2**63)]

# JSON has no NaN: as strings any reader can parse them, and pydantic reads them back as floats.
_CONFIG = ConfigDict(extra="forbid", ser_json_inf_nan="strings")


class Metric(BaseModel):
    """One quantity compared."""

    model_config = _CONFIG

    name: str
    verdict: Verdict
    value: float
    """Greatest absolute difference; for exact quantities the number of mismatches."""
    tolerance: float
    """What was allowed at the place of `value`; 0 where bits must be equal."""
    minimum_required_tolerance: float
    """The smallest tolerance at that place under which this metric would be green, those of its other
    places in proportion; infinite where none would do."""
    floor: float = 0.0
    """What rounding alone explains there; the tolerance is a multiple of it."""
    sources: dict[str, float | str] = Field(default_factory=dict)
    """What the floor is the greatest of, each with its value, or with the reason why it is absent."""
    accepted: str = ""
    """Why the metric is green although `value` is above `tolerance`."""
    why_floor: str = ""
    """Why two paths of one framework are held to the floor here and not to equal bits."""
    relative: float | None = None
    """Greatest relative difference."""
    mismatched: Count = 0
    total: Count = 0
    where: str = ""
    """Name and index of the greatest excess over the tolerance."""
    step: Count | None = None
    """First step over the tolerance, in a series."""
    error_subject: float | None = None
    """Greatest distance of the subject from the float64 referee."""
    error_reference: float | None = None
    off: str = ""
    """Which side is off, judged by the referee: subject, reference, both or neither."""
    gate: bool = True
    """Whether the verdict of the record depends on it."""
    note: str = ""

    def contradiction(self) -> str:
        """Why its numbers cannot give a green verdict; empty where they can, or where it is not."""
        if not self.verdict.green:
            return ""
        for name in ("value", "tolerance"):
            if not 0 <= getattr(self, name) < inf:
                return f"{self.verdict}, but its {name} is {getattr(self, name)}"
        if self.verdict is Verdict.IDENTICAL and self.value:
            return f"identical, but its value is {self.value:g}"
        if self.value > self.tolerance and not self.accepted:
            over = f"its value {self.value:g} is over the tolerance {self.tolerance:g}"
            return f"{self.verdict}, but {over} and no reason to accept it is recorded"
        return ""


class Side(BaseModel):
    """One of the two paths of a record."""

    model_config = _CONFIG

    path: str
    recipe: dict[str, Any]
    digest: str
    environment: dict[str, Any] = Field(default_factory=dict)


class Record(BaseModel):
    """What one probe found for one pair and one seed."""

    model_config = _CONFIG

    schema_version: int = SCHEMA
    tool: str
    probe: Count
    stage: str
    model: str
    seed: Count
    subject: Side
    reference: Side
    expectation: str = ""
    """`identical` for the same operations in one framework, else `noise floor`."""
    verdict: Verdict
    reason: str
    """The verdict in one sentence."""
    metrics: list[Metric] = Field(default_factory=list)
    findings: list[str] = Field(default_factory=list)
    """Differences as shipped and other observations, which do not decide the verdict."""
    hints: list[str] = Field(default_factory=list)
    series: dict[str, list[float]] = Field(default_factory=dict)
    """Values a step, by name: `dloss`, `dloss floor`, …; and under `MODULE` with the name of a module,
    in the order of calls, the greatest difference of its output and what was allowed."""
    passes: dict[str, dict[str, bool]] = Field(default_factory=dict)
    """Side to prompt to whether the expected completion came."""
    facts: dict[str, float] = Field(default_factory=dict)
    """Numbers that no verdict depends on; hints are drawn from them."""
    expected: str = ""
    """Why a known difference is expected here, with a link: see `parity.results.expected`."""
    first_divergence: dict[str, Any] | None = None
    detail: str = ""
    seconds: float = 0.0
    artifacts: list[str] = Field(default_factory=list)
    """Traces of a divergence, below the cache that `parity list` shows."""
    git: str = ""
    reproduce: str = ""

    @property
    def name(self) -> str:
        """File name without ending."""
        parts = (f"{self.probe:02d}", self.stage, self.model, self.subject.path, "vs")
        return (
            "-".join([*parts, self.reference.path, f"seed{self.seed}"])
            .replace("/", "_")
            .replace(":", "_")
        )

    def save(self, folder: Path) -> Path:
        """Writes the record atomically; returns its file."""
        file = folder / f"{self.name}.json"
        write_atomically(file, sealed(self.model_dump_json(indent=1).encode()))
        return file

    def contradiction(self) -> str:
        """Why the verdict does not follow from the metrics; empty where it does.

        `error`, `skip` and `inconclusive` say that a comparison failed or proves nothing; they may
        stand beside any metrics, since none of them is green.
        """
        gates = [metric for metric in self.metrics if metric.gate]
        for metric in gates:
            if why := metric.contradiction():
                return f"metric {metric.name!r} is {why}"
        if not gates:
            return f"the verdict is {self.verdict}, but no metric decides it" * self.verdict.green
        decides = self.verdict.green or self.verdict is Verdict.DIVERGE
        concluded = conclude(self.metrics)[0]
        if decides and self.verdict is not concluded:
            return f"the verdict is {self.verdict}, but its metrics give {concluded}"
        return ""


def conclude(metrics: list[Metric]) -> tuple[Verdict, str]:
    """The verdict of a record and its sentence, from the metrics that gate."""
    gates = [metric for metric in metrics if metric.gate]
    verdict = worst([metric.verdict for metric in gates])
    if not gates:
        return verdict, "nothing was compared"
    bad = [metric for metric in gates if metric.verdict is verdict]
    if verdict is Verdict.IDENTICAL:
        return verdict, f"all {len(gates)} metrics are equal bit for bit"
    if verdict is Verdict.AGREE:
        top = max(bad, key=lambda m: m.value / m.tolerance if m.tolerance > 0 else 0.0)
        if top.tolerance > 0:
            share = f"{top.value:.3g} of {top.tolerance:.3g} allowed"
            return (
                verdict,
                f"all {len(gates)} metrics within their floors; closest: {top.name}, {share}",
            )
        return verdict, f"all {len(gates)} metrics agree"
    first = bad[0]
    if first.note and first.where == first.name:  # a sentence of its own, as of the config
        return verdict, first.note
    where = f" at {first.where}" if first.where and not first.where.startswith(first.name) else ""
    return verdict, f"{first.name}{where}" + (f": {first.note}" if first.note else "")


def first_divergence(metrics: list[Metric]) -> dict[str, Any] | None:
    """Name, place and step of the first gating metric that diverges."""
    for metric in metrics:
        if metric.gate and metric.verdict is Verdict.DIVERGE:
            return {"metric": metric.name, "where": metric.where, "step": metric.step}
    return None


class DamagedRecord(Exception):
    """A file that is no record, or a record whose verdict does not follow from its metrics."""

    def __init__(self, file: Path, reason: str) -> None:
        super().__init__(f"{file}: {reason}")
        self.file = file
        self.reason = reason


_START = f'{{\n "schema_version": {SCHEMA},'.encode()
_DIGEST = b',\n "digest": "'  # the last entry: of all bytes before it


def sealed(text: bytes) -> bytes:
    """A record's JSON with a digest as its last entry, so that no byte of it can change unnoticed."""
    head = text.removesuffix(b"\n}")
    return head + _DIGEST + _digest(head) + b'"\n}'


def _digest(head: bytes) -> bytes:
    return hashlib.sha256(head).hexdigest()[:16].encode()


def load(file: Path) -> Record:
    """Reads one record and checks that its verdict follows from its metrics.

    Raises:
        DamagedRecord: It is no record, was changed after it was written, or its verdict contradicts
            its metrics.
        UsageError: It was written by a newer version of this tool.
    """
    try:
        record = parse(file.read_bytes())
    except NewerSchema as error:
        raise UsageError(f"{file}: {error}") from None
    except (OSError, ValueError) as error:
        raise DamagedRecord(file, f"not a record: {error}") from None
    if why := record.contradiction():
        raise DamagedRecord(file, why)
    return record


class NewerSchema(Exception):
    """Written by a newer version of this tool."""


def parse(text: bytes, whole: bool = True) -> Record:
    """The record of a JSON text, brought up to the present schema; its verdict is not checked.

    Args:
        text: As `Record.save` writes it, or an older version of this tool.
        whole: Whether the text ends in its digest; one that lies in a store does not.

    Raises:
        ValueError: It is none, or it is not as it was written.
        NewerSchema: Its schema is newer than this tool's.
    """
    head, mark, tail = text.rpartition(_DIGEST)
    as_written = tail.rstrip() == _digest(head) + b'"\n}'
    if whole and as_written and text.startswith(_START):
        return _validated(head + b"\n}")
    data = from_json(text)
    version = data.get("schema_version") if isinstance(data, dict) else None
    if not isinstance(version, int) or isinstance(version, bool):
        raise ValueError("it has no schema_version")
    if version < 1:
        raise ValueError(f"there is no record schema {version}")
    if whole and version >= 3 and (mark or version <= SCHEMA):
        if not as_written:
            raise ValueError("it is not as it was written: its digest is of another content")
        del data["digest"]
    if version > SCHEMA:
        raise NewerSchema(
            f"record schema {version} is newer than this tool's {SCHEMA}: upgrade mlx-parity"
        )
    if version == 1:
        data = _from_schema_1(data)
    return _validated(data | {"schema_version": SCHEMA})


def _validated(data: bytes | dict[str, Any]) -> Record:
    try:
        if isinstance(data, bytes):
            return Record.model_validate_json(data)
        return Record.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{where}: {first['msg']}") from None


# The reasons that schema 1 gave in a metric's note for a green value over the tolerance.
_ACCEPTED_IN_SCHEMA_1 = (
    "the subject is nearer to float64 than the reference",
    "a near tie, decided by rounding",
    "near ties, decided by rounding",
)


def _from_schema_1(data: dict[str, Any]) -> dict[str, Any]:
    """Schema 1 tagged NaN and infinities, and kept in `note` why a metric was accepted."""

    def untagged(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: untagged(item) for key, item in value.items()}
        if isinstance(value, list):
            return [untagged(item) for item in value]
        tagged = value in ("float:nan", "float:inf", "float:-inf")
        return float(value.removeprefix("float:")) if tagged else value

    data = untagged(data)
    metrics = data.get("metrics", [])
    for metric in metrics if isinstance(metrics, list) else []:
        if isinstance(metric, dict) and str(metric.get("note")).endswith(_ACCEPTED_IN_SCHEMA_1):
            metric["accepted"] = metric["note"]
    return data
