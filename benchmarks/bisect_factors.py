"""Each factor flipped in the subject, all others differing harmlessly: is it found alone, and how fast?

    python benchmarks/bisect_factors.py

Writes reports/bisect-factors.md.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from math import log2
from pathlib import Path
from typing import Any

import pandas as pd

from parity import recipe as recipes
from parity import resources
from parity.bisect.causes import CauseSearch
from parity.capture.engine import Engine

STEPS = 6
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"]
MIXED = {"data.source": "mixed", "train.batch_size": 4}


def harmless(recipe: recipes.Recipe) -> dict[str, Any]:
    """Changes that make no difference to what is computed."""
    return {
        "model.source": resources.model_dir(recipe.model.source),  # the same files by path
        "data.source": str(resources.data_dir(recipe.data.source)),
        "data.max_length": 1024,
        "seed.data": recipe.seed.value,
        "optim.clip_value": 7.0,
        "train.compile": False,
        "train.gradient_checkpointing": True,
        "decode.max_completion_loss": 0.4,
    }


@dataclass(frozen=True)
class Case:
    """What both share, what is flipped in the subject, and the sets that should be named."""

    flips: dict[str, Any]
    base: dict[str, Any] = field(default_factory=dict)
    sets: tuple[frozenset[str], ...] = ()

    def expected(self) -> set[frozenset[str]]:
        """What a search should name."""
        return set(self.sets) or {frozenset({name}) for name in self.flips}


SINGLES = [
    Case({"model.dtype": "bfloat16"}),
    Case({"model.weights": "bfloat16"}),
    Case({"model.source": "tiny-llama"}),
    Case({"data.source": "mixed"}),
    Case({"data.max_length": 12}),
    Case({"data.pad_multiple": 8}),
    Case({"data.pad_extra": 0}),
    Case({"data.append_eos": False}),
    Case({"seed.value": 1}),
    Case({"seed.placement": "before_load"}),
    Case({"seed.data": 0}, MIXED),
    Case({"lora.rank": 4}),
    Case({"lora.scale": 4.0}),
    Case({"lora.dropout": 0.1}),
    Case({"lora.target_modules": MODULES}),
    Case({"lora.num_layers": 16}),
    Case({"mask.prompt": True}, {"data.source": "chat"}),
    Case({"mask.start_shift": 1}),
    Case({"mask.end_shift": 0}),
    Case({"optim.name": "sgd"}),
    Case({"optim.lr": 1e-3}),
    Case({"optim.betas": [0.9, 0.99]}),
    Case({"optim.eps": 1e-4}),
    Case({"optim.weight_decay": 0.01}),
    Case({"optim.bias_correction": False}),
    Case({"optim.schedule": "linear"}),
    Case({"optim.warmup_steps": 3}),
    Case({"optim.clip": "value"}),
    Case({"train.steps": 4}),
    Case({"train.batch_size": 3}),
    Case({"train.accumulation": 2}),
    Case({"train.accumulation_weighting": "token"}, {**MIXED, "train.accumulation": 2}),
    Case({"decode.max_tokens": 2}),
]
PAIRS = [
    Case(
        {"optim.clip": "value", "optim.clip_value": 0.5},
        {"optim.clip_value": 1e6},
        (frozenset({"optim.clip", "optim.clip_value"}),),
    ),
    Case(
        {"data.pad_multiple": 64, "data.max_length": 2048},
        {"data.max_length": 33},
        (frozenset({"data.pad_multiple", "data.max_length"}),),
    ),
    Case({"lora.scale": 4.0, "optim.weight_decay": 0.01}),
    Case({"mask.end_shift": 0, "lora.num_layers": 16}),
    Case({"optim.eps": 1e-4, "optim.betas": [0.9, 0.99]}),
    Case({"lora.rank": 4, "lora.dropout": 0.1}),
    Case({"seed.placement": "before_load", "data.pad_extra": 0}),
]


def run(engine: Engine, case: Case) -> dict[str, Any]:
    shared = recipes.load("default", [f"train.steps={STEPS}"]).override(case.base)
    changes = {**harmless(shared), **case.flips}
    report = CauseSearch(engine, "mlx", "mlx-lm", shared, changes).search()
    found = {frozenset(cause.factors) for cause in report.causes}
    return {
        "flipped": ", ".join(case.flips),
        "found": " + ".join(" & ".join(sorted(names)) for names in found) or report.verdict,
        "stage": ", ".join(dict.fromkeys(cause.stage for cause in report.causes)),
        "right": found == case.expected() and report.verdict == "found",
        "differing": len(changes),
        "runs": report.runs,
        "allowed": int(log2(len(changes))) + 4,
        "seconds": round(report.seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("reports"))
    options = parser.parse_args()
    tables = {}
    with Engine() as engine:
        for title, cases in (("single factors", SINGLES), ("pairs of factors", PAIRS)):
            rows = []
            for case in cases:
                rows.append(run(engine, case))
                print(rows[-1], flush=True)
            tables[title] = pd.DataFrame(rows)
    text = [
        "# Factors found by bisection",
        "",
        "Made by `python benchmarks/bisect_factors.py`: `mlx` against `mlx-lm` on the tiny Gemma 3. The "
        "flipped factors are what makes them differ; the others differ harmlessly. A run is one recipe "
        "of the subject; log2(differing) + 4 are allowed for one factor.",
    ]
    for title, table in tables.items():
        right, within = int(table.right.sum()), int((table.runs <= table.allowed).sum())
        said = f"{right} of {len(table)} right"
        if title == "single factors":
            said += f"; {within} of {len(table)} within the allowed runs"
        else:
            table = table.drop(columns="allowed")
        text += [
            "",
            f"## {title.capitalize()}",
            "",
            f"{said}.",
            "",
            table.to_markdown(index=False),
        ]
    (options.out / "bisect-factors.md").write_text("\n".join(text) + "\n", encoding="utf-8")
    print("\n".join(text))


if __name__ == "__main__":
    main()
