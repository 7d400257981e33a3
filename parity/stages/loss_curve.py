"""Stage 07: the whole loop, step for step."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import numpy as np

from parity.errors import NO_ANSWER, CaptureError, Unsupported
from parity.judge import noise as noises
from parity.judge.compare import compare_exact, compare_group, compare_series, nothing, series_floor
from parity.judge.noise import Noise, Sources
from parity.names import each
from parity.recipe import Recipe
from parity.record import Metric, Verdict
from parity.stages.context import Comparison, Context
from parity.stages.pair import Extent, Pair
from parity.stages.prompts import decode_inputs
from parity.trace import Array, Trace

HALF_STEPS = 5  # as shipped, where half precision makes a step many times slower on Linux


class LossCurve:
    """Loss and gradient norm from a transplanted init; then each path as it is shipped."""

    number: ClassVar[int] = 7
    name: ClassVar[str] = "loss_curve"
    question: ClassVar[str] = "Does training follow the same curve?"

    def run(self, context: Context) -> Comparison:
        """Compares step for step; what differs as shipped is a finding and no verdict."""
        pair = aligned_training(context)
        a, b = pair.subject, pair.reference
        result = Comparison()
        result.metrics.append(_batches(a, b))
        for key, name in (("loss", "dloss"), ("gradient_norm", "dgrad")):
            ours, theirs = a.arrays[key], b.arrays[key]
            metric = compare_series(key, ours, theirs, pair.noise)
            result.metrics.append(metric.model_copy(update={"name": f"{key} per step"}))
            result.series[f"{key} subject"] = ours.tolist()
            result.series[f"{key} reference"] = theirs.tolist()
            if len(ours) == len(theirs):
                result.series[name] = (ours - theirs).tolist()
                if not pair.noise.exact:  # else bits are compared, and no floor decides
                    floor = series_floor(key, theirs, pair.noise)
                    result.series[f"{name} floor"] = floor.tolist()
        adapters = a.group("adapter"), b.group("adapter")
        noise = pair.noise_of("adapter")
        metric = compare_group("final adapter", *adapters, noise)
        # Adam turns the sign of a vanishing gradient into a full step, so that across frameworks
        # single elements of the adapter say little: there what it adds to each module counts.
        result.metrics.append(metric.model_copy(update={"gate": noise.exact}))
        if not noise.exact:
            start = context.given("lora_init").group("adapter")
            result.metrics.append(final_updates(*adapters, noise, start))
        if across(context) and context.recipe.lora.dropout:
            result.findings.append(
                "trained without dropout: no two frameworks draw the same masks from a seed"
            )
        if across(context):
            result.findings += _decayed(context)
        if context.extent is Extent.RECORD:
            result.metrics.append(self._completion(context, adapters))
            self._shipped(context, result)
        return result

    def _completion(
        self, context: Context, adapters: tuple[dict[str, Array], dict[str, Array]]
    ) -> Metric:
        """Teacher-forced completion loss of each path's own adapter; reported, decided in 08."""
        losses = [
            context.capture(
                side, "decode", context.recipes[side], decode_inputs(context, adapter)
            ).arrays["completion_loss"][:1]
            for side, adapter in zip(("subject", "reference"), adapters, strict=True)
        ]
        gap = float(np.abs(losses[0] - losses[1]).max())
        return Metric(
            name="teacher-forced completion loss",
            verdict=Verdict.IDENTICAL if gap == 0 else Verdict.AGREE,
            value=gap,
            tolerance=float("inf"),
            minimum_required_tolerance=gap,  # reported, not judged
            total=1,
            gate=False,
            note=f"subject {losses[0][0]:.4f}, reference {losses[1][0]:.4f}",
        )

    def _shipped(self, context: Context, result: Comparison) -> None:
        try:
            recipes = {side: context.shipped[side] for side in ("subject", "reference")}
            if any(recipe.model.dtype in ("bfloat16", "float16") for recipe in recipes.values()):
                few = {"train.steps": min(HALF_STEPS, context.recipe.train.steps)}
                recipes = {side: recipe.override(few) for side, recipe in recipes.items()}
            traces = context.both("train", recipes, Trace())
        except NO_ANSWER as error:
            result.findings.append(f"as shipped, the curves were not compared: {error}")
            return
        losses = [trace.arrays["loss"] for trace in traces]
        steps = min(len(loss) for loss in losses)
        gap = losses[0][:steps] - losses[1][:steps]
        result.series["dloss as shipped"] = gap.tolist()
        if gap.any():
            at = int(np.abs(gap).argmax())
            result.findings.append(
                f"as shipped: the loss differs by {abs(gap[0]):.3g} at step 1 and at most by "
                f"{abs(gap[at]):.3g} (step {at + 1} of {steps})"
            )


def _decayed(context: Context) -> list[str]:
    """Says so where weight decay moves a weight otherwise because the two sides store it otherwise."""
    added = context.given("lora_init").scalars.get("offsets")
    if not added or not any(recipe.optim.weight_decay for recipe in context.recipes.values()):
        return []
    return [
        f"{len(added)} weights are stored with a constant between them, such as {next(iter(added))} (probe 04): "
        "weight decay pulls what each side stores to 0, so that it moves them otherwise"
    ]


def final_updates(
    subject: dict[str, Array],
    reference: dict[str, Array],
    noise: Noise,
    start: Mapping[str, Array] | None = None,
) -> Metric:
    """What the final adapter adds to each module, A·B, compared by its norm in float64.

    Of a tensor that is no factor of LoRA it is how far it has moved from the start.

    The floor is how far the reference's is from that of the float64 run and of the perturbed one, by
    the same norm; relative to its size, of the module where this is greatest: a module's error is a
    single draw of what the whole trajectory makes of rounding.
    """
    name = "what the final adapter adds to the weights"
    if subject.keys() != reference.keys():
        return compare_group(name, subject, reference, noise)
    moved_from = dict(start or {})
    ours, theirs = products(subject, moved_from), products(reference, moved_from)
    sizes = {module: float(np.linalg.norm(value)) for module, value in theirs.items()}
    rounded = theirs if noise.rounded_is_reference else products(noise.rounded, moved_from)
    sides = {
        source: (first, products(getattr(noise, field), moved_from))
        for source, field, first in (
            (noises.REFEREE, "referee", rounded),
            (noises.PERTURBED, "perturbed", theirs),
        )
    }
    shares: Sources = {}
    for source, (first, other) in sides.items():
        if theirs.keys() <= first.keys() & other.keys():
            moved = [
                float(np.linalg.norm(first[m] - other[m])) / sizes[m] for m in theirs if sizes[m]
            ]
            shares[source] = np.array(max(moved, default=0.0))
        else:
            shares[source] = noise.absent.get(source, "it holds no such adapter")
    shares[noises.ULP] = np.array(noises.EPS["float32"])
    given = {
        m: {s: v if isinstance(v, str) else v * sizes[m] for s, v in shares.items()} for m in theirs
    }
    apart = {m: np.array([np.linalg.norm(ours[m] - theirs[m])]) for m in theirs}
    none = {m: np.zeros(1) for m in theirs}
    # Being nearer to float64 is no matter of the norm of a difference.
    return compare_group(name, apart, none, replace(noise, given=given, referee={}))


def products(
    adapter: Mapping[str, Array], start: Mapping[str, Array] | None = None
) -> dict[str, Array]:
    """Module → A·B in float64, (in, out); with experts B·A, (experts, out, in).

    Any other tensor is given less what it was at the start.
    """
    found = {}
    for name, value in adapter.items():
        module, _, side = name.rpartition(".")
        if side == "lora_a" and f"{module}.lora_b" in adapter:
            other = adapter[f"{module}.lora_b"].astype(np.float64)
            ours = value.astype(np.float64)
            found[module] = other @ ours if ours.ndim == 3 else ours @ other
        elif side not in ("lora_a", "lora_b"):
            found[name] = value.astype(np.float64) - (start or {}).get(name, 0.0)
    return found


def across(context: Context) -> bool:
    """Whether the two sides are of different frameworks."""
    return context.frameworks["subject"] != context.frameworks["reference"]


def aligned_training(context: Context) -> Pair:
    """Both loops from one adapter; on one order of batches where each would draw its own."""
    return context.pair("train", aligned_inputs(context), aligned_changes(context))


def aligned_changes(context: Context) -> dict[str, float]:
    """No dropout across frameworks: its masks come from generators that no two of them share."""
    return {"lora.dropout": 0.0} if across(context) else {}


def aligned_inputs(context: Context, batches_too: bool = False) -> Trace:
    """What both loops are handed: the adapter, and batches where each would draw its own, or always.

    Where the sizes of batches differ both are handed the larger ones, which a path cuts to its size.
    """
    _ = context.vocabulary  # refuses rows with tokens that the model has not
    inputs = Trace().with_group("adapter", context.given("lora_init").group("adapter"))
    sizes = {recipe.train.batch_size: recipe.train for recipe in context.recipes.values()}
    if batches_too or not context.exact or len(sizes) > 1:
        largest = sizes[max(sizes)]
        batches = _shared_batches(
            context,
            context.recipe.override(
                {
                    "train.batch_size": largest.batch_size,
                    "train.accumulation": largest.accumulation,
                }
            ),
        )
        inputs = inputs.with_group("batches", batches.arrays)
    return inputs


def _shared_batches(context: Context, recipe: Recipe) -> Trace:
    """The batches that both sides are handed: the reference's own, and they do not depend on the subject.

    Where the reference makes no such batches the referee's path does, and only where there is none
    the subject.

    Raises:
        Unsupported: None of them can make the recipe's batches; the reason is the reference's.
    """
    try:
        return context.capture("reference", "batches", recipe, Trace())
    except Unsupported as error:
        for side in ("referee", "subject"):
            with contextlib.suppress(Unsupported, CaptureError):
                return context.capture(side, "batches", recipe, Trace())
        raise error from None


def _batches(a: Trace, b: Trace) -> Metric:
    """Whether both trained on the same ids in the same order."""
    ours, theirs = (list(each(t.group("batches"), "ids")) for t in (a, b))
    if not ours or not theirs:
        return nothing("batches")
    what = "batch"
    if len(ours) != len(theirs):
        what = "row"
        ours, theirs = ([row for batch in side for row in batch] for side in (ours, theirs))
    if len(ours) != len(theirs):
        return compare_exact("batches", np.array([len(ours)]), np.array([len(theirs)]))
    metrics = [
        compare_exact(f"{what} {i + 1}", x, y)
        for i, (x, y) in enumerate(zip(ours, theirs, strict=True))
    ]
    bad = [m for m in metrics if m.verdict is Verdict.DIVERGE]
    top = bad[0] if bad else metrics[0]
    return top.model_copy(
        update={
            "name": "batches",
            "mismatched": sum(m.mismatched for m in metrics),
            "total": sum(m.total for m in metrics),
        }
    )
