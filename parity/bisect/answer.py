"""The sentences a maintainer acts on, made of what a search found."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from parity.bisect.result import AGREE, IN_PART, INCONCLUSIVE, NOT_COMPARED, SearchReport
from parity.paths import parts as names_of_parts
from parity.stages.context import Stage


def answer(report: SearchReport) -> str:
    """What was found with what shows it, what was not compared, and nothing else."""
    lines = list(report.repeats)
    for cause in report.causes:
        lines += [cause.sentence, *(f"  hint: {hint}" for hint in cause.hints)]
        lines.append(f"  shown by: {cause.reproduce}")
    lines += verdict_lines(report)
    lines += report.silent
    if report.aligned:
        lines.append(f"with all of these from the reference, {report.aligned}")
    lines += [f"not compared: {text}" for text in report.skipped]
    return "\n".join(lines)


def verdict_lines(report: SearchReport) -> list[str]:
    """The verdict in a sentence, where no cause says it."""
    who = f"{report.subject} and {report.reference}"
    if report.verdict == AGREE:
        sentence = f"{who} agree: {report.reason}"
    elif report.verdict == IN_PART:
        sentence = f"{who} agree in {', '.join(report.compared)}, and were not compared in all"
    elif report.verdict == NOT_COMPARED:
        sentence = f"{who} were not compared: {report.reason}"
    elif report.verdict == INCONCLUSIVE:
        return [f"inconclusive: {report.reason}"]
    else:
        return []
    settings = [f"differs, with no effect on what was compared: {text}" for text in report.left]
    return [sentence, *settings]


def against(values: Mapping[str, tuple[Any, Any]]) -> str:
    """Factors with the subject's and the reference's value, in words."""
    return " together with ".join(f"{n} = {a!r} against {b!r}" for n, (a, b) in values.items())


def made_by_factors(
    values: Mapping[str, tuple[Any, Any]], stage: Stage, reason: str, unproven: Iterable[str]
) -> str:
    """A cause in factors, with what was asked of it and what could not be."""
    plural = "values" if len(values) > 1 else "value"
    words = [
        f"{against(values)} makes {stage.name} (probe {stage.number:02d}) diverge: {reason}",
        f"with the reference's {plural} it agrees",
    ]
    return "; ".join([*words, *unproven])


def made_by_parts(
    parts: Collection[str], stage: Stage, own: Mapping[str, str], swapped: Collection[str]
) -> str:
    """Whose parts make a stage diverge under equal recipes; see `whose`."""
    probe = f"{stage.name} (probe {stage.number:02d})"
    if not parts:
        return f"{probe} diverges under equal recipes"
    named = " with ".join(whose(part, stage.name, own, swapped) for part in parts)
    return f"{named} makes {probe} diverge under equal recipes"


def whose(part: str, stage: str, own: Mapping[str, str], swapped: Collection[str]) -> str:
    """A part of the subject in words; beside the loss curve the loop stands for all but the parts.

    Args:
        part: The part.
        stage: Where it makes a difference.
        own: Parts of the subject to the path that each is of.
        swapped: Parts that could be the reference's as well.
    """
    idle = names_of_parts.idle(stage)
    used = [p for p in names_of_parts.PARTS if p not in idle]
    others = [p for p in used if p in swapped]
    if part != names_of_parts.LOOP:
        return f"the {names_of_parts.in_words(part)} of {own[part]}"
    if stage == "loss_curve" and len(others) == len(used):
        return f"the {part} of {own[part]}"
    if not others:
        return f"the code of {own[part]}"
    *some, last = map(names_of_parts.in_words, others)
    listed = f"{', '.join(some)} and {last}" if some else last
    return f"the code of {own[part]} beside its {listed}"
