"""The first divergent training step, and which part of it is the first to differ.

Compared in this order: the batches, the loss reported against the loss of that step's weights, the
gradient of every micro-batch, what the loop makes of it, the clip, the update, the adapter after the
step. Only the first that differs is named; what could not be compared is listed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from parity.bisect.micro_batches import of_some
from parity.bisect.pattern import tensors
from parity.bisect.place import Place, differs, how_much
from parity.bisect.step_rounding import summed_error, unsettled
from parity.bisect.training_steps import SIDES, NotCompared, TrainingSteps
from parity.errors import NO_ANSWER
from parity.judge.compare import compare_group, compare_series
from parity.judge.noise import EPS, HEADROOM, largest
from parity.record import Metric
from parity.stages.context import Context
from parity.stages.loss_curve import aligned_changes, aligned_inputs
from parity.stages.pair import Pair
from parity.trace import Array, Trace

PLAIN = {
    "optim.name": "sgd", "optim.lr": 1.0, "optim.weight_decay": 0.0, "optim.schedule": "constant",
    "optim.warmup_steps": 0,
}  # fmt: skip
"""One step of it moves weights by exactly their gradient, once it is clipped."""


@dataclass(frozen=True)
class StepDifference:
    """What differs in a step, in words."""

    what: str
    how: str


def step(context: Context) -> Place:
    """The first divergent step and the first part of it that differs."""
    inputs, changes = aligned_inputs(context), aligned_changes(context)
    recipes = {side: recipe.override(changes) for side, recipe in context.recipes.items()}
    context = replace(context, recipes=recipes)
    run = TrainingSteps(context, inputs, context.pair("train", inputs))
    first = _first(run)
    equal: list[str] = []
    missing: list[str] = []
    # The loss of a step shows the weights that the step before left behind.
    for at in range(max(1, first - 1), first + 1):
        equal, missing = [], []
        for what, check in CHECKS:
            try:
                found = check(run, at)
            except (*NO_ANSWER, NotCompared, KeyError) as error:
                missing.append(f"{what} ({error})")
                continue
            if found is not None:
                return Place(_sentence(run, at, found, equal, missing), f"step {at}", "step")
            equal.append(what)
    compared = "no part that was compared differs" if missing else "no part differs"
    sentence = (
        f"the place in the loop could not be found: up to step {first} of {run.steps} {compared}"
    )
    return Place(_also(sentence, equal, missing), "", "step")


def _sentence(
    run: TrainingSteps, at: int, found: StepDifference, equal: list[str], missing: list[str]
) -> str:
    sentence = f"first divergent step {at} of {run.steps}: {found.what} {found.how}"
    if missing and equal:
        sentence += f"; what differs first is between {equal[-1]} and {found.what}"
    return _also(sentence, equal, missing)


def _also(sentence: str, equal: list[str], missing: list[str]) -> str:
    if equal:
        sentence += f"; equal in this step: {', '.join(equal)}"
    return sentence + (f"; not compared: {', '.join(missing)}" if missing else "")


def _first(run: TrainingSteps) -> int:
    """The first step at which anything that both sides recorded differs."""
    found = [run.steps]
    for at in range(1, run.steps + 1):
        try:
            if _batches(run, at):
                found.append(at)
                break
        except NotCompared:
            break
    for key in ("loss", "gradient_norm"):
        ours, theirs = (getattr(run.pair, side).arrays[key] for side in SIDES)
        found.append(compare_series(key, ours, theirs, run.pair.noise).step or run.steps)
    return min(found)


def _batches(run: TrainingSteps, at: int) -> StepDifference | None:
    """Ids and lengths of the micro-batches of a step."""
    counts = {side: len(run.drawn[side]) for side in SIDES}
    if not all(counts.values()):
        raise NotCompared("not recorded")
    try:
        ours, theirs = (run.rows(side, at) for side in SIDES)
    except NotCompared as error:
        detail = ", ".join(f"{count} in the {side}" for side, count in counts.items())
        return StepDifference("the batches", f"differ: {error} ({detail} in all)")
    if len(ours) != len(theirs):
        ours, theirs = ([_joined(rows)] for rows in (ours, theirs))
    for part, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        for name, what in (("ids", "rows"), ("lengths", "lengths of rows")):
            x, y = a.arrays[name], b.arrays[name]
            if np.array_equal(x, y):
                continue
            where = f" of micro-batch {part + 1}" if len(ours) > 1 else ""
            return StepDifference("the batches", f"differ: {_rows(x, y, what)}{where}")
    return None


def _joined(rows: list[Trace]) -> Trace:
    """Micro-batches of one width as one."""
    if len({row.arrays["ids"].shape[1] for row in rows}) > 1:
        raise NotCompared("micro-batches of several widths on one side")
    names = ("ids", "lengths")
    return Trace({name: np.concatenate([row.arrays[name] for row in rows]) for name in names})


def _rows(ours: Array, theirs: Array, what: str) -> str:
    if ours.shape != theirs.shape:
        return f"{what} are {ours.shape} in the subject, {theirs.shape} in the reference"
    off = np.flatnonzero((ours != theirs).any(axis=1))
    same = sorted(map(bytes, ours)) == sorted(map(bytes, theirs))
    order = ", which are the same in another order" if same else ""
    return f"{len(off)} of {len(ours)} {what}{order}, the first at row {off[0]}"


def _reported(run: TrainingSteps, at: int) -> StepDifference | None:
    """The loss that each loop reports against the loss of its own weights before the step."""
    gaps, values = {}, {}
    for side in SIDES:
        reported = float(getattr(run.pair, side).arrays["loss"][at - 1])
        parts = run.gradients(side, run.rows(side, at), run.adapter(side, at - 1))
        losses = [float(part.arrays["loss"]) for part in parts]
        tokens = [part.scalars["tokens"] for part in parts]
        # What a loop reports of several micro-batches is its own choice: either mean will do.
        computed = min(
            (float(np.average(losses, weights=w)) for w in (None, tokens)),
            key=lambda value, reported=reported: abs(value - reported),  # type: ignore[misc]
        )
        gaps[side], values[side] = abs(reported - computed), (reported, computed)
    floor = max(_loss_floor(run, at), EPS["float32"] * abs(values["reference"][0]))
    if not gaps["reference"] <= HEADROOM * floor:
        raise NotCompared("the reference's own is not that of its weights")
    allowed = HEADROOM * max(gaps["reference"], floor)
    if gaps["subject"] <= allowed:
        return None
    reported, computed = values["subject"]
    how = (
        f"differs: the subject reports {reported:.6g}, the loss of its weights and batch of this step is "
        f"{computed:.6g}"
    )
    return StepDifference("the loss that is reported", how + _instead(run, at, reported, allowed))


def _loss_floor(run: TrainingSteps, at: int) -> float:
    rows = run.rows("reference", at)[0].with_group("adapter", run.adapter("reference", at - 1))
    return largest(run.context.pair("gradient", rows).rounding("loss"))


def _instead(run: TrainingSteps, at: int, reported: float, allowed: float) -> str:
    """Which other loss it is that the subject reports, and whether only the report is wrong."""
    if found := of_some(run, at, reported, allowed):
        return found
    before, parts = run.adapter("subject", at - 1), run.parts("subject")

    def loss(rows: list[Trace], adapter: dict[str, Array]) -> float:
        found = run.gradients("subject", rows, adapter)
        return float(np.mean([part.arrays["loss"] for part in found]))

    if at > 1:
        earlier = loss(run.rows("subject", at - 1), run.adapter("subject", at - 2))
        if abs(earlier - reported) <= allowed:
            return f"; it is the loss of step {at - 1}{_norm_agrees(run, at)}"
    for other in range(1, len(run.drawn["subject"]) // parts + 1):
        if other != at and abs(loss(run.rows("subject", other), before) - reported) <= allowed:
            return f"; it is that of the batch drawn for step {other}: the loop trains on that one"
    return _norm_agrees(run, at)


def _norm_agrees(run: TrainingSteps, at: int) -> str:
    try:
        off = _norm(run, at)
    except NotCompared:
        return ""
    if off is None:
        return "; the gradient norm is that of its weights and batch: only the report differs"
    return "; so does the gradient norm: the loop trains on another batch, or from other weights, than these"


def _gradient(run: TrainingSteps, at: int) -> StepDifference | None:
    """Loss and gradient of every micro-batch at the reference's weights."""
    rows, adapter = run.rows("reference", at), run.adapter("reference", at - 1)
    if any(run.context.recipes[side].lora.dropout for side in SIDES):
        raise NotCompared("dropout draws another mask in each run")
    for part, row in enumerate(rows):
        pair = run.context.pair("gradient", row.with_group("adapter", adapter))
        where = f" of micro-batch {part + 1} of {len(rows)}" if len(rows) > 1 else ""
        ours, theirs = pair.subject, pair.reference
        if ours.scalars["tokens"] != theirs.scalars["tokens"]:
            counts = f"{ours.scalars['tokens']} against {theirs.scalars['tokens']}"
            return StepDifference(f"the number of supervised tokens{where}", f"differs: {counts}")
        loss = {"loss": ours.arrays["loss"]}, {"loss": theirs.arrays["loss"]}
        metric = compare_group("loss", *loss, pair.noise)
        if differs(metric):
            return StepDifference(
                f"the loss{where}", f"differs at equal weights: {how_much(metric)}"
            )
        groups = ours.group("gradient"), theirs.group("gradient")
        if detail := _tensors(pair, groups, "gradient"):
            return StepDifference(f"the gradient{where}", f"differs at equal weights: {detail}")
    return None


def _norm(run: TrainingSteps, at: int) -> float | None:
    """The norm that the subject reports over that of its gradient at its own weights; None: alike."""
    ratios, floor = {}, 0.0
    for side in SIDES:
        parts = run.gradients(side, run.rows(side, at), run.adapter(side, at - 1))
        whole = run.whole(side, parts)
        if side == "reference":
            floor = summed_error(whole)
        squares = sum(float((v.astype(np.float64) ** 2).sum()) for v in whole.values())
        reported = float(getattr(run.pair, side).arrays["gradient_norm"][at - 1])
        if not squares or not np.isfinite(reported):
            raise NotCompared(f"the {side} reports no gradient norm")
        ratios[side] = reported / float(np.sqrt(squares))
    gaps = {side: abs(ratio - 1) for side, ratio in ratios.items()}
    if not gaps["reference"] <= HEADROOM * floor:
        raise NotCompared("the reference's own norm is not that of its weights")
    if gaps["subject"] <= HEADROOM * max(gaps["reference"], floor):
        return None
    return ratios["subject"]


def _loop_gradient(run: TrainingSteps, at: int) -> StepDifference | None:
    """The gradient inside the loop: by one step of plain descent at rate 1, then by its norm.

    A norm alone may be off in the report only: that is said where plain descent shows it.
    """
    why = ""
    try:
        for kept in (False, True) if _clips(run) else (False,):
            if found := _descent(run, at, kept):
                return found
    except (*NO_ANSWER, NotCompared, KeyError) as error:
        why = f"the gradient itself was not compared: {error}"
    off = _norm(run, at)
    if off is None:
        if why:
            raise NotCompared(why)
        return None
    how = f"differs: the norm is {off:.6g} times that of the same weights and batch by itself"
    if at == 1 and not why:
        with_and = ", with the clip and without it," if _clips(run) else ""
        how += f"; one step of plain descent at rate 1{with_and} agrees: only the report differs"
        return StepDifference("the gradient norm that is reported", how)
    # What a loop does in a later step alone, a first step from the same weights does not show.
    why = why or "a first step of plain descent from these weights agrees"
    what = "the gradient that the loop makes, or the norm that it reports,"
    return StepDifference(what, f"{how}; {why}")


def _clips(run: TrainingSteps) -> bool:
    return any(run.context.recipes[side].optim.clip != "none" for side in SIDES)


def _descent(run: TrainingSteps, at: int, clipped: bool) -> StepDifference | None:
    """The gradient inside the loop, by one step of plain descent at rate 1, before or after its clip."""
    rows = run.rows("reference", at)
    batches = {f"{key}.{i}": row.arrays[key] for i, row in enumerate(rows) for key in row.arrays}
    inputs = Trace().with_group("adapter", run.adapter("reference", at - 1))
    changes = {**PLAIN, "train.steps": 1} | ({} if clipped else {"optim.clip": "none"})
    pair = run.context.pair("train", inputs.with_group("batches", batches), changes)
    groups = pair.subject.group("adapter"), pair.reference.group("adapter")
    if not (detail := _tensors(pair, groups, "adapter")):
        return None
    how = f"differs at equal weights, by one step of plain descent at rate 1: {detail}"
    if clipped:
        how += "; without a clip that step agrees"
        return StepDifference("the clip inside the loop", how)
    return StepDifference("the gradient that the loop makes", how)


def _clip(run: TrainingSteps, at: int) -> StepDifference | None:
    """The gradient of the step once it is clipped: plain descent moves weights by it."""
    fed = run.fed(at)
    last = Trace().with_group("weight", fed.group("weight"))
    last = last.with_group("gradient.0", fed.group(f"gradient.{at - 1}"))
    pair = run.context.pair("optimizer_step", last, PLAIN)
    groups = pair.subject.group("weight.0"), pair.reference.group("weight.0")
    detail = _tensors(pair, groups, "weight.0")
    return StepDifference("the clip", f"differs on an equal gradient: {detail}") if detail else None


def _update(run: TrainingSteps, at: int) -> StepDifference | None:
    """What clip and optimizer make of equal gradients of all steps up to this one."""
    pair = run.context.pair("optimizer_step", run.fed(at))
    group = f"weight.{at - 1}"
    detail = _tensors(pair, (pair.subject.group(group), pair.reference.group(group)), group)
    return StepDifference("the update", f"differs on equal gradients: {detail}") if detail else None


def _after(run: TrainingSteps, at: int) -> StepDifference | None:
    """The adapter that each loop leaves against what its own optimizer makes of its own gradients."""
    gaps = {}
    for side in SIDES:
        recipe = run.context.recipes[side]
        trace = run.context.capture(side, "optimizer_step", recipe, run.fed(at, side))
        made, left = trace.group(f"weight.{at - 1}"), run.adapter(side, at)
        gaps[side] = {n: np.abs(left[n].astype(np.float64) - made[n]) for n in made}
    scale = max(float(np.abs(v).max(initial=0.0)) for v in run.adapter("reference", at).values())
    open_ = unsettled(run, at)
    beyond = [
        float((v - HEADROOM * open_[n]).max(initial=0.0)) for n, v in gaps["reference"].items()
    ]
    floor = max(EPS["float32"] * scale, *beyond)
    # What is not a number is off.
    off = [n for n, v in gaps["subject"].items() if not (v <= HEADROOM * (floor + open_[n])).all()]
    if not off:
        return None
    worst = max(off, key=lambda n: float(gaps["subject"][n].max()))
    how = (
        f"is not what the subject's own clip and optimizer make of its own gradients: {tensors(off, gaps['subject'])}, "
        f"most {worst}: greatest |Δ| {gaps['subject'][worst].max():.3g}; the reference's is, to {floor:.2g}"
    )
    return StepDifference("the adapter after it", how)


def _tensors(pair: Pair, groups: tuple[dict[str, Array], dict[str, Array]], group: str) -> str:
    """Which tensors differ and how far; empty if none does.

    Against a floor they have to differ as a whole, by their norm, or one of them by far.
    """
    ours, theirs = groups
    if ours.keys() != theirs.keys():
        return f"{len(ours.keys() ^ theirs.keys())} tensors have no like on the other side"
    noise = pair.noise_of(group)
    found: dict[str, Metric] = {
        name: compare_group(name, {name: ours[name]}, {name: theirs[name]}, noise)
        for name in theirs
    }
    # What cancels keeps the rounding of what it was summed from: an ulp of the greatest entry.
    scale = max((float(np.abs(v).max(initial=0.0)) for v in theirs.values()), default=0.0)
    least = 0.0 if pair.exact else HEADROOM * EPS["float32"] * scale
    off = [name for name, metric in found.items() if differs(metric) and not metric.value <= least]
    if not off:
        return ""
    worst = max(off, key=lambda n: found[n].value / (found[n].floor or 1e-300))
    # A tensor of hundreds that is a little over its floor explains no step that differs.
    if not pair.exact and found[worst].value <= HEADROOM**2 * found[worst].floor:
        apart = sum(float(((ours[n].astype(np.float64) - v) ** 2).sum()) for n, v in theirs.items())
        floor = sum(v.size * found[n].floor ** 2 for n, v in theirs.items())
        if apart <= HEADROOM**2 * floor:
            return ""
    return f"{tensors(off, theirs)}, most {worst}: {how_much(found[worst])}"


Check = Callable[[TrainingSteps, int], StepDifference | None]
CHECKS: tuple[tuple[str, Check], ...] = (
    ("the batches", _batches),
    ("the loss that is reported", _reported),
    ("the gradient", _gradient),
    ("the gradient that the loop makes", _loop_gradient),
    ("the clip", _clip),
    ("the update", _update),
    ("the adapter after it", _after),
)
"""In the order in which a step makes them."""
