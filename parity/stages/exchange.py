"""Stage 12: an adapter that the reference saved, loaded by the subject."""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np

from parity import resources
from parity.errors import CaptureError, Unsupported, UsageError
from parity.judge.compare import compare, compare_exact
from parity.judge.noise import Noise
from parity.judge.updates import Updates
from parity.recipe import Recipe
from parity.record import Metric, Verdict
from parity.stages.context import Comparison, Context, measured
from parity.stages.pair import Pair
from parity.stages.round_trip import RoundTrip, effect, loaded_adapter, loaded_logits, own_noise
from parity.trace import Array, Trace

Files = Mapping[str, Array]
"""Name to the bytes of a file."""
Convert = Callable[[Path, str, Path], object]
"""Writes the adapter of a folder in another layout into another folder."""

AS_WRITTEN = "read as the writer saves it"
EXPORTED = "read as the writer exports it for the reader's stack"
CONVERTED = "read after mlx-parity's own conversion, which neither side ships"
WAYS = (AS_WRITTEN, EXPORTED, CONVERTED)
NOT_READ = "not read in any way that was tried"


class Loaded(NamedTuple):
    """What the subject made of files, and on which way it got them."""

    way: str
    files: Files
    trace: Trace


@dataclass(frozen=True)
class Exchange:
    """Is an adapter of the reference the same to the loader of the subject?

    Attributes:
        convert: The last resort where neither side ships a conversion.
    """

    convert: Convert | None = None

    number: ClassVar[int] = 12
    name: ClassVar[str] = "exchange"
    question: ClassVar[str] = "Does an adapter do in the subject what it did in the reference?"

    def run(self, context: Context) -> Comparison:
        """The adapter, the modules it is on, and the logits, against the reference's live model."""
        inputs = RoundTrip().inputs(context)
        pair, result = _saved(context, inputs), Comparison()
        found = self._loaded(context, pair, inputs, result)
        if found is None:
            result.findings.append(NOT_READ)
            return result
        result.findings.append(found.way)
        given = Updates(inputs.group("adapter"), context.recipes["reference"].lora.scale)
        result.metrics += loaded_adapter("subject", given, found.trace, found.files)
        logits = _logits(pair, found.trace)
        result.metrics += [logits, effect(context, "subject", found.trace, inputs)]
        if logits.verdict is Verdict.DIVERGE:
            result.findings += _bases(context, pair, inputs)
        return result

    def _loaded(
        self, context: Context, pair: Pair, inputs: Trace, result: Comparison
    ) -> Loaded | None:
        """The first way that the subject's loader goes without stopping; each stop is a finding.

        Of files that it does not take at all a conversion is tried, not of those that it misreads.
        """
        written = pair.reference.group("files")
        ways: tuple[tuple[str, Callable[[], Files]], ...] = (
            (AS_WRITTEN, lambda: written),
            (EXPORTED, lambda: _exported(context, inputs, other_layout(written))),
            (CONVERTED, lambda: self._converted(written)),
        )
        for way, files in ways:
            try:
                found = files()
                trace = _load(context, found, inputs)
            except (Unsupported, UsageError, CaptureError) as error:
                # Where the files lie in the cache is of no use to anybody.
                text = re.sub(rf"{re.escape(str(_root()))}/\w+", "DIR", str(error))
                result.findings.append(f"not {way}: {' '.join(text.split())}")
                continue
            return Loaded(way, found, trace)
        result.metrics.append(_stopped(result.findings[0]))
        return None

    def _converted(self, files: Files) -> Files:
        if self.convert is None:
            raise Unsupported("mlx-parity's own conversion is not asked for")
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "converted"
            self.convert(unpacked(files), other_layout(files), target)
            return {
                file.name: np.frombuffer(file.read_bytes(), np.uint8)
                for file in sorted(target.iterdir())
            }


def _saved(context: Context, inputs: Trace) -> Pair:
    """What the reference saved. The subject, which only reads, may be unable to save anything."""

    def both(method: str, recipes: Mapping[str, Recipe], handed: Trace) -> tuple[Trace, Trace]:
        trace = context.capture("reference", method, recipes["reference"], handed)
        return trace, trace

    return replace(context, both=both).pair("save_adapter", inputs)


def other_layout(files: Files) -> str:
    """`peft` for files of mlx-lm, `mlx` for those of PEFT."""
    return "peft" if "adapters.safetensors" in files else "mlx"


def unpacked(files: Files) -> Path:
    """A folder with these files, the same for the same bytes."""
    folder = _root() / digest(files)
    for name, values in files.items():
        file = folder / name
        if not file.exists() or file.read_bytes() != values.tobytes():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(values.tobytes())
    return folder


def _root() -> Path:
    return resources.cache().resolve() / "adapters"


def digest(files: Files) -> str:
    """Content hash of files, hex."""
    whole = hashlib.sha256()
    for name in sorted(files):
        whole.update(name.encode())
        whole.update(hashlib.sha256(files[name].tobytes()).digest())
    return whole.hexdigest()[:16]


def _exported(context: Context, inputs: Trace, layout: str) -> Files:
    scalars = {**inputs.scalars, "layout": layout}
    recipe = context.recipes["reference"]
    trace = context.capture("reference", "save_adapter", recipe, Trace(inputs.arrays, scalars))
    return trace.group("files")


def _load(context: Context, files: Files, inputs: Trace) -> Trace:
    scalars = {"folder": str(unpacked(files)), "content": digest(files)}
    handed = Trace({"ids": inputs.arrays["ids"]}, scalars)
    return context.capture("subject", "load_adapter", context.recipes["subject"], handed)


def _logits(pair: Pair, loaded: Trace) -> Metric:
    """The subject with the loaded adapter against the reference that saved it."""
    live = pair.reference.arrays["live"]
    if pair.exact:
        arrays = {"live": live, "loaded": loaded.arrays["loaded"]}
        noise = own_noise("reference", "live", arrays, pair)
        return loaded_logits("subject", loaded, live, noise)
    return loaded_logits("subject", loaded, live, pair.noise, "live")


def _bases(context: Context, pair: Pair, inputs: Trace) -> list[str]:
    """Whether the models differ without an adapter."""
    handed = Trace({"ids.0": inputs.arrays["ids"]}, {"modules": False})
    found = [
        measured(context.capture, side, "logits", context.recipes[side], handed)
        for side in ("subject", "reference")
    ]
    if any(base.trace is None for base in found):
        reason = next(base.reason for base in found if base.trace is None)
        return [f"whether the models differ without an adapter cannot be told: {reason}"]
    ours, theirs = (base.trace.arrays["logits.0"] for base in found if base.trace is not None)
    noise = Noise(exact=True) if pair.exact else pair.noise
    if compare("live", ours, theirs, noise).verdict is Verdict.DIVERGE:
        gap = float(np.abs(ours.astype(np.float64) - theirs).max())
        return [f"the models differ without an adapter as well, by up to {gap:.3g}"]
    return ["without an adapter the models agree"]


def _stopped(text: str) -> Metric:
    metric = compare_exact("loading, subject", np.array([0]), np.array([1]))
    return metric.model_copy(update={"verdict": Verdict.DIVERGE, "note": text})
