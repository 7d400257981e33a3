"""One record as text for a terminal."""

from __future__ import annotations

from parity.record import Metric, Record, Verdict

SHOWN = 4  # metrics described in full


def headline(record: Record) -> str:
    """`PARITY diverge · probe 06 optimizer step · mlx vs mlx-lm · seed 3407`."""
    stage = record.stage.replace("_", " ")
    return (
        f"PARITY {record.verdict} · probe {record.probe:02d} {stage} · {record.model} · "
        f"{record.subject.path} vs {record.reference.path} · seed {record.seed}"
    )


def describe(record: Record) -> str:
    """Verdict, the metrics that are not green, observations, and the line that reproduces it."""
    lines = [headline(record), f"  {record.reason}"]
    bad = [m for m in record.metrics if m.gate and not m.verdict.green]
    for metric in bad[:SHOWN]:
        lines += _metric(metric)
    if len(bad) > SHOWN:
        lines.append(f"  and {len(bad) - SHOWN} more metrics that are not green")
    # Differences as shipped do not decide this verdict; reports list them in their own section.
    lines += [f"  {text}" for text in record.findings if not text.startswith("as shipped")]
    lines += [f"  hint: {hint}" for hint in record.hints]
    lines += [f"  expected: {record.expected}"] * bool(record.expected)
    if record.verdict is Verdict.ERROR and record.detail:
        lines += [f"  | {line}" for line in record.detail.strip().splitlines()[-12:]]
    lines += [f"  trace: {artifact} (in the cache)" for artifact in record.artifacts[-2:]]
    lines.append(f"  reproduce: {record.reproduce}")
    return "\n".join(lines)


def _metric(metric: Metric) -> list[str]:
    lines = [f"  {metric.name}: {metric.verdict}" + (f" · {metric.note}" if metric.note else "")]
    if metric.total > 1:
        share = 100 * metric.mismatched / metric.total
        lines.append(
            f"    {metric.mismatched:,} / {metric.total:,} elements differ ({share:.1f} %)"
        )
    if metric.floor or metric.tolerance:
        lines.append(
            f"    greatest |Δ| {metric.value:.3g} at {metric.where or metric.name}   "
            f"noise floor {metric.floor:.2g}   up to {metric.tolerance:.2g} allowed   "
            f"minimum required tolerance {metric.minimum_required_tolerance:.3g}"
        )
    if metric.off:
        errors = ""
        if metric.error_subject is not None and metric.error_reference:
            ratio = metric.error_subject / metric.error_reference
            errors = f" (the subject's error against float64 is {ratio:,.3g}× the reference's)"
        lines.append(f"    side that is off: {metric.off}{errors}")
    return lines
