"""Modules that one side packs and the other does not, or otherwise: proven by packing them alike.

The reference runs once more on a checkpoint that mlx-lm packs module by module as the subject has it. If its
logits are then the subject's, the packing is what makes them differ.
"""

from __future__ import annotations

from parity import resources
from parity.bisect.place import Place
from parity.errors import NO_ANSWER, Unsupported, UsageError
from parity.judge.noise import HEADROOM, distance
from parity.paths import quantized
from parity.recipe import Recipe
from parity.stages.context import Context
from parity.stages.logits import Logits
from parity.stages.settings import packed, same, sentence
from parity.trace import Trace

KEY = "model.quantization"


def packed_otherwise(context: Context, place: Place) -> Place:
    """The place, with the modules first that are packed otherwise where there are any."""
    try:
        sides = context.both("config", context.recipes, Trace())
    except NO_ANSWER:
        return place  # a path that tells no settings
    subject, reference = (trace.scalars for trace in sides)
    if KEY not in subject or KEY not in reference or same(KEY, subject[KEY], reference[KEY]):
        return place
    ours, theirs = packed(subject), packed(reference)
    differing = sorted(n for n in ours.keys() | theirs.keys() if ours.get(n) != theirs.get(n))
    confirmed, words = _packed_alike(context, ours)
    words = f"{sentence(KEY, subject, reference)}; {words}"
    # Which side is off is not told by a float64 run whose weights are packed as the reference's are.
    place.sentence = words if confirmed else f"{words}; {place.sentence}".removesuffix("; ")
    if confirmed and len(differing) == 1:
        place.name = differing[0]
    return place


def _packed_alike(context: Context, modules: dict[str, str]) -> tuple[bool, str]:
    """Whether the reference with the subject's packing agrees with the subject, in words."""
    recipe, rows = context.recipes["reference"], Logits().inputs(context)
    try:
        again = context.capture("reference", "logits", _repacked(recipe, modules), rows)
    except (*NO_ANSWER, UsageError) as error:
        return False, f"whether that is the cause was not confirmed: {error}"
    pair = context.pair("logits", rows)
    left = before = 0.0
    agrees = True
    for name, theirs in pair.reference.arrays.items():
        ours, alike = pair.subject.arrays[name], again.arrays[name]
        before, left = max(before, distance(ours, theirs)), max(left, distance(ours, alike))
        agrees &= distance(ours, alike) <= HEADROOM * pair.noise.floor(name, theirs)
    effect = f"greatest |Δ| of the logits {left:.2g}, before {before:.2g}"
    packing = "with its modules packed as the subject's are, the reference"
    if agrees:
        return True, f"confirmed: {packing} agrees with the subject ({effect})"
    return False, f"not the only cause: {packing} still differs from the subject ({effect})"


def _repacked(recipe: Recipe, modules: dict[str, str]) -> Recipe:
    """The recipe with a checkpoint whose modules are packed as named."""
    model = recipe.model
    if quantized.settings(resources.model_dir(model.source)):
        raise Unsupported("the reference's checkpoint is packed already")
    stored = {"model.quantization": "stored"}
    if not modules:
        return recipe.override(stored)
    mode, bits, size = quantized.parsed(next(iter(modules.values())))
    as_subject = {"model.quantization": mode, "model.bits": bits, "model.group_size": size}
    folder = quantized.made(recipe.override(as_subject), resources.cache(), modules)
    return recipe.override({**stored, "model.source": str(folder)})
