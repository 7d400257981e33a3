"""Settings found by what a path does: its loop on two micro-batches, its seed by what it draws.

Nothing here knows a framework. What cannot be told is `unknown`, with the reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from parity.errors import Unsupported
from parity.names import each, is_factor
from parity.paths import demands
from parity.paths.protocol import TrainingPath
from parity.recipe import Recipe
from parity.trace import Array, Trace

QUIET, LOUD = 1e-2, 1e4
"""LoRA scales. With B = 0 the gradient of B is proportional to the scale: too short for a clip to
touch it, or longer than any clip allows."""
HALF = ("bfloat16", "float16")
WIDTH = 17
LENGTHS = (4, 9, 15, 6, 12, 3)
"""Tokens of the one row of each micro-batch; they differ, so that weights by token show."""


def unknown(reason: object) -> str:
    """The value of a setting that could not be told."""
    return f"unknown ({reason})"


def known(value: object) -> bool:
    """Whether a setting has a value."""
    return not (isinstance(value, str) and value.startswith("unknown"))


# The loop ----------------------------------------------------------------------------------------


@dataclass
class Calls:
    """Calls of a model's modules while it trains: in a forward pass, and again in the backward pass.

    Those that are called twice within a forward pass are not run again: DoRA calls its factors twice.
    """

    once: set[int] = field(default_factory=set)
    """Trained modules that were called in a forward pass."""
    again: set[int] = field(default_factory=set)
    """Those that were called in a backward pass."""
    compiled: list[bool] = field(default_factory=list)
    """Of each forward pass, whether a compiler traced it."""
    autocast: set[str] = field(default_factory=set)
    """Dtypes that forward passes were cast to, where the framework has such a thing."""
    layer_of: dict[int, int] = field(default_factory=dict)
    """The layer that each module is in, of those that are known to be in one."""

    def facts(self) -> dict[str, Any]:
        """Compilation, gradient checkpointing and autocast.

        With checkpointing a layer is called again in the backward pass. Layers in which nothing is
        trained are not told of: where none below is trained either, they need no backward pass.
        """
        names = ["train.compile", "train.gradient_checkpointing"]
        if self.autocast:
            names.append("train.autocast")
        if not self.once:
            return dict.fromkeys(names, unknown("no forward pass was seen in training"))
        again = bool(self.again) and self._again()
        values = any(self.compiled), again, ", ".join(sorted(self.autocast))
        return dict(zip(names, values, strict=False))

    def _again(self) -> bool | str:
        """Whether all layers are called again, or in words which of them."""
        layers = {self.layer_of[module] for module in self.once if module in self.layer_of}
        run_again = {self.layer_of[module] for module in self.again if module in self.layer_of}
        if layers <= run_again:
            return True
        some = [str(layer) for layer in sorted(run_again)]
        return f"of {len(layers)} layers in {', '.join(some) or 'none'} alone"


def micro_batches(count: int) -> Trace:
    """Batches of one row each, with unlike rows of unlike lengths, as `train` is handed them."""
    rng, inputs = np.random.default_rng(0), Trace()
    for index in range(count):
        length = LENGTHS[index % len(LENGTHS)]
        ids = np.zeros((1, WIDTH), np.int32)
        ids[0, :length] = rng.integers(10, 250, length)
        inputs.arrays[f"batches/ids.{index}"] = ids
        inputs.arrays[f"batches/lengths.{index}"] = np.array([[0, length]], np.int32)
    return inputs


def probing(recipe: Recipe, scale: float, **factors: Any) -> Recipe:
    """One step of plain SGD at rate 1, whose update is the gradient that the optimizer is given."""
    return recipe.override(
        {
            "train.steps": 1,
            "train.batch_size": 1,
            "lora.dropout": 0.0,
            "lora.scale": scale,
            "optim.name": "sgd",
            "optim.lr": 1.0,
            "optim.weight_decay": 0.0,
            "optim.schedule": "constant",
            "optim.warmup_steps": 0,
            "optim.betas": [0.9, 0.999],
            "optim.eps": 1e-8,
            "seed.value": 0,
            "seed.data": None,
            **factors,
        }
    )


def loop_facts(
    path: TrainingPath, recipe: Recipe, watched: AbstractContextManager[Any]
) -> dict[str, Any]:
    """Clip and accumulation of the path's real `train`, from the updates of single steps.

    The update of a step of SGD at rate 1 is a combination of the gradients of its micro-batches; which
    one tells how many there were and what they weigh. At a scale at which the gradient is far too long
    the update shows the clip. Where weights are trained themselves (`lora.kind` full) no scale makes the
    gradient longer: there a clip at more than its own length is not seen.

    Args:
        path: Whose `train` is measured.
        recipe: What it is to carry out.
        watched: Is entered for the length of one training of a step as the recipe has it.
    """
    names = ("clip.mode", "clip.value", "accumulation.steps", "accumulation.weighting")
    try:
        return _loop_facts(path, recipe, watched)
    except Unsupported as error:
        return dict.fromkeys(names, unknown(error))


def _loop_facts(
    path: TrainingPath, recipe: Recipe, watched: AbstractContextManager[Any]
) -> dict[str, Any]:
    parts = recipe.train.accumulation
    half = recipe.model.dtype in HALF or recipe.train.autocast in HALF
    slack = 0.1 if half else 0.01
    quiet = probing(recipe, QUIET, **{"optim.clip": "none"})
    drawn_start = _call(path, "lora_init", quiet, Trace()).group("adapter")
    # Where B is zero the forward pass knows nothing of the scale, and the gradient grows with it.
    start = {n: v * 0 if n.endswith(".lora_b") else v for n, v in drawn_start.items()}
    handed = micro_batches(2 * parts).with_group("adapter", start)
    with watched:
        update, drawn = _update(path, quiet, handed, start)
    gradients, tokens = zip(
        *(_gradient(path, quiet, start, *batch) for batch in drawn), strict=True
    )
    # Weights that are trained themselves have the gradient that they have.
    longer = LOUD / QUIET if any(map(is_factor, start)) else 1.0
    loud = probing(recipe, QUIET * longer, **{"train.accumulation": 1, "train.compile": False})
    one = micro_batches(1).with_group("adapter", start)
    clipped, _ = _update(path, loud, one, start)
    full = {name: value * longer for name, value in gradients[0].items()}
    if not any(value.any() for gradient in gradients for value in gradient.values()):
        raise Unsupported("the gradient at the start of the adapter is zero")
    shares, residual = combination(update, gradients)
    # What a short gradient is multiplied by as well is no clip.
    usual = 1.0 if residual > slack else float(shares.sum())
    mode, limit = clip_of(full, clipped, slack, usual)
    if mode == "none" and longer == 1 and recipe.optim.clip != "none":
        norm = np.sqrt(sum(float((value**2).sum()) for value in full.values()))
        mode = unknown(f"a gradient of norm {norm:.3g} is not clipped, and none is longer")
    if residual > slack:
        steps: Any = unknown("an update of SGD is no sum of the gradients of its micro-batches")
        weighting: Any = steps
    else:
        steps, weighting = weighting_of(shares, tokens, slack)
    facts = {
        "clip.mode": mode,
        "clip.value": _rounded(limit, 2 if half else 5),
        "accumulation.steps": steps,
        "accumulation.weighting": weighting,
    }
    if residual > slack or (steps == 1 and not known(weighting)):
        facts["loss.denominator"] = unknown(
            "it trains on another gradient than that of the loss that it gives for one batch"
        )
    return facts


def _update(
    path: TrainingPath, recipe: Recipe, inputs: Trace, start: Mapping[str, Array]
) -> tuple[dict[str, Array], list[tuple[Array, Array]]]:
    """What one step took off the adapter, and the micro-batches it was made of."""
    trained = _call(path, "train", recipe, inputs)
    stems = (each(trained.arrays, f"batches/{stem}") for stem in ("ids", "lengths"))
    after = trained.group("adapter")
    if not after.keys() >= start.keys():
        raise Unsupported("`train` ends with other tensors than it starts with")
    moved = {name: start[name].astype(np.float64) - after[name] for name in _compared(start)}
    return moved, list(zip(*stems, strict=True))


def _compared(start: Mapping[str, Array]) -> list[str]:
    """LoRA's factors, or else all: DoRA's magnitudes have a gradient that does not grow with the scale."""
    return [name for name in start if is_factor(name)] or list(start)


def _gradient(
    path: TrainingPath, recipe: Recipe, start: Mapping[str, Array], ids: Array, lengths: Array
) -> tuple[dict[str, Array], int]:
    once = recipe.override({"train.accumulation": 1})
    inputs = Trace({"ids": ids, "lengths": lengths}).with_group("adapter", start)
    trace = _call(path, "gradient", once, inputs)
    found = trace.group("gradient")
    gradient = {name: found[name].astype(np.float64) for name in _compared(start)}
    return gradient, int(trace.scalars["tokens"])


def _call(path: TrainingPath, method: str, recipe: Recipe, inputs: Trace) -> Trace:
    """One method of a path, as a worker calls it.

    Raises:
        Unsupported: There is no such method, or a factor would be ignored.
    """
    demands.check(type(path), method, recipe, inputs)
    return path.emit(method, recipe, inputs)


def combination(
    update: Mapping[str, Array], gradients: Iterable[Mapping[str, Array]]
) -> tuple[Array, float]:
    """Least-squares coefficients (k,) of an update in k gradients, and the share it leaves over."""
    columns = np.stack([_flat(gradient, update) for gradient in gradients], axis=1)
    target = _flat(update, update)
    shares = np.linalg.lstsq(columns.T @ columns, columns.T @ target, rcond=None)[0]
    rest, whole = np.linalg.norm(target - columns @ shares), np.linalg.norm(target)
    return shares, float(rest / whole) if whole else 0.0


def _flat(tensors: Mapping[str, Array], names: Iterable[str]) -> Array:
    return np.concatenate([tensors[name].ravel().astype(np.float64) for name in sorted(names)])


def weighting_of(shares: Array, tokens: Iterable[int], slack: float) -> tuple[int | str, str]:
    """Micro-batches of a step, and what they are weighted by: `mean`, `token` or `each in full`.

    Args:
        shares: Coefficient of each micro-batch's gradient in the update, (k,).
        tokens: Supervised tokens of each.
        slack: How exactly they must be met, relatively.
    """
    used = np.abs(shares) > 0.02 * np.abs(shares).max(initial=0.0)
    count = int(used.sum())
    if not count:
        return 0, unknown("the step leaves the adapter as it is")
    shares, seen = shares[used], np.array([*tokens], np.float64)[used]
    if count == 1:
        one = np.isclose(shares[0], 1, rtol=slack)
        return 1, "only one a step" if one else unknown(f"it is multiplied by {shares[0]:.3g}")
    relative = shares / shares.sum()
    if np.allclose(relative, seen / seen.sum(), rtol=slack):
        return count, "token"
    if np.allclose(shares, 1 / count, rtol=slack):
        return count, "mean"
    if np.allclose(shares, 1, rtol=slack):
        return unknown("a step of their sum, or a step for each"), "each in full"
    return count, unknown(f"they count {', '.join(f'{share:.3g}' for share in shares[:4])}")


def clip_of(
    gradient: Mapping[str, Array], given: Mapping[str, Array], slack: float, usual: float = 1.0
) -> tuple[str, float | None]:
    """Clip and limit by which a long gradient became what the optimizer was given.

    Args:
        gradient: The long gradient.
        given: What became of it.
        slack: How exactly a factor must be met, relatively.
        usual: The factor between the two for a short gradient.

    Returns:
        `none`, `norm` (of all tensors), `leaf_norm` (of each) or `value` (of each element), or unknown.
    """
    names = [name for name in gradient if np.any(gradient[name])]
    if not names:
        return unknown("the gradient is zero"), None
    if not all(np.isfinite(given[name]).all() for name in names):
        return unknown("the update of a long gradient is not finite"), None
    factors, rests = {}, {}
    for name in names:
        before, after = gradient[name].ravel(), given[name].ravel()
        factors[name] = float(before @ after / (before @ before))
        rests[name] = float(np.linalg.norm(after - factors[name] * before) / np.linalg.norm(before))
    values = np.array([*factors.values()])
    if all(rest <= slack * abs(factors[name]) for name, rest in rests.items()):
        if np.allclose(values, 1, rtol=slack) or np.allclose(values, usual, rtol=slack):
            return "none", None
        if (values > 1).any():
            return unknown(f"a long gradient becomes {values.max():.3g} times as long"), None
        norms = np.array([np.linalg.norm(given[name]) for name in names])
        if np.allclose(values, values[0], rtol=slack):
            return "norm", float(np.sqrt((norms**2).sum()))
        if np.allclose(norms, norms.max(), rtol=slack):
            return "leaf_norm", float(norms.max())
    limit = max(float(np.abs(given[name]).max()) for name in names)
    if all(
        np.allclose(np.clip(gradient[n], -limit, limit), given[n], rtol=0, atol=slack * limit)
        for n in names
    ):
        return "value", limit
    return unknown("the update of a long gradient follows from no clip that is known"), None


def _rounded(value: float | None, digits: int) -> float | None:
    """A limit as it was meant: implementations add 1e-6 to what they divide by."""
    return None if value is None else float(f"{value:.{digits}g}")


# The seed ----------------------------------------------------------------------------------------


def seed_facts(
    events: Iterable[tuple[str, Any]], without: Any = "unknown (none was seen)"
) -> dict[str, Any]:
    """Value and placement of the seed in effect where the adapter is drawn, and the state after it.

    Args:
        events: `("seed", value)`, `("load", ...)` and `("draw", ...)` in their order.
        without: The placement where no seed was set.
    """
    seen = list(events)
    drawn = [at for at, (what, _) in enumerate(seen) if what == "draw"]
    first = min((at for at, (what, _) in enumerate(seen) if what == "seed"), default=-1)
    # What was drawn before any seed is of a model whose weights were then read.
    nothing = first >= 0 and all(at < first for at in drawn)
    last = len(seen) if nothing else max(drawn, default=len(seen))
    value, placement = unknown("no seed was set before the adapter was drawn"), without
    for what, argument in seen[:last]:
        if what == "seed":
            value, placement = argument, "before_lora"
        elif what == "load" and placement == "before_lora":
            placement = "before_load"
    if nothing:
        placement = "nowhere: nothing is drawn"
    state = [] if nothing else [seen[at][1] for at in drawn[-1:]]
    found = {"seed.value": value, "seed.placement": placement}
    return found | ({"seed.rng": state[0]} if state and state[0] else {})
