"""Stage 01: the ids that are trained on, and the ids of random text and conversations."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from parity.judge.compare import compare_exact, nothing
from parity.names import each
from parity.record import Metric, Verdict
from parity.stages.context import Comparison, Context
from parity.trace import Trace

_PIECES = (
    "naïve café", "日本語のテキスト", "🤖🔥👩‍👩‍👧", "\t\ttabs", "   three spaces", "line\n\n\nbreaks",
    "\u200bzero width", "<bos>", "<s>", "</s>", "<|endoftext|>", "<|im_start|>user",
    "<start_of_turn>", "[INST]", "1234567890", "3.14159e-10", "ALL CAPS", "camelCase", "Ω≈ç√∫",
    "e\u0301", "\u00e9", "مرحبا", "a" * 40, "...", "-->", " ", "\u00a0",
)  # fmt: skip
_CONVERSATIONS = [
    [{"role": "user", "content": "What is your name?"}],
    [
        {"role": "user", "content": "  Hi  "},
        {"role": "assistant", "content": "My name is Unsloth!\n"},
        {"role": "user", "content": "Again?"},
    ],
]


class Tokenization:
    """Both real pipelines on the training rows, on seeded fuzz text and on conversations."""

    number: ClassVar[int] = 1
    name: ClassVar[str] = "tokenization"
    question: ClassVar[str] = "Do both train on the same token ids?"

    def run(self, context: Context) -> Comparison:
        """Compares ids one by one; there is no rounding here."""
        texts = fuzz(context.rng(self.number))
        inputs = Trace(scalars={"texts": texts, "conversations": _CONVERSATIONS})
        pair = context.pair("tokenization", inputs)
        a, b = pair.subject, pair.reference
        result = Comparison()
        for stem, what in (
            ("row", "training rows"),
            ("text", "fuzz text"),
            ("chat", "chat template"),
        ):
            result.metrics.append(_rows(what, stem, a, b))
        result.metrics.append(_rows("prompt offsets", "offset", a, b))
        special = {k: (a.scalars[k], b.scalars[k]) for k in ("bos", "eos", "vocab_size")}
        result.metrics.append(
            compare_exact(
                "special ids",
                np.array([str(v[0]) for v in special.values()]),
                np.array([str(v[1]) for v in special.values()]),
                note=", ".join(f"{k} {v[0]}" for k, v in special.items()),
            )
        )
        ours, theirs = (np.array(t.scalars["decoded"], dtype=object) for t in (a, b))
        result.metrics.append(compare_exact("decode round trip", ours, theirs))
        for side, trace in (("subject", a), ("reference", b)):
            result.findings += _observations(side, trace, texts)
        return result


def fuzz(rng: np.random.Generator, count: int = 24) -> list[str]:
    """Seeded text of Unicode, emoji, runs of whitespace and look-alikes of special tokens."""
    return [
        "".join(
            str(_PIECES[i]) + (" " if rng.random() < 0.5 else "")
            for i in rng.integers(0, len(_PIECES), rng.integers(1, 7))
        )
        for _ in range(count)
    ]


def _rows(what: str, stem: str, a: Trace, b: Trace) -> Metric:
    rows = list(each(a.arrays, stem)), list(each(b.arrays, stem))
    if len(rows[0]) != len(rows[1]):
        return compare_exact(what, np.array([len(rows[0])]), np.array([len(rows[1])])).model_copy(
            update={"note": f"{len(rows[0])} rows against {len(rows[1])}"}
        )
    if not rows[0]:
        return nothing(what)
    metrics = [
        compare_exact(f"{what} {i}", x, y) for i, (x, y) in enumerate(zip(*rows, strict=True))
    ]
    bad = [metric for metric in metrics if metric.verdict is Verdict.DIVERGE]
    top = bad[0] if bad else metrics[0]
    total = sum(metric.total for metric in metrics)
    wrong = sum(metric.mismatched for metric in metrics)
    note = f"{len(bad)} of {len(metrics)} rows differ; {top.where}: {top.note}" if bad else ""
    return top.model_copy(
        update={
            "name": what,
            "mismatched": wrong,
            "total": total,
            "value": float(wrong),
            "minimum_required_tolerance": float(wrong),
            "note": note,
        }
    )


def _observations(side: str, trace: Trace, texts: list[str]) -> list[str]:
    found = []
    rows = list(each(trace.arrays, "row"))
    bos, eos = trace.scalars["bos"], trace.scalars["eos"]
    if bos is not None and (n := sum(list(r[:2]) == [bos, bos] for r in rows)):
        found.append(f"{side}: BOS (id {bos}) stands twice at the start of {n} of {len(rows)} rows")
    if bos is not None and bos != eos and (n := sum(r[0] != bos for r in rows)):
        found.append(f"{side}: no BOS (id {bos}) at the start of {n} of {len(rows)} rows")
    if eos is not None and (n := sum(r[-1] != eos for r in rows)):
        found.append(f"{side}: no EOS (id {eos}) at the end of {n} of {len(rows)} rows")
    specials = ("<bos>", "<s>", "</s>", "<|", "<start_of_turn>")
    plain = [(t, d) for t, d in zip(texts, trace.scalars["decoded"], strict=True)
             if not any(s in t for s in specials)]  # fmt: skip
    if lost := [t for t, d in plain if t != d]:
        found.append(
            f"{side}: {len(lost)} of {len(plain)} fuzz texts do not survive encode and decode, "
            f"the first {lost[0]!r}"
        )
    return found
