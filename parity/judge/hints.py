"""Known fingerprints of divergences, as sentences with a link.

A hint is drawn from a finished record, captures nothing and never changes a verdict. What it states
was checked by numbers of the record: with the suspected formula the difference is gone (facts named
`left, …`), or a live object was read. What was not checked is a question.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from math import isclose, sqrt

from parity.record import Metric, Record, Side, Verdict

Rule = Callable[[Record], str | None]

NEAR = 0.01  # how exactly a ratio must be met; medians in float32 are good to 1e-4
LARGE = 30_000  # entries from which on a sum over the vocabulary loses digits that show
ADAMW = "https://ml-explore.github.io/mlx/build/html/python/optimizers/_autosummary/mlx.optimizers.AdamW.html"
LOGSUMEXP = "https://github.com/ml-explore/mlx/blob/main/mlx/backend/cpu/logsumexp.cpp"


def hints(record: Record, known: Collection[Rule] = ()) -> list[str]:
    """What a divergence resembles; nothing for any other verdict.

    Args:
        record: A finished record.
        known: Rules whose question has been answered in another way.
    """
    if record.verdict is not Verdict.DIVERGE:
        return []
    return [text for rule in RULES if rule not in known and (text := rule(record))]


def _link(issue: str) -> str:
    """`mlx#1` as an address; GitHub leads from an issue to a pull request of that number."""
    repository, _, number = issue.partition("#")
    owner = "ml-explore" if repository.startswith("mlx") else "unslothai"
    return f"https://github.com/{owner}/{repository}/issues/{number}"


def _diverging(record: Record) -> list[Metric]:
    return [m for m in record.metrics if m.gate and m.verdict is Verdict.DIVERGE]


def _all_of_it(record: Record, kind: str) -> bool:
    """Whether no target differs in another way: else the pattern is a part of something else."""
    return record.facts.get(f"left, {kind}") == 0


def double_bos(record: Record) -> str | None:
    """Chat template and tokenizer each add one; where both sides do so it is no difference."""
    found = [text for text in record.findings if "BOS" in text and "stands twice" in text]
    if len(found) != 1:
        return None
    side = found[0].partition(":")[0]
    link = _link("mlx-examples#1095")
    return (
        f"rows of the {side} begin with BOS twice: do template and tokenizer both add one? ({link})"
    )


def prompt_offset(record: Record) -> str | None:
    """The first supervised position of a row."""
    shift, link = record.facts.get("positions per row at the start", 0), _link("mlx-lm#584")
    if any(metric.name == "prompt offsets" for metric in _diverging(record)):
        return f"prompts end elsewhere: is the turn header counted on one side alone? ({link})"
    if not shift or not _all_of_it(record, "at the start"):
        return None
    return (
        f"the subject supervises {abs(shift):g} {'more' if shift > 0 else 'fewer'} at the start of every "
        f"row, and nothing else differs: is the offset of its prompt mask another? ({link})"
    )


def padding_supervised(record: Record) -> str | None:
    """`steps <= lengths` where `steps < lengths` ends with the row."""
    extra = record.facts.get("positions per row past the end", 0)
    if abs(extra) != 1 or not _all_of_it(record, "past the end"):
        return None
    return (
        f"the {'subject' if extra > 0 else 'reference'} supervises one position past the end of every "
        f"row, whose target is padding, and nothing else differs: does its mask say `steps <= lengths`? "
        f"({_link('mlx-lm#1697')})"
    )


def padding_absent(record: Record) -> str | None:
    """The mask is the same on batches handed over; only rows as wide as their own batch differ."""
    rows = record.facts.get("rows that fill their batch", 0)
    if not rows:
        return None
    return (
        f"the {'subject' if rows > 0 else 'reference'} supervises no position behind the longest row of "
        f"its own batches alone: does it pad to a width without + 1? ({_link('unsloth-zoo#672')})"
    )


def prompt_supervised(record: Record) -> str | None:
    """Targets from the first token of a prompt on."""
    rows = record.facts.get("rows whose prompt is supervised", 0)
    if not rows or not _all_of_it(record, "whose prompt is supervised"):
        return None
    side = "subject" if rows > 0 else "reference"
    return (
        f"the {side} learns the prompts as well, and nothing else differs: has it no prompt mask? "
        f"({_link('mlx-lm#584')})"
    )


def last_token(record: Record) -> str | None:
    """One target less at the end of every row, which is EOS."""
    missing = record.facts.get("positions per row at the last token", 0)
    if not missing or not _all_of_it(record, "at the last token"):
        return None
    return (
        f"the {'subject' if missing < 0 else 'reference'} does not learn the last token of a row, and "
        f"nothing else differs: does its mask say `steps < lengths` over lengths less one? "
        f"({_link('unsloth-zoo#684')})"
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
                f"{window:g}: is what it keeps cut there, or one token early or late? "
                f"({_link('mlx-lm#390')})"
            )
        if turn > 1 and at == start:
            return (
                f"the {side}'s cache is off from the first token of turn {turn:g} on: do positions go on "
                f"where the turn before ended, and is that turn in the cache? "
                f"({_link('mlx-examples#1000')})"
            )
    return None


def silent_cast(record: Record) -> str | None:
    """A dtype that differs, not only how many elements have it."""
    names = ("logits dtype", "LoRA dtype", "dtype.parameters", "dtype.adapter")
    for metric in _diverging(record):
        if metric.name in names and len(set(re.findall(r"b?float\d+", metric.note))) > 1:
            link = _link("unsloth-zoo#670")
            return f"{metric.name}, {metric.note}: are weights cast on one side? ({link})"
    return None


def rope(record: Record) -> str | None:
    """The very first attention goes wrong from the second position on, more so the further right."""
    pattern = r"first bad module: (layers\.0\.self_attn\S*), .*grows with the position"
    match = re.search(pattern, "\n".join(record.findings))
    if not match or record.facts.get("first position off", 1) != 1:
        return None
    return (
        f"{match[1]} is off more the further right the position, and not at the first: are its rope "
        f"settings read, which transformers 5 keeps in rope_parameters? ({_link('mlx-lm#953')})"
    )


def lora_scale(record: Record) -> str | None:
    """With B = 0 only B has a gradient, and it is proportional to the scale."""
    facts, link = record.facts, _link("mlx-examples#1186")
    more = "PEFT multiplies by alpha / rank, mlx-lm by `scale`, 20 by default"
    if (ratio := facts.get("LoRA scale ratio", 1.0)) != 1:
        return f"the subject's LoRA scale is {ratio:.6g}× the reference's: {more} ({link})"
    ratio = facts.get("gradient ratio, B = 0", 1.0)
    # At B = 0 the loss does not depend on the scale.
    same_loss = isclose(facts.get("loss ratio, B = 0", 1.0), 1, rel_tol=NEAR / 10)
    if ratio == 1 or "gradient ratio, B ≠ 0" in facts or not same_loss:
        return None
    return (
        f"at B = 0 the gradient is {ratio:.6g}× the reference's: is its LoRA scale? {more} ({link})"
    )


def last_layers(record: Record) -> str | None:
    """Whole layers at the front have no adapter."""
    fewer = record.facts.get("first layers without LoRA", 0)
    if not fewer:
        return None
    first = f"{'subject' if fewer > 0 else 'reference'} leaves the first {abs(fewer):g} layers"
    return f"the {first} without LoRA, as a last-N default does ({_link('unsloth-zoo#669')})"


def seed_placement(record: Record) -> str | None:
    """Other draws from the same distribution, all settings being equal."""
    uniform = record.facts.get("A is uniform on both sides")
    if not uniform or [metric.name for metric in _diverging(record)] != ["adapter bits"]:
        return None
    return (
        "A is drawn from the same distribution with other bits: is the seed set elsewhere, or does "
        f"something draw between it and the adapter? ({_link('unsloth-zoo#674')})"
    )


def averages_over_padding(record: Record) -> str | None:
    """On given logits the loss is the other's times supervised tokens / all positions, in each case."""
    cases = record.facts.get("cases that average over padding", 0)
    if not cases:
        return None
    one, other = ("subject", "reference") if cases > 0 else ("reference", "subject")
    return (
        f"the {one} averages over padding: on {abs(cases):g} batches of unlike lengths its loss is the {other}'s "
        "times supervised tokens / all positions"
    )


def divisor(record: Record) -> str | None:
    """Loss and gradient are one multiple of the reference's, whatever the adapter."""
    facts, names = (
        record.facts,
        [f"{what} ratio, B {b} 0" for what in ("gradient", "loss") for b in "=≠"],
    )
    ratios = [facts[name] for name in names if name in facts]
    # How far they are from one must be alike, not only what they are.
    if len(ratios) < len(names) or not all(
        isclose(r - 1, ratios[0] - 1, rel_tol=NEAR) for r in ratios
    ):
        return None
    much = f"loss and gradient are {ratios[0]:.6g}× the reference's whatever B is"
    if isclose(ratios[0], facts.get("share of positions supervised", 0.0), rel_tol=NEAR / 10):
        return f"{much}, which is supervised tokens / all positions: does its mean count padding as well?"
    return f"{much}: is its loss divided by another count?"


def clip(record: Record) -> str | None:
    """A gradient of another length or cut off at a bound, or weights that a clip gives."""
    facts = record.facts
    bounds = [value for name, value in facts.items() if name.startswith("gradient bound")]
    norms = [facts.get(f"norm subject, B {b} 0", 0.0) for b in "=≠"]
    theirs = [facts.get(f"norm reference, B {b} 0", 0.0) for b in "=≠"]
    if bounds:
        side = "subject" if bounds[0] > 0 else "reference"
        what = f"no element of the {side}'s gradient exceeds {abs(bounds[0]):.4g}, and clipped there both "
        what += "are alike: a clip by value"
    elif {"gradient ratio, B = 0", "gradient ratio, B ≠ 0"} <= facts.keys():
        # One factor whatever B is tells nothing of a clip, which follows the norm.
        alike = norms[0] and isclose(norms[0], norms[1], rel_tol=1e-4)
        if divisor(record) or not alike or min(theirs) <= norms[0]:
            return None
        what = f"both gradients of the subject have norm {norms[0]:.4g}: a clip by norm"
    elif (first := _in_effect(record, "clip by norm")) and first[0] != first[1]:
        what = _computed(record, "clip by norm", first)
    elif (first := _in_effect(record, "clip by value")) and first[0] != first[1]:
        what = _computed(record, "clip by value", first)
    else:
        return None
    return f"{what} ({_link('unsloth-zoo#662')})"


def _in_effect(record: Record, what: str) -> tuple[float, float] | None:
    """What Adam's formula has on both sides, where it gives the weights of both (`in_effect`)."""
    facts = record.facts
    if any(f"left, {side}" not in facts for side in ("subject", "reference")):
        return None
    return facts[f"subject {what}"], facts[f"reference {what}"]


def _computed(record: Record, what: str, values: tuple[float, float]) -> str:
    side, limit = ("subject", values[0]) if values[0] else ("reference", values[1])
    left = max(record.facts[f"left, {name}"] for name in ("subject", "reference"))
    at, it = f"at {limit:g} in the {side}", "it"
    if record.facts.get(f"{side} clip at any limit"):
        at, it = f"in the {side}, whose limit these weights do not tell", f"one at {limit:g}"
    return f"a {what} {at}: computed again with {it}, {left:.1g} of the difference is left"


def bias_correction(record: Record) -> str | None:
    """Adam's first update is lr · sign(g); without correction, (1 - b1) / sqrt(1 - b2) times that."""
    found = _in_effect(record, "corrects bias")
    if found is None or found[0] == found[1]:
        return None
    name = "reference" if found[0] else "subject"
    ratio = record.facts.get("first update ratio", 1.0)
    much = ratio if name == "subject" else 1 / ratio
    factor = _uncorrected(getattr(record, name))
    which = " = (1 - b1) / sqrt(1 - b2)" if isclose(much, factor, rel_tol=NEAR) else ""
    left = max(record.facts[f"left, {side}"] for side in ("subject", "reference"))
    return (
        f"the {name}'s first update is {much:.3g}× the other's{which}: Adam without bias correction, "
        f"MLX's default; computed again so, {left:.1g} of the difference is left ({_link('mlx#1640')})"
    )


def _uncorrected(side: Side) -> float:
    first, second = side.recipe["optim.betas"]
    return float((1 - first) / sqrt(1 - second))


def weight_decay(record: Record) -> str | None:
    """Decoupled decay moves weights along themselves."""
    found = _in_effect(record, "weight decay")
    if found is None or isclose(*found, rel_tol=NEAR, abs_tol=1e-9):
        return None
    side = "subject" if found[0] > found[1] else "reference"
    left = max(record.facts[f"left, {name}"] for name in ("subject", "reference"))
    return (
        f"the {side} has more weight decay, {max(found):.3g} against {min(found):.3g}: computed again so, "
        f"{left:.1g} of the difference is left; AdamW's default is 0.01 ({ADAMW})"
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
                f"{metric.name} is {far:.1g} off, relatively, at {facts['vocabulary']:,.0f} entries: is it "
                f"MLX's logsumexp on the CPU, numerical accuracy and not logic? ({LOGSUMEXP})"
            )
    return None


RULES: tuple[Rule, ...] = (
    double_bos, silent_cast, rope, prompt_offset, padding_supervised, padding_absent,
    prompt_supervised, last_token, cache, lora_scale, last_layers,
    seed_placement, averages_over_padding, divisor, clip, bias_correction, weight_decay, logsumexp,
)  # fmt: skip
