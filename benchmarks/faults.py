"""Faults planted in the real path `mlx`: are they found, at the right stage, with true sentences?

    python benchmarks/faults.py                      # all, against both references; resumes
    python benchmarks/faults.py --only loss,clip     # kinds or names
    python benchmarks/faults.py --report             # tables of what has been run

Each fault (benchmarks/planted/) is searched for as `parity bisect` does it; every claim of the final
sentence is held against what the program that planted the fault knows to be true. Writes
reports/faults.csv and reports/faults.md.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pandas as pd

from benchmarks.planted.registry import Planted, everything
from parity import recipe as recipes
from parity.bisect.causes import CauseSearch
from parity.bisect.locate_backward import FORWARD
from parity.bisect.result import AGREE, FOUND, SearchReport
from parity.capture.engine import Engine
from parity.capture.keys import git_state
from parity.cells.cell import Cell
from parity.cells.run import run_cell
from parity.files import write_atomically
from parity.judge import hints
from parity.record import Record, Verdict
from parity.stages import STAGES, find

STEPS = 6
OBVIOUS = 10.0
"""Floors from which on a fault has to be found."""
MODULE = re.compile(
    r"layers\.\d+(?:\.\w+)*|embed_tokens|(?:(?<=module )|(?<=put of )|(?<=layers, ))norm(?![\w.])|(?<=module )the loss"
)
ORDER = [stage.name for stage in STAGES]
EFFECT = re.compile(
    r"of the adapter's gradients [^;]*|, most [\w.]+: greatest| at [\w./]+ at \([\d, ]*\)"
)
"""Where a fault shows most, which was measured and is no claim of its place."""
STEP = re.compile(r"first divergent step (\d+) of \d+: (.+?)(?: differs?| is not|,? or the norm)")


@dataclass
class Outcome:
    """What was found of one fault against one reference, and whether it is true."""

    name: str
    kind: str
    what: str
    size: str
    model: str
    reference: str
    floors: float
    """Greatest difference over its noise floor at the stage where the fault shows; infinite where
    bits were expected or nothing has a floor."""
    verdict: str
    stage: str
    expected: str
    detected: bool
    stage_right: bool
    place_right: bool
    hints_right: bool
    settings_right: bool
    sentence_right: bool
    wrong: list[str] = field(default_factory=list)
    """Claims that are not true."""
    sentence: str = ""
    runs: int = 0
    seconds: float = 0.0
    code: str = ""
    """Commit that the search was run on."""
    device: str = "cpu"
    """Where MLX computed."""


def floors(record: Record) -> float:
    """How many noise floors the greatest gating difference is away."""
    found = [
        metric.value / metric.floor if metric.floor > 0 else math.inf
        for metric in record.metrics
        if metric.gate and metric.value > 0 and not math.isnan(metric.value)
    ]
    if record.expectation == "identical" and found:
        return math.inf
    return max(found, default=0.0)


def claims(
    fault: Planted,
    report: SearchReport,
    names: Mapping[str, str],
    size: float,
    settings: Iterable[str] = (),
) -> Iterator[tuple[str, bool]]:
    """Each claim of the final sentences in words, and whether it is true.

    Args:
        fault: What is true.
        report: What was found.
        names: Hint to the name of its rule.
        size: Floors that the fault makes at the stage where it shows.
        settings: Those that are said to differ, by their keys.
    """
    for text in report.repeats:
        yield f"repeats: {text}", "repeats" in fault.hints
    for key in settings:
        yield f"setting {key}", key in fault.settings
    for cause in report.causes:
        # What is too small for the stage where it is made may well show at a later one.
        late = bool(fault.stage) and ORDER.index(cause.stage) >= ORDER.index(fault.stage)
        yield f"stage {cause.stage}", late and (size < OBVIOUS or cause.stage == fault.stage)
        for part in cause.parts:
            yield f"part {part}", part in fault.parts
        for factor in cause.factors:
            yield f"factor {factor}", False
        yield from _places(fault, cause.sentence)
        for text in cause.hints:
            name = names.get(text, "of another stage")
            yield f"hint {name}: {text}", name in fault.hints


def layer(name: str) -> int | None:
    """The number of the layer in a name, or in an expression for it."""
    match = re.search(r"layers\.(\d+)", name)
    return int(match[1]) if match else None


def _places(fault: Planted, sentence: str) -> Iterator[tuple[str, bool]]:
    # What a fault does to tensors elsewhere is no claim about its place.
    sentence = EFFECT.sub("", sentence)
    named = set(MODULE.findall(sentence))
    # "Between A and B" is true if one of them is.
    right = any(re.fullmatch(fault.modules, name) for name in named)
    between = "between" in sentence
    # "There, or before it" is true of what is planted no further on.
    start = layer(fault.modules.replace("\\", ""))
    for name in sorted(named):
        before = FORWARD in sentence and start is not None and start <= (layer(name) or 0)
        yield (
            f"module {name}",
            bool(re.fullmatch(fault.modules, name)) or (between and right) or before,
        )
    for step, what in STEP.findall(sentence):
        yield f"step {step}", int(step) in fault.steps
        yield f"what differs first: {what}", bool(re.fullmatch(fault.differs, what))


def run(engine: Engine, fault: Planted, reference: str) -> Outcome:
    """Searches for one fault."""
    recipe = recipes.load("default", [f"train.steps={STEPS}"]).override(
        {"model.source": fault.model, **fault.recipe}
    )
    started = time.perf_counter()
    report = CauseSearch(engine, fault.spec, reference, recipe, {}).search()
    first = next((cause.stage for cause in report.causes), "")
    stopped = next((v.stage for v in report.path if v.verdict not in ("identical", "agree")), "")
    harmless = not fault.stage
    detected = bool(report.causes or report.repeats) or report.verdict not in (AGREE, FOUND)
    shown = find(fault.stage or "loss_curve")
    record = run_cell(engine, Cell(shown, fault.spec, reference, recipe))
    distance = floors(record)
    names = {text: rule.__name__ for rule in hints.RULES if (text := rule(record))}
    config = run_cell(engine, Cell(find("config"), fault.spec, reference, recipe))
    settings = [m.name for m in config.metrics if m.gate and m.verdict is Verdict.DIVERGE]
    checked = list(claims(fault, report, names, distance, settings))
    wrong = [text for text, true in checked if not true]
    return Outcome(
        name=fault.name,
        kind=fault.kind,
        what=fault.what,
        size=fault.size,
        model=fault.model,
        reference=reference,
        floors=distance,
        verdict=report.verdict,
        stage=first or stopped,
        expected=fault.stage,
        detected=detected,
        stage_right=not detected if harmless else (first or stopped) == fault.stage,
        place_right=not any(w.startswith(("module", "part", "step", "factor")) for w in wrong),
        hints_right=not any(w.startswith("hint") for w in wrong),
        settings_right=not any(w.startswith("setting") for w in wrong),
        sentence_right=not wrong and (not detected if harmless else detected),
        wrong=wrong,
        sentence=" / ".join(cause.sentence for cause in report.causes) or report.reason,
        runs=report.runs,
        seconds=time.perf_counter() - started,
        code=git_state(),
        device=device_of(config),
    )


def device_of(record: Record) -> str:
    """`cpu` or `gpu`, of the subject's `Device(gpu, 0)`."""
    made_on = str(record.subject.environment.get("device", ""))
    return made_on.removeprefix("Device(").partition(",")[0]


def ordered(faults: Iterable[Planted]) -> Iterator[tuple[Planted, str]]:
    """Each fault against one of its references, in turn, before any against its other one."""
    rest = []
    for index, fault in enumerate(faults):
        first = index % len(fault.references)
        yield fault, fault.references[first]
        rest += [(fault, other) for at, other in enumerate(fault.references) if at != first]
    yield from rest


def table(outcomes: list[Outcome]) -> pd.DataFrame:
    """One row a fault and reference."""
    return pd.DataFrame([asdict(outcome) for outcome in outcomes])


def share(values: pd.Series) -> str:
    """`12 of 13`."""
    return f"{int(values.sum())} of {len(values)}"


def markdown(rows: pd.DataFrame) -> str:
    """The score, by kind and fault by fault."""
    faults, clean = rows[rows.kind != "harmless"], rows[rows.kind == "harmless"]
    obvious = faults[faults.floors >= OBVIOUS]
    found = faults[faults.detected]
    where = rows.groupby(["device", "code"], sort=False).size()
    pairs = sum(len(fault.references) for fault in everything())
    lines = [
        "# Planted faults",
        "",
        "Made by `python benchmarks/faults.py`. Each fault stands in the real path `mlx` on a tiny "
        f"model and is searched for as `parity bisect` does it, {STEPS} training steps, one seed. Each "
        "claim of the final sentences is held against what the program that planted the fault knows: "
        "stage, part, module, step, what differs first in it, hint, settings. Where a sentence was right and that "
        "knowledge was not (a fault that shows a stage earlier, a harmless variant that is none), the "
        "knowledge was corrected and the search was run again.",
        "",
        f"- Pairs of fault and reference: {pairs}; run: {len(rows)}: "
        + ", ".join(f"{count} on a {device} ({code})" for (device, code), count in where.items()),
        f"- Searches: {len(rows)}, {len(faults)} for faults and {len(clean)} for harmless variants; "
        f"{(rows.reference == 'mlx-lm').sum()} against mlx-lm, {(rows.reference == 'hf').sum()} against hf",
        f"- Faults at {OBVIOUS:g} floors and more that are detected: {share(obvious.detected)}; at the "
        f"right stage: {share(obvious.stage_right)}",
        f"- Sentences of detected faults that are right as a whole: {share(found.sentence_right)}",
        f"- Places right: {share(found.place_right)}; hints right: {share(found.hints_right)}; "
        f"settings that probe 00 says differ: {share(rows.settings_right)} right",
        f"- False alarms on harmless variants: {share(clean.detected)}",
        f"- Seconds a search: median {rows.seconds.median():.0f}, greatest {rows.seconds.max():.0f}",
        "",
        "## By kind",
        "",
    ]
    by_kind = rows.groupby("kind", sort=False)[
        [
            "detected",
            "stage_right",
            "place_right",
            "hints_right",
            "sentence_right",
        ]
    ].agg(share)
    lines += [
        by_kind.to_markdown(),
        "",
        "## The smallest fault of each kind that is still found",
        "",
    ]
    smallest = found[found.floors < math.inf].sort_values("floors").groupby("kind").first()
    lines += [smallest[["name", "size", "reference", "floors"]].to_markdown(floatfmt=".3g"), ""]
    lines += ["## Not found, at the wrong stage, or with a claim that is not true", ""]
    bad = rows[~rows.sentence_right | ~rows.stage_right]
    for _, row in bad.iterrows():
        why = "; ".join(row.wrong) or ("not detected" if not row.detected else f"at {row.stage}")
        lines.append(
            f"- **{row['name']}** ({row['size'] or 'one size'}, {row.model} against {row.reference}, "
            f"{row.floors:.3g} floors): {why}"
        )
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="kinds or names, separated by commas")
    parser.add_argument("--reference", default="", help="one reference only")
    parser.add_argument("--jobs", type=int, default=2, help="searches that run at once")
    parser.add_argument("--report", action="store_true", help="run nothing, write the tables")
    parser.add_argument("--out", type=Path, default=Path("reports"))
    options = parser.parse_args()
    ledger = options.out / "faults.jsonl"
    ledger.parent.mkdir(parents=True, exist_ok=True)
    lines = ledger.read_text(encoding="utf-8").splitlines() if ledger.exists() else []
    outcomes = [Outcome(**json.loads(line)) for line in lines]
    done = {(outcome.name, outcome.reference) for outcome in outcomes}
    wanted = set(filter(None, options.only.split(",")))
    todo = [
        (fault, reference)
        for fault, reference in ordered(everything())
        if (fault.name, reference) not in done
        and (not wanted or {fault.name, fault.kind} & wanted)
        and options.reference in ("", reference)
    ]
    if not options.report:
        with (
            Engine(log_dir=options.out / "logs", timeout=300) as engine,
            ledger.open("a") as file,
            ThreadPoolExecutor(options.jobs) as pool,
        ):
            searches = {pool.submit(run, engine, *item): item for item in todo}
            for index, search in enumerate(as_completed(searches)):
                fault, reference = searches[search]
                outcome = search.result()
                outcomes.append(outcome)
                file.write(json.dumps(asdict(outcome)) + "\n")
                file.flush()
                mark = "✓" if outcome.sentence_right and outcome.stage_right else "✗"
                print(f"[{index + 1}/{len(todo)}] {mark} {fault.name} against {reference}, "
                      f"{outcome.seconds:.0f} s: {outcome.sentence[:160]} {outcome.wrong or ''}",
                      flush=True)  # fmt: skip
    rows = table(outcomes)
    rows.drop(columns=["sentence", "what"]).to_csv(options.out / "faults.csv", index=False)
    write_atomically(options.out / "faults.md", markdown(rows).encode())
    print(markdown(rows))


if __name__ == "__main__":
    main()
