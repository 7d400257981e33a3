"""Stage 00: what each path will really do, read back from its live objects or measured.

The settings are scalars that `config` emits, named in `parity.stages.settings.TITLES`. By layer:
`rope.frequencies` [[radians a position]], `rope.width`, `rope.attention_scaling`, `rope.kind`.
`dtype.parameters` and `dtype.adapter` are {dtype: elements}, `dtype.activations` {dtype: modules},
`optim.lr` is [per step], `mask.supervised` [per row], `batch.shapes` and `batch.rows` [per micro-batch].
What is not compared but shown: `rope.configuration`, `lora.parameters`, `lora.names`; `lora.without`, modules
that the recipe names and that have no adapter where others have. Array
`supervised` (K, 3) holds (row, position, target id) in the first batch. `unknown (reason)` is the value
of a setting that a path cannot tell.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

from parity.errors import NO_ANSWER
from parity.judge.compare import nothing
from parity.paths.measured import known
from parity.recipe import factor_names
from parity.record import Metric, Verdict
from parity.stages.context import Comparison, Context
from parity.stages.pair import Extent
from parity.stages.settings import BATCHES, INTERNAL, TITLES, Settings, same, sentence, short
from parity.trace import Trace

COMPARED = "settings compared"


class Config:
    """The effective configuration: under the recipe (decides) and as shipped (is reported)."""

    number: ClassVar[int] = 0
    name: ClassVar[str] = "config"
    question: ClassVar[str] = "Do both do what the recipe says, and what does each do by default?"

    def run(self, context: Context) -> Comparison:
        """Compares settings, not arrays: a difference is a sentence."""
        a, b = (trace.scalars for trace in context.both("config", context.recipes, Trace()))
        result = Comparison()
        # Without bit-identity batches are handed over, so their order and width decide nothing.
        aside: tuple[str, ...] = () if context.exact else BATCHES
        if len(set(context.frameworks.values())) > 1:
            aside += INTERNAL
        lacking = []
        for key in TITLES:
            gate = key not in aside
            missing = absent(key, a, b)
            if missing:
                lacking += [key] if gate else []
                metric = nothing(key).model_copy(update={"gate": gate, "note": missing})
            else:
                equal = same(key, a[key], b[key])
                metric = _metric(key, equal, gate, "" if equal else sentence(key, a, b))
            result.metrics.append(metric)
        gates = len(TITLES) - len(aside)
        result.metrics.insert(0, _compared(gates, lacking, a, b))
        result.findings += self._dropped(context, a, b)
        if context.extent is Extent.RECORD:
            result.findings += self._shipped(context)
        return result

    def _dropped(self, context: Context, *sides: Settings) -> list[str]:
        """What the recipe says and is not in effect: a setting that was dropped without a word."""
        found = []
        for side, settings in zip(("subject", "reference"), sides, strict=True):
            factors = context.recipes[side].active()
            for factor, key in REQUESTED.items():
                if factor not in factors or (key in INTERNAL and context.frameworks[side] != "mlx"):
                    continue
                wanted, real = factors[factor], settings.get(key)
                if real is not None and known(real) and not same(key, wanted, real):
                    found.append(
                        f"{side}: the recipe has {factor}={short(wanted)}, "
                        f"{short(real)} is in effect"
                    )
            found += _without_adapter(side, settings)
        return found

    def _shipped(self, context: Context) -> list[str]:
        try:
            traces = context.both("config", context.shipped, Trace())
        except NO_ANSWER as error:
            return [f"as shipped, the settings were not compared: {error}"]
        a, b = (trace.scalars for trace in traces)
        aside = () if len(set(context.frameworks.values())) == 1 else INTERNAL
        return [
            f"as shipped: {sentence(key, a, b)}"
            for key in TITLES
            if key not in aside and not absent(key, a, b) and not same(key, a[key], b[key])
        ]


def _without_adapter(side: str, settings: Settings) -> list[str]:
    """Modules with the name of a target that are left as they are, by name and kind."""
    kinds: dict[str, list[str]] = {}
    for name in settings.get("lora.without", []):
        kinds.setdefault(re.sub(r"^layers\.\d+\.", "", name), []).append(name)
    return [
        f"{side}: lora.target_modules has {kind.rpartition('.')[2]}, and {kind} has no adapter in "
        f"{len(names)} layers that have one elsewhere, such as {names[0]}"
        for kind, names in kinds.items()
    ]


def absent(key: str, a: Settings, b: Settings) -> str:
    """Which side has no value of a setting and what the other has; empty where both have one."""
    parts, missing = [], False
    for side, settings in (("subject", a), ("reference", b)):
        if key not in settings:
            parts.append(f"not reported by the {side}")
        else:
            parts.append(f"{short(settings[key])} in the {side}")
        missing |= key not in settings or not known(_one(settings[key]))
    return f"{TITLES[key]}: {', '.join(parts)}" if missing else ""


def _one(value: Any) -> Any:
    """A value, or of several the first that is not known."""
    if isinstance(value, (list, tuple)):
        return next((v for v in value if not known(v)), value)
    return value


OTHER_FORM = ("optim.lr", "model.quantization")
"""Settings that say more than the factor of their name: the rate of each step, each module's packing."""
OTHER_NAME = {
    "optim.clip": "clip.mode",
    "train.accumulation": "accumulation.steps",
    "train.accumulation_weighting": "accumulation.weighting",
}
REQUESTED = {
    **{name: name for name in factor_names() if name in TITLES and name not in OTHER_FORM},
    **OTHER_NAME,
}
"""A factor → the setting that has its value where the recipe is in effect."""


def _compared(count: int, lacking: list[str], a: Settings, b: Settings) -> Metric:
    """How many of the settings that decide were compared."""
    done = count - len(lacking)
    note = f"{done} of {count} settings were compared"
    if lacking:
        note += f"; {absent(lacking[0], a, b)}"
        if rest := lacking[1:]:
            note += f"; nor {', '.join(rest[:6])}{', …' if len(rest) > 6 else ''}"
    metric = _metric(COMPARED, True, True, note)
    update = {"total": count, "mismatched": len(lacking), "value": float(len(lacking))}
    if lacking:
        update |= {"verdict": Verdict.INCONCLUSIVE, "where": COMPARED}  # type: ignore[dict-item]
    return metric.model_copy(update=update)


def _metric(key: str, equal: bool, gate: bool, note: str) -> Metric:
    return Metric(
        name=key,
        verdict=Verdict.IDENTICAL if equal else Verdict.DIVERGE,
        value=0.0 if equal else 1.0,
        tolerance=0.0,
        minimum_required_tolerance=0.0 if equal else float("inf"),
        mismatched=0 if equal else 1,
        total=1,
        where="" if equal else key,
        gate=gate,
        note=note,
    )
