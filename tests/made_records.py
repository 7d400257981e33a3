"""Records that no run has made."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

from rich.console import Console

from parity.record import Metric, Record, Side, Verdict
from parity.report import terminal
from parity.results.aggregate import aggregate

ADAMW = {"optim.name": "adamw", "optim.betas": [0.9, 0.999], "optim.lr": 1e-3}
STAGES = ("config", "tokenization", "logits", "cross_entropy", "lora_init", "gradient",
          "optimizer_step", "loss_curve", "greedy_decode", "supervised_positions", "kv_cache")  # fmt: skip
SEEDS = (3407, 0, 1)
REFERENCES = ("mlx-lm", "hf")


def diverging(*metrics: str, verdict: str = "diverge", environment: dict | None = None, **fields):
    """A record in which the metrics named diverge."""
    side = Side(path="mlx", recipe=ADAMW, digest="0", environment=environment or {})
    found = [
        Metric(name=name, verdict=Verdict.DIVERGE, value=1, tolerance=0,
               minimum_required_tolerance=1, off="subject", relative=1e-5)
        for name in metrics
    ]  # fmt: skip
    return Record(
        tool="0", probe=3, stage="cross_entropy", model="tiny", seed=0, subject=side,
        reference=side, verdict=Verdict(verdict), reason="", metrics=found, **fields,
    )  # fmt: skip


def record(
    probe: int, seed: int, verdict: str = "identical", reference: str = "mlx-lm", **fields: Any
) -> Record:
    sides = {
        side: Side(path=path, recipe={"train.steps": 4}, digest="0", environment={"python": side})
        for side, path in (("subject", "mlx"), ("reference", reference))
    }
    texts = {"reason": f"because of probe {probe}", "reproduce": f"run --seeds {seed}"} | fields
    if verdict in ("identical", "agree"):
        value = 0.0 if verdict == "identical" else 1e-7
        metric = Metric(
            name="x", verdict=verdict, value=value, tolerance=1e-6, minimum_required_tolerance=value
        )
        texts.setdefault("metrics", [metric])
    return Record(
        tool="0",
        probe=probe,
        stage=STAGES[probe],
        model="tiny",
        seed=seed,
        verdict=Verdict(verdict),
        **{**sides, **texts},
    )


def matrix(seeds: Iterable[int] = SEEDS) -> list[Record]:
    return [
        record(p, seed, reference=r)
        for p in range(len(STAGES))
        for seed in seeds
        for r in REFERENCES
    ]


def put(records: list[Record], *others: Record) -> list[Record]:
    """The records with some of them replaced."""
    by_name = {r.name: r for r in [*records, *others]}
    return list(by_name.values())


def curve(seed: int, dloss: list[float], step: int | None = None, **fields: Any) -> Record:
    reference = [4.0, 3.0, 2.0, 1.0][: len(dloss)]
    metric = Metric(
        name="loss per step",
        verdict=Verdict.DIVERGE if step else Verdict.AGREE,
        value=max(map(abs, dloss)),
        tolerance=1e-3,
        minimum_required_tolerance=max(map(abs, dloss)),
        step=step,
    )
    series = {
        "loss subject": [r + d for r, d in zip(reference, dloss, strict=True)],
        "loss reference": reference,
        "dloss": dloss,
        "gradient_norm subject": reference,
        "gradient_norm reference": reference,
        "dgrad": [0.0] * len(dloss),
    }
    verdict = "diverge" if step else "agree"
    return record(7, seed, verdict, metrics=[metric], series=series, **fields)


def screen(records: list[Record], width: int = 80, encoding: str = "utf-8") -> str:
    """What the terminal shows of them."""
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding, errors="replace")
    terminal.render(aggregate(records), Console(file=file, width=width, highlight=False))
    file.flush()
    return raw.getvalue().decode(encoding)
