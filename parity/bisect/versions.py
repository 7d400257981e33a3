"""Which release, or which commit, of a package changed a verdict.

One cell is run over and over, one side of it (or both) in an interpreter with another version.
"""

from __future__ import annotations

import math
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

from parity.bisect.search import (
    ChangePoint,
    CheckResult,
    Ledger,
    Outcome,
    Progress,
    SameEnds,
    search,
)
from parity.capture import keys as content
from parity.capture.engine import Engine
from parity.capture.environments import (
    HERE,
    Interpreter,
    Range,
    UnavailableVersion,
    commits,
    digest,
    environment,
    releases,
    snapshot,
)
from parity.cells.cell import Cell
from parity.cells.run import run_cell
from parity.paths.registry import registered, resolve
from parity.recipe import Recipe
from parity.record import Verdict
from parity.trace import Trace

FACTOR = 2.0
"""By how much a metric must move between two ends of one verdict."""
SIDES = {"subject": ("subject",), "reference": ("reference",), "both": ("subject", "reference")}


@dataclass(frozen=True)
class Change:
    """Where the verdict of a cell changed: `side` ran other versions of `package`.

    `verdicts` are "verdict: reason" of found.last_good and found.first_bad, `quantity` the metric that
    moved where both verdicts are the same, `also` the packages that the resolver changed between these
    two as well; `runs` counts the cells that were run.
    """

    package: str
    side: str
    found: ChangePoint
    verdicts: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    quantity: str = ""
    runs: int = 0
    seconds: float = 0.0

    def sentence(self) -> str:
        """The result in words."""
        if self.found.inconclusive:
            return f"{self.package}: inconclusive: {self.found.inconclusive}"
        who = "both sides" if self.side == "both" else f"the {self.side}"
        hidden = ", ".join(self.found.hidden)
        unless = f" (or in {hidden}, which cannot be run)" if hidden else ""
        when = f"in {self.found.first_bad}{unless}, after {self.found.last_good}"
        also = f" (changed with it: {', '.join(self.also)})" if self.also else ""
        return f"{who} moved with {self.package} {when}{also}: {' → '.join(self.verdicts)}"


class VersionEngine(Engine):
    """Runs some paths in other interpreters, with captures of their own; the rest in the base's.

    Repeats (`attempt` above 0) capture everything afresh.
    """

    def __init__(self, base: Engine, places: Mapping[str, Interpreter], attempt: int = 0) -> None:
        self.base, self.places, self.attempt = base, places, attempt
        keys = sorted((spec, place.key) for spec, place in places.items())
        folder = base.cache.resolve() / "elsewhere" / digest(keys, attempt)
        super().__init__(folder, base.timeout, folder / "logs", base.notice, base.jobs)

    def capture(
        self, spec: str, method: str, recipe: Recipe, inputs: Trace, attempt: str = ""
    ) -> Trace:
        """See `Engine.capture`."""
        if spec in self.places or self.attempt:
            return super().capture(spec, method, recipe, inputs, attempt)
        return self.base.capture(spec, method, recipe, inputs, attempt)

    @property
    def shared(self) -> Path:
        """See `Engine.shared`."""
        return self.base.cache

    def _interpreter(self, spec: str) -> tuple[str, str]:
        if "@" in spec:  # a release of its own, whatever the other side runs
            return self.base._interpreter(spec)
        # Entry points are not known in another interpreter: the class is named.
        target = registered().get(spec, spec)
        return target, str(self.places[spec].python if spec in self.places else sys.executable)


@dataclass(frozen=True)
class VersionSearch:
    """A cell, the side that runs elsewhere, and further requirements of its environments.

    The engine runs what stays as it is; its cache keeps environments, snapshots and, unless a file
    is named, the ledger of finished checks.
    """

    engine: Engine
    cell: Cell
    side: str = "subject"
    extra: tuple[str, ...] = ()
    ledger: Path | None = None
    progress: Progress | None = None

    def release(self, span: Range, *pins: str) -> Change:
        """Searches the releases of a package, others pinned. Raises as `search` does."""
        kinds = [resolve(getattr(self.cell, side)) for side in SIDES[self.side]]
        inherit = any(kind.framework == "torch" for kind in kinds)
        named = {name for kind in kinds for name in kind.packages} - {"torch", span.package}
        alone = {name for kind in kinds for name in kind.without_dependencies}
        extra, cache = (*sorted(named), *pins, *self.extra), self.engine.cache
        return self.search(
            span.package, releases(span),
            lambda version: environment(span.package, version, cache, extra, inherit, alone), *extra,
        )  # fmt: skip

    def each(self, *spans: Range) -> list[Change]:
        """Searches several packages one after the other, the others at their high ends."""
        changes = []
        for span in spans:
            pins = [f"{other.package}=={other.high}" for other in spans if other != span]
            try:
                changes.append(self.release(span, *pins))
            except SameEnds as error:
                found = ChangePoint(inconclusive=str(error))
                changes.append(Change(span.package, self.side, found))
        return changes

    def commit(self, repo: Path, good: str, bad: str) -> Change:
        """Searches the main line of a checkout of a pure Python package."""
        repo = repo.resolve()
        named = commits(repo, good, bad)
        return self.search(repo.name, named, lambda c: snapshot(repo, c, self.engine.cache))

    def search(
        self, package: str, versions: list[str], place: Callable[[str], Interpreter], *about: str
    ) -> Change:
        """Finds where the verdict of the low end gives way to that of the high end.

        Raises:
            SameEnds: Both have the same verdict.
            UsageError: Fewer than two versions can be run.
        """
        started, sides = time.perf_counter(), SIDES[self.side]
        # Named by its class, the side is neither the referee nor the other side of the same name.
        names = {side: getattr(self.cell, side) for side in sides}
        cell = replace(self.cell, **{s: registered().get(n, n) for s, n in names.items()})

        def run(version: str, attempt: int) -> CheckResult:
            where = place(version)
            specs = {getattr(cell, side): where for side in sides}
            with VersionEngine(self.engine, specs, attempt) as elsewhere:
                record = run_cell(elsewhere, cell)
                loaded = {**self.engine.loaded, **elsewhere.loaded}
            kind = (
                re.search(r"(\w+) in \w+: ", record.reason) if record.verdict == "error" else None
            )
            state = "agree" if record.verdict.green else str(record.verdict)
            # One error is not another.
            state = f"{state} ({kind[1]})" if kind else state
            gates = (metric for metric in record.metrics if metric.gate)
            measured = {metric.name: (str(metric.verdict), metric.value) for metric in gates}
            return CheckResult(state, record.reason, measured, loaded)

        paths = map(content.of_path, (cell.subject, cell.reference))
        identity = package, cell.stage.name, cell.changes, self.side, about
        key = digest(*identity, *paths, content.of_recipe(cell.recipe), _code())
        file = self.ledger or self.engine.cache / "bisect" / f"{key}.json"
        book = Ledger(file, key, self.engine.current)
        remembered = book.remember(run)

        def verdict(version: str, attempt: int = 0) -> CheckResult:
            try:
                return remembered(version, attempt)
            except UnavailableVersion as error:
                return CheckResult(Outcome.GAP, str(error))

        def end(order: Iterable[str]) -> CheckResult:
            answers = map(verdict, order)
            return next((a for a in answers if a.outcome != Outcome.GAP), CheckResult(Outcome.GAP))

        first, last = end(versions), end(reversed(versions))
        quantity = "" if first.outcome != last.outcome else moved(first, last)

        def check(version: str, attempt: int) -> CheckResult:
            answer = verdict(version, attempt)
            if answer.outcome == Outcome.GAP:
                return answer
            reason = f"{answer.outcome}: {answer.reason}"
            if quantity in answer.quantities:
                reason += f" ({quantity}: {answer.quantities[quantity][1]:.3g})"
            return CheckResult(_like(answer, first, last, quantity), reason)

        try:
            found = search(versions, check, progress=self.progress)
        except SameEnds as error:
            raise SameEnds(f"{package}: {error} ({first.outcome}: {first.reason})") from None
        change = Change(package, self.side, found, quantity=quantity)
        if not found.inconclusive:
            ends = found.last_good, found.first_bad
            old, new = (place(version).versions for version in ends)
            also = [
                f"{name} {old.get(name, 'none')} → {new.get(name, 'none')}"
                for name in sorted((old.keys() | new.keys()) - {package})
                if old.get(name) != new.get(name)
            ]
            reasons = tuple(check(version, 0).reason for version in ends)
            change = replace(change, verdicts=reasons, also=tuple(also))
        return replace(change, runs=book.computed, seconds=time.perf_counter() - started)


def moved(low: CheckResult, high: CheckResult) -> str:
    """The metric that moved between two ends of one verdict; empty if none did.

    First one whose own verdict changed, as where one cause was fixed and another is left; else the one
    whose value changed most, by a factor of `FACTOR` at least.
    """
    common = [name for name in low.quantities if name in high.quantities]
    for name in common:
        if _green(low.quantities[name][0]) != _green(high.quantities[name][0]):
            return name
    factors = {name: _apart(low.quantities[name][1], high.quantities[name][1]) for name in common}
    largest = max(factors, key=lambda name: factors[name], default="")
    return largest if largest and factors[largest] >= math.log(FACTOR) else ""


def _like(answer: CheckResult, low: CheckResult, high: CheckResult, quantity: str) -> Outcome:
    """Which end a version is like: by its verdict, or by the metric that moved between the ends."""
    if not quantity:
        known = {high.outcome: Outcome.HIGH, low.outcome: Outcome.LOW}
        return known.get(answer.outcome, Outcome.GAP)
    if quantity not in answer.quantities:
        return Outcome.GAP
    verdict, value = answer.quantities[quantity]
    ends = low.quantities[quantity], high.quantities[quantity]
    greens = [_green(end[0]) for end in ends]
    if greens[0] != greens[1]:
        return Outcome.LOW if _green(verdict) == greens[0] else Outcome.HIGH
    nearer = _apart(value, ends[0][1]) <= _apart(value, ends[1][1])
    return Outcome.LOW if nearer else Outcome.HIGH


def _green(verdict: str) -> bool:
    return Verdict(verdict).green


def _apart(a: float, b: float) -> float:
    """How far two magnitudes are apart, as the logarithm of their ratio."""
    if a == b:
        return 0.0
    if not (a > 0 and b > 0 and math.isfinite(a) and math.isfinite(b)):
        return math.inf
    return abs(math.log(a / b))


def _code() -> str:
    """Hash of this package's code: a verdict depends on what compares as well."""
    return digest(*(sha256(f.read_bytes()).hexdigest() for f in sorted(HERE.rglob("*.py"))))
