"""Known fingerprints of divergences, as sentences with a link.

A hint names what has looked like this before. It is drawn from a finished record, captures nothing
and never changes a verdict: whether it is the cause is for a search to confirm.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from math import isclose, sqrt

from parity.record import Metric, Record, Side, Verdict

Rule = Callable[[Record], str | None]

NEAR = 0.01  # how exactly a ratio must be met; medians in float32 are good to 1e-4
LARGE = 30_000  # entries from which on a sum over the vocabulary loses digits that show
ADAMW = "https://ml-explore.github.io/mlx/build/html/python/optimizers/_autosummary/mlx.optimizers.AdamW.html"
LOGSUMEXP = "https://github.com/ml-explore/mlx/blob/main/mlx/backend/cpu/logsumexp.cpp"


def hints(record: Record) -> list[str]:
    """What a divergence resembles; nothing for any other verdict."""
    if record.verdict is not Verdict.DIVERGE:
        return []
    return [said for rule in RULES if (said := rule(record))]


def _link(issue: str) -> str:
    """`mlx#1` as an address; GitHub leads from an issue to a pull request of that number."""
    repository, _, number = issue.partition("#")
    owner = "ml-explore" if repository.startswith("mlx") else "unslothai"
    return f"https://github.com/{owner}/{repository}/issues/{number}"


def _diverging(record: Record) -> list[Metric]:
    return [m for m in record.metrics if m.gate and m.verdict is Verdict.DIVERGE]


def double_bos(record: Record) -> str | None:
    """Chat template and tokenizer each add one; where both sides do so it is no difference."""
    said = [text for text in record.findings if "BOS" in text and "stands twice" in text]
    if len(said) != 1:
        return None
    side = said[0].partition(":")[0]
    return f"the {side} puts BOS twice, as template and tokenizer do ({_link('mlx-examples#1095')})"


def prompt_offset(record: Record) -> str | None:
    """The first supervised position of a row."""
    shift = record.facts.get("positions per row at the start", 0)
    if not shift and all(metric.name != "prompt offsets" for metric in _diverging(record)):
        return None
    more = f"{abs(shift):g} {'more' if shift > 0 else 'fewer'}" if shift else "other positions"
    return (
        f"the subject supervises {more} at the start of every row: the offset of the prompt mask, "
        f"as where the turn header was counted in ({_link('mlx-lm#584')})"
    )


def padding_supervised(record: Record) -> str | None:
    """`steps <= lengths` where `steps < lengths` ends with the row."""
    extra = record.facts.get("positions per row past the end", 0)
    if abs(extra) != 1:
        return None
    return (
        f"the {'subject' if extra > 0 else 'reference'} supervises one position past the end of every "
        f"row, whose target is padding: its mask says `steps <= lengths` ({_link('mlx-lm#1697')})"
    )


def padding_absent(record: Record) -> str | None:
    """The mask is the same on batches handed over; only rows as wide as their own batch differ."""
    rows = record.facts.get("rows that fill their batch", 0)
    if not rows:
        return None
    return (
        f"the {'subject' if rows > 0 else 'reference'} pads to a width without + 1: the longest row "
        f"of a batch has no position behind it ({_link('unsloth-zoo#672')})"
    )


def prompt_supervised(record: Record) -> str | None:
    """Targets from the first token of a prompt on."""
    rows = record.facts.get("rows whose prompt is supervised", 0)
    if not rows:
        return None
    side = "subject" if rows > 0 else "reference"
    return f"the {side} learns the prompts as well: no prompt mask ({_link('mlx-lm#584')})"


def last_token(record: Record) -> str | None:
    """One target less at the end of every row, which is EOS."""
    missing = record.facts.get("positions per row at the last token", 0)
    if not missing:
        return None
    return (
        f"the {'subject' if missing < 0 else 'reference'} does not learn the last token of a row: a "
        f"mask of `steps < lengths` over lengths less one ({_link('unsloth-zoo#684')})"
    )


def cache(record: Record) -> str | None:
    """Where a cache begins to give other logits than no cache."""
    for side in ("subject", "reference"):
        turn, at, start, window = (
            record.facts.get(f"{side} cache: {what}", 0)
            for what in ("turn", "position", "start of the turn", "window")
        )
        if window and window - 1 <= at <= window + 1:
            return (
                f"the {side}'s cache is right up to position {at - 1:g} and its sliding window is "
                f"{window:g}: what it keeps is not cut there, or one token early or late "
                f"({_link('mlx-lm#390')})"
            )
        if turn > 1 and at == start:
            return (
                f"the {side}'s cache is off from the first token of turn {turn:g} on: positions that "
                "do not go on where the turn before ended, or a turn that is not in the cache "
                f"({_link('mlx-examples#1000')})"
            )
    return None


def silent_cast(record: Record) -> str | None:
    """A dtype that differs."""
    for metric in _diverging(record):
        if metric.name in ("logits dtype", "LoRA dtype", "dtype.parameters", "dtype.adapter"):
            link = _link("unsloth-zoo#670")
            return f"{metric.name}, {metric.note}: weights cast in silence look like this ({link})"
    return None


def rope(record: Record) -> str | None:
    """Attention goes wrong from the second position on, more so the further right."""
    pattern = r"first bad module: (layers\.\d+\.self_attn\S*), .*grows with the position"
    match = re.search(pattern, "\n".join(record.findings))
    # A sliding window of another width also spares early positions, but more than the first few.
    if not match or record.facts.get("first position off", 1) > 4:
        return None
    return (
        f"{match[1]} is off more the further right the position, and hardly at the first: rope "
        f"settings, which transformers 5 keeps in rope_parameters ({_link('mlx-lm#953')})"
    )


def lora_scale(record: Record) -> str | None:
    """With B = 0 only B has a gradient, and it is proportional to the scale."""
    ratio = record.facts.get("LoRA scale ratio", 1.0)
    if "gradient ratio, B ≠ 0" not in record.facts:
        ratio = record.facts.get("gradient ratio, B = 0", ratio)
    if ratio == 1:
        return None
    return (
        f"the subject's LoRA scale looks {ratio:.4g}× the reference's: PEFT multiplies by "
        f"alpha / rank, mlx-lm by `scale`, 20 unasked ({_link('mlx-examples#1186')})"
    )


def last_layers(record: Record) -> str | None:
    """Whole layers at the front have no adapter."""
    fewer = record.facts.get("first layers without LoRA", 0)
    if not fewer:
        return None
    first = f"{'subject' if fewer > 0 else 'reference'} leaves the first {abs(fewer):g} layers"
    return f"the {first} without LoRA: a last-N default ({_link('unsloth-zoo#669')})"


def seed_placement(record: Record) -> str | None:
    """Other draws from the same distribution, all settings being equal."""
    uniform = record.facts.get("A is uniform on both sides")
    if not uniform or [metric.name for metric in _diverging(record)] != ["adapter bits"]:
        return None
    return (
        "A is drawn from the same distribution with other bits: the seed is set elsewhere, or "
        f"something draws between it and the adapter ({_link('unsloth-zoo#674')})"
    )


def clip(record: Record) -> str | None:
    """A gradient of another length or cut off at a bound, or updates that show either."""
    facts = record.facts
    bounds = [value for name, value in facts.items() if name.startswith("gradient bound")]
    first, second = (facts.get(f"{update} gap / update", 0) for update in ("first", "second"))
    if bounds:
        side = "subject" if bounds[0] > 0 else "reference"
        what = f"no element of the {side}'s gradient exceeds {abs(bounds[0]):.4g}: a clip by value"
    elif {"gradient ratio, B = 0", "gradient ratio, B ≠ 0"} <= facts.keys():
        what = "the gradients differ by a factor whatever B is: a clip by norm, or a divisor"
    elif facts.get("share below it", 0) > 0.05 and facts.get("share off above it", 0) > 0.5:
        least = facts["least gradient off"]
        what = f"only gradients from {least:.3g} on move weights differently: a clip by value"
    elif second > max(1e-3, 10 * first):
        # Adam's first update does not depend on the length of the gradient, but for eps.
        what = "the first update agrees, the second does not: a clip by norm, or another beta"
    else:
        return None
    return f"{what} ({_link('unsloth-zoo#662')})"


def bias_correction(record: Record) -> str | None:
    """Adam's first update is lr · sign(g); without correction, (1 - b1) / sqrt(1 - b2) times that."""
    ratio = record.facts.get("first update ratio", 1.0)
    for name, seen in (("subject", ratio), ("reference", 1 / ratio)):
        factor = _uncorrected(getattr(record, name))
        if abs(factor - 1) > 5 * NEAR and isclose(seen, factor, rel_tol=NEAR):
            return (
                f"the {name}'s first update is {seen:.3g}× the other's = (1 - b1) / sqrt(1 - b2): "
                f"Adam without bias correction, as MLX's unasked ({_link('mlx#1640')})"
            )
    return None


def _uncorrected(side: Side) -> float:
    if side.recipe.get("optim.name") not in ("adam", "adamw"):
        return 1.0
    first, second = side.recipe["optim.betas"]
    return float((1 - first) / sqrt(1 - second))


def weight_decay(record: Record) -> str | None:
    """What is left between the first updates points along the weights."""
    slope, lr = record.facts.get("first gap / weight", 0.0), record.subject.recipe.get("optim.lr")
    if not lr or abs(record.facts.get("first gap / weight, cosine", 0)) < 0.99:
        return None
    return (
        f"after one step the weights differ by lr × {abs(slope) / lr:.3g} × weight: weight decay, of "
        f"which the {'subject' if slope < 0 else 'reference'} has more; AdamW's unasked is 0.01 ({ADAMW})"
    )


def logsumexp(record: Record) -> str | None:
    """MLX on the CPU keeps one running float32 sum over the vocabulary."""
    facts, environment = record.facts, record.subject.environment
    runs = "mlx" in environment.get("versions", {}) and "cpu" in str(environment.get("device"))
    if not runs or facts.get("vocabulary", 0) < LARGE:
        return None
    for metric in (m for m in _diverging(record) if m.off == "subject"):
        loss = metric.name.startswith(("loss", "reduced loss", "cross-entropy"))
        far = metric.relative if loss else facts.get(f"distance of {metric.name}")
        if far and far < 1e-3:
            return (
                f"{metric.name} is {far:.1g} off, relatively, at {facts['vocabulary']:,.0f} entries: "
                f"MLX's logsumexp on the CPU, numerical accuracy and not logic ({LOGSUMEXP})"
            )
    return None


RULES: tuple[Rule, ...] = (
    double_bos, silent_cast, rope, prompt_offset, padding_supervised, padding_absent,
    prompt_supervised, last_token, cache, lora_scale, last_layers,
    seed_placement, clip, bias_correction, weight_decay, logsumexp,
)  # fmt: skip
