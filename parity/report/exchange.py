"""Which stack reads what which stack writes, as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from parity.record import Metric, Record
from parity.report.labels import SYMBOLS, number
from parity.report.markdown import escape
from parity.report.markdown import table as markdown_table
from parity.stages.exchange import AS_WRITTEN, CONVERTED, EXPORTED, NOT_READ, WAYS

SHORT = {AS_WRITTEN: "as saved", EXPORTED: "writer's export", CONVERTED: "converted by mlx-parity"}


def table(records: Sequence[Record]) -> str:
    """A grid of writers and readers, the numbers of each pair, and why a way was not taken."""
    writers, readers = (
        [*dict.fromkeys(getattr(record, side).path for record in records)]
        for side in ("reference", "subject")
    )
    pairs = {(r.reference.path, r.subject.path): r for r in records}
    grid = [
        [f"{w} writes", *(_cell(pairs[w, r]) if (w, r) in pairs else "" for r in readers)]
        for w in writers
    ]
    about = ", ".join(dict.fromkeys(f"{r.model}, seed {r.seed}" for r in records))
    parts = [
        f"Made by `parity adapter matrix`: an adapter with B ≠ 0 on {escape(about)}. Each row's stack saves it "
        "from its live model, each column's stack loads the files.\n",
        "### Writers and readers\n",
        markdown_table(["", *(f"{reader} reads" for reader in readers)], grid),
        "### What was compared\n",
        markdown_table(
            ["writer → reader", "modules", "scale · A · B, off by", "logits, off by", "allowed", "effect"],
            [_numbers(record) for record in records],
        ),
    ]  # fmt: skip
    reasons = [line for record in records for line in _reasons(record)]
    if reasons:
        parts += ["### Ways that were not taken, and what is wrong\n", *reasons, ""]
    versions = dict.fromkeys(
        f"{side.path}: {', '.join(f'{k} {v}' for k, v in side.environment['versions'].items())}"
        for record in records
        for side in (record.reference, record.subject)
        if side.environment.get("versions")
    )
    if versions:
        parts += ["### Versions\n", *(f"- {escape(text)}" for text in versions), ""]
    return "\n".join(parts)


def way(record: Record) -> str:
    """How the reader got the adapter."""
    return next((found for found in WAYS if found in record.findings), "")


def _cell(record: Record) -> str:
    symbol = SYMBOLS[record.verdict]
    if NOT_READ in record.findings:
        return f"{symbol} not read"
    taken = SHORT.get(way(record), "")
    return f"{symbol} {record.verdict}" + f", {taken}" * bool(taken)


def _pair(record: Record) -> str:
    return f"{record.reference.path} → {record.subject.path}"


def _numbers(record: Record) -> list[str]:
    metrics = {metric.name.removesuffix(", subject"): metric for metric in record.metrics}

    def shown(name: str, field: str) -> str:
        metric: Metric | None = metrics.get(name)
        return "" if metric is None else number(getattr(metric, field))

    modules, moved = metrics.get("modules with an adapter"), metrics.get("effect of the adapter")
    count = "" if modules is None else f"{modules.total - modules.mismatched} of {modules.total}"
    return [
        _pair(record),
        count,
        shown("scale · A · B after loading", "value"),
        shown("logits after loading", "value"),
        shown("logits after loading", "tolerance"),
        "" if moved is None else moved.note,
    ]


def _reasons(record: Record) -> list[str]:
    texts = [text for text in record.findings if text.startswith("not read as")]
    texts += [text for text in record.findings if text.startswith("not read after")]
    if not record.verdict.green and NOT_READ not in record.findings:
        texts.append(f"{record.verdict}: {record.reason}")
    return [f"- {escape(_pair(record))}: {escape(text)}" for text in texts]
