"""What the pages of a sweep show, made once for HTML and Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from parity.report.sweep_text import MARKS
from parity.sweep.answers import ABSENT, GREEN, NOT_ASKED, RED, Answer, Cause, Cell
from parity.sweep.changes import Change
from parity.sweep.models import Architecture
from parity.sweep.questions import QUESTIONS
from parity.sweep.run import Found

PROMISES = (
    "Models are tiny, random and in float32: what a released checkpoint's size, quantization or half precision does is not asked.",
    "Both sides ran on the CPU of one machine: other kernels, such as those of Metal or CUDA, may round or err otherwise.",
    "Texts have 80 positions (146 through the KV cache): longer contexts are not asked.",
    "A trap counts only where it moves the logits of transformers; values other than those named, and combinations that were not set, are not asked.",
    "Configurations are as this release of transformers saves them. An older config.json may name the same setting otherwise, and be read otherwise.",
    "Gradients are those of LoRA on linear modules that both sides have under one name. Gradient, KV cache and tokens are asked of one configuration, which is named.",
    "The reference is transformers with eager attention. It is a reference, not the truth: where both are wrong alike the cell is green.",
    "Text alone: images and sound of a multimodal architecture are not asked.",
)
"""What a green cell does not promise, in sentences."""
EDITED = "(asked with "
"""What the reason of an answer has whose configuration was edited on one side."""
EXPLAINED = {
    "loads": "mlx-lm loads the checkpoint that transformers saved: every tensor has a place, none is left over.",
    "logits": "the logits of a random text agree within 9 times the measured noise floor.",
    "gradient": "one LoRA gradient with B ≠ 0, its norm and its loss agree.",
    "KV cache": "decoding with a cache gives what the forward pass without one gives, and both sides' caches give the same.",
    "tokens": "greedy decoding after a short and a long prompt gives the same tokens.",
}


@dataclass
class Square:
    """One question in one cell of the table."""

    question: str
    verdict: str
    style: str
    """Its colour: red only where the plain configuration is, too."""
    mark: str
    title: str
    edited: bool = False
    """Whether it is green only with an edited config.json."""


@dataclass
class Reason:
    """One cause with all that it turns red."""

    cause: Cause
    where: list[str] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)
    reproduce: str = ""


@dataclass
class Row:
    """One architecture."""

    architecture: Architecture
    cells: list[tuple[str, list[Square], str]]
    """Column, its squares, and why there are none."""
    reasons: list[Reason]
    answers: list[tuple[str, Answer]]
    """Column and answer, of the newest column that has some."""
    file: str
    remark: str = ""
    """Of which file the answers are, where it is not that of the architecture's own name."""

    @property
    def red(self) -> bool:
        """Whether any cell is."""
        return any(square.verdict in RED for _, squares, _ in self.cells for square in squares)


@dataclass
class Page:
    """All that is shown."""

    found: Found
    rows: list[Row]
    not_made: list[Architecture]
    moves: Sequence[Change]
    complete: bool
    versions: dict[str, str]

    @property
    def totals(self) -> list[tuple[str, int, int, int, int, int]]:
        """Column, its architectures, answers green, green once edited, red and not asked."""
        listed = []
        for index, column in enumerate(self.found.columns):
            squares = [square for row in self.rows for square in row.cells[index][1]]
            edited = sum(square.edited for square in squares)
            green = sum(square.verdict in GREEN for square in squares) - edited
            red = sum(square.verdict in RED for square in squares)
            asked = sum(bool(row.cells[index][1]) for row in self.rows)
            rest = len(squares) - green - edited - red
            listed.append((column, asked, green, edited, red, rest))
        return listed

    @property
    def unexplained(self) -> int:
        """Red answers without a cause."""
        return sum(
            1
            for cell in self.found.cells.values()
            for answer in cell.answers
            if answer.red and not answer.causes
        )


def page(found: Found, moves: Sequence[Change], complete: bool, versions: dict[str, str]) -> Page:
    """What is shown of a sweep."""
    rows = [
        _row(architecture, found)
        for _, architecture in sorted(found.architectures.items())
        if not architecture.why_not
    ]
    not_made = [a for _, a in sorted(found.architectures.items()) if a.why_not]
    return Page(found, rows, not_made, moves, complete, versions)


def _row(architecture: Architecture, found: Found) -> Row:
    cells: list[tuple[str, list[Square], str]] = []
    every = [cell for (name, _), cell in found.cells.items() if name == architecture.name]
    shown = [q for q in QUESTIONS if any(cell.of(q) for cell in every)]
    if {"loads", "gradient"} <= set(shown):
        shown = list(QUESTIONS)  # where nothing loads no logits were asked
    asked: list[Cell] = []
    for column in found.columns:
        cell = found.cells.get((architecture.name, column))
        if cell is None:
            cells.append((column, [], found.unavailable.get(column, "not finished")))
        elif cell.note:
            cells.append((column, [], cell.note))
        else:
            asked.append(cell)
            cells.append((column, [_square(cell, q) for q in shown], ""))
    newest = asked[-1] if asked else None
    answers = [(newest.release, answer) for answer in newest.answers] if newest else []
    file, remark = (newest.file, newest.remark) if newest else ("", "")
    return Row(architecture, cells, _reasons(asked), answers, file, remark)


def _square(cell: Cell, question: str) -> Square:
    verdict, listed = cell.verdict(question), cell.of(question)
    if not listed:
        return Square(question, NOT_ASKED, "skip", MARKS[NOT_ASKED], f"{question}: not asked")
    of = [
        answer.configuration
        for answer in listed
        if answer.verdict == verdict and answer.configuration
    ]
    title = f"{question}: {verdict} ({', '.join(of)})" if of else f"{question}: {verdict}"
    green = sum(answer.green for answer in listed)
    if len(listed) > 1:
        title += f"; {green} of {len(listed)} configurations green"
    style = "skip" if verdict in (NOT_ASKED, ABSENT) else verdict
    plain = next((answer for answer in listed if answer.configuration == "plain"), None)
    if verdict in RED and plain is not None and plain.green:
        style = "inconclusive"  # the colour alone: both agree until something is set
    edited = verdict in GREEN and all(EDITED in a.reason for a in cell.of("gradient"))
    edited = edited and bool(cell.of("gradient")) and question != "loads"
    if edited:
        title += "; with an edited config.json, see the causes"
    return Square(
        question, verdict, style, f"({MARKS[verdict]})" if edited else MARKS[verdict], title, edited
    )


def _reasons(cells: Sequence[Cell]) -> list[Reason]:
    """Causes, each once; the newest column's words first."""
    found: dict[tuple[str, str, str], Reason] = {}
    for cell in reversed(cells):
        for answer in cell.answers:
            for cause in answer.causes:
                key = (cause.kind, cause.name, cause.sentence)
                reason = found.setdefault(key, Reason(cause, reproduce=answer.reproduce))
                where = f"{answer.question} · {answer.configuration}"
                if where not in reason.where:
                    reason.where.append(where)
                if cell.release not in reason.columns:
                    reason.columns.append(cell.release)
    return list(found.values())
