"""The sentences a maintainer acts on, made of what a search found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from parity.bisect.result import AGREE, IN_PART, INCONCLUSIVE, NOT_COMPARED, SearchReport


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
