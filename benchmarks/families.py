"""What people train, stage by stage: a table of families against mlx-lm and against hf.

    python benchmarks/families.py --out reports/families.md

Each cell is one seed of a few steps. `=` is bit-identical, `≈` within the measured floor; what is neither
stands below the table with its reason. A green cell is about these models, steps and inputs only.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from fixtures.random_models import ARCHITECTURES, architecture
from parity.capture.engine import Engine
from parity.cells.cell import Cell
from parity.cells.run import run_cell
from parity.recipe import Recipe
from parity.record import Record, Verdict
from parity.stages import find

STAGES = {
    "logits": "02",
    "LoRA init": "04",
    "gradient": "05",
    "optimizer": "06",
    "curve": "07",
    "decode": "08",
    "KV cache": "10",
    "round trip": "11",
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
FAMILIES: dict[str, dict[str, Any]] = {
    "quantized Llama, 4 bits": {"model.source": "tiny-llama-4bit"},
    "quantized Llama, 3 bits in groups of 32": {
        "model.source": "tiny-llama", "model.quantization": "affine",
        "model.bits": 3, "model.group_size": 32,
    },
    "mxfp4, elements of 4 bits": {
        "model.source": "tiny-llama", "model.quantization": "mxfp4",
        "model.bits": 4, "model.group_size": 32,
    },
    "mxfp8, elements of 8 bits": {
        "model.source": "tiny-llama", "model.quantization": "mxfp8",
        "model.bits": 8, "model.group_size": 32,
    },
    "nvfp4, elements of 4 bits": {
        "model.source": "tiny-llama", "model.quantization": "nvfp4",
        "model.bits": 4, "model.group_size": 16,
    },
    "mixture of experts, LoRA on attention and experts (down)": {
        "model.source": "tiny-qwen2-moe", "lora.target_modules": [*ATTENTION, "down_proj"],
    },
    "mixture of experts, LoRA on gate and up of experts": {
        "model.source": "tiny-qwen2-moe", "lora.target_modules": ["gate_proj", "up_proj"],
    },
    "hybrid with gated delta networks, LoRA on them and on attention": {
        "model.source": "tiny-qwen3-5",
        "lora.target_modules": [*ATTENTION, "in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj"],
    },
    "hybrid, 4 bits": {
        "model.source": "tiny-qwen3-5", "model.quantization": "affine",
        "lora.target_modules": ["in_proj_qkv", "out_proj", "q_proj", "o_proj"],
    },
    "DoRA": {"lora.kind": "dora"},
    "DoRA on a quantized Llama": {"model.source": "tiny-llama-4bit", "lora.kind": "dora"},
    "all weights": {"lora.kind": "full"},
    "all weights of a mixture of experts": {"model.source": "tiny-qwen2-moe", "lora.kind": "full"},
    "all weights of a hybrid": {"model.source": "tiny-qwen3-5", "lora.kind": "full"},
}  # fmt: skip
RANDOM = {
    "short convolutions and attention (LFM2, random)": "lfm2",
    "selective scan (Mamba, random)": "mamba",
    "state space of one group (Mamba 2, random)": "mamba2",
    "state space of two groups (Mamba 2, random)": "mamba2-two-groups",
    "state space beside attention (Falcon H1, random)": "falcon_h1",
    "layers of two classes (OLMo hybrid, random)": "olmo_hybrid",
}
"""Families whose model is made when it is needed, to its name in `fixtures.random_models`."""
REFERENCES = ("mlx-lm", "hf")
SIGNS = {
    Verdict.IDENTICAL: "=",
    Verdict.AGREE: "≈",
    Verdict.DIVERGE: "✗",
    Verdict.INCONCLUSIVE: "?",
    Verdict.ERROR: "!",
    Verdict.SKIP: "–",
}


def rows(family: str, reference: str, records: dict[str, Record]) -> tuple[str, list[str]]:
    """The row of a family against a reference, and a line for each stage that is not green."""
    signs = " | ".join(SIGNS[records[stage].verdict] for stage in STAGES if stage in records)
    notes = [
        f"- {SIGNS[record.verdict]} {family}, {stage}, `{reference}`: {record.reason.strip()}"
        for stage, record in records.items()
        if not record.verdict.green
    ]
    return f"| {family} | `{reference}` | {signs} |", notes


def table(lines: dict[tuple[str, str], tuple[str, list[str]]], versions: str, steps: int) -> str:
    """The table and what is not green, in Markdown."""
    ordered = [lines[key] for family in (*FAMILIES, *RANDOM) for key in lines if key[0] == family]
    return "\n".join(
        [
            "# Families, stage by stage",
            "",
            f"`python benchmarks/families.py`: path `mlx`, one seed, {steps} steps. {versions}.",
            "`=` equal bits, `≈` within the measured floor, `✗` diverges, `?` inconclusive, `–` refused with a",
            "reason, `!` error. A green cell is about these tiny models and inputs, and promises nothing else.",
            "",
            f"| what is trained | against | {' | '.join(STAGES)} |",
            f"|---|---|{'---|' * len(STAGES)}",
            *(row for row, _ in ordered),
            "",
            "## What is not green",
            "",
            *(note for _, notes in ordered for note in notes),
            "",
        ]
    )


def made(name: str, folder: Path) -> dict[str, Any]:
    """Factors of a random model, which is written into a folder."""
    source = architecture(name, folder / name)
    targets = list(ARCHITECTURES[name].targets)
    return {"model.source": source, "lora.target_modules": targets, "lora.num_layers": -1}


def kept(file: Path) -> dict[tuple[str, str], tuple[str, list[str]]]:
    """Rows and notes of an earlier run, which stay where their family is not run again."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    found = {}
    for family in (*FAMILIES, *RANDOM):
        for reference in REFERENCES:
            row = [line for line in lines if line.startswith(f"| {family} | `{reference}` |")]
            if row:
                notes = [
                    x
                    for x in lines
                    if x[4:].startswith(f"{family}, ") and f", `{reference}`: " in x
                ]
                found[family, reference] = row[0], notes
    return found


def main() -> None:
    """Runs all cells; captures are cached, so that a second run is short."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("reports/families.md"))
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--only", default="", help="words that a family's name has")
    asked = parser.parse_args()
    lines, versions = kept(asked.out), dict[str, str]()
    with Engine(timeout=900) as engine:
        for family in (*FAMILIES, *RANDOM):
            if asked.only not in family:
                continue
            changes = FAMILIES.get(family) or made(RANDOM[family], engine.cache / "random")
            recipe = Recipe().override({"train.steps": asked.steps, "optim.lr": 3e-3, **changes})
            for reference in REFERENCES:
                records: dict[str, Record] = {}
                for stage, number in STAGES.items():
                    cell = Cell(find(number), "mlx", reference, recipe)
                    record = records[stage] = run_cell(engine, cell)
                    for side in (record.subject, record.reference):
                        versions |= side.environment.get("versions", {})
                    sign = SIGNS[record.verdict]
                    print(f"{sign} {stage:10} {reference:7} {family}", file=sys.stderr, flush=True)
                lines[family, reference] = rows(family, reference, records)
                shown = ", ".join(f"{n} {v}" for n, v in sorted(versions.items()) if v)
                asked.out.write_text(table(lines, shown, asked.steps), encoding="utf-8")


if __name__ == "__main__":
    main()
