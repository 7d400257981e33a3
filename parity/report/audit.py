"""An audit as text: what is wrong first, in full; what is as it should be last, in a line."""

from __future__ import annotations

from parity.audit.audit import WORST, Audit, Finding, Status
from parity.audit.fitness import Check, Fitness, State

TITLES = {
    Status.SWALLOWED: "Swallowed: no effect where the same move has one on another path",
    Status.OTHER: "Other effect: it moves something else than on another path",
    Status.FAILED: "Failed",
    Status.NO_EFFECT: "No effect was seen, and no other path tells whether it should have one",
    Status.NOT_SEEN: "Not seen: the path has no method that shows it",
    Status.REFUSED: "Refused, with the reason",
}


def line(finding: Finding) -> str:
    """One finding on stderr while an audit runs."""
    return f"{finding.status:<15} {finding.factor}: {finding.before} → {finding.after}"


def text(audit: Audit) -> str:
    """The whole answer."""
    lines = []
    for status in WORST[:-1]:
        if found := [f for f in audit.findings if f.status is status]:
            lines += [TITLES[status], *(f"  {finding.sentence()}" for finding in found), ""]
    if audit.defaults:
        lines += ["Defaults", *(f"  {sentence}" for sentence in audit.defaults), ""]
    if audit.documented:
        named = ", ".join(audit.documented)
        lines += [f"Documented defaults, compared: {len(audit.documented)}", f"  {named}", ""]
    if audit.not_known:
        lines += ["Not known", *(f"  {sentence}" for sentence in audit.not_known), ""]
    if audit.not_moved:
        lines += ["Not moved: no other value is known", f"  {', '.join(audit.not_moved)}", ""]
    honoured = audit.named(Status.HONOURED)
    rest = {f.factor for f in audit.findings if f.status is not Status.HONOURED}
    if whole := [name for name in honoured if name not in rest]:
        lines += [f"Honoured: {len(whole)} factors", f"  {', '.join(whole)}", ""]
    return "\n".join([*lines, conclusion(audit)])


def conclusion(audit: Audit) -> str:
    """`PARITY audit · unsloth@2026.5.2 · 2 swallowed, 30 honoured · …`."""
    counts = {status: audit.named(status) for status in WORST}
    listed = ", ".join(f"{len(names)} {status}" for status, names in counts.items() if names)
    defaults = f", {len(audit.defaults)} defaults otherwise" if audit.defaults else ""
    return f"PARITY audit · {audit.path} · {listed or 'nothing was moved'}{defaults} · {audit.seconds:.0f} s"


MARKS = {State.GOOD: "✓", State.WRONG: "✗", State.UNKNOWN: "?"}


def check(found: Check) -> str:
    """One check as a line."""
    return f"{MARKS[found.state]} {found.title:<9} {found.text}"


def fitness(found: Fitness) -> str:
    """`PARITY check-path · my_trainer:Path · fit to be judged at 9 stages · 2 checks not passed · 21 s`."""
    wrong = len(found.wrong())
    words = [
        f"PARITY check-path · {found.path}",
        "not fit to be judged yet" if wrong else f"fit to be judged at {len(found.stages)} stages",
        *([f"{wrong} check{'s' * (wrong != 1)} not passed"] if wrong else []),
        f"{found.seconds:.0f} s",
    ]
    return " · ".join(words)
