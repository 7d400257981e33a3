"""What a trained model is asked to continue: the same wherever it is asked, so that it is decoded once."""

from __future__ import annotations

from parity.stages.context import Context
from parity.trace import Array, Trace

LONG = 96
"""Tokens that the long prompt has at least: beyond the sliding windows (64) of the tiny models."""


def decode_inputs(context: Context, adapter: dict[str, Array]) -> Trace:
    """The recipe's prompts, a long one, and the expectation, with an adapter."""
    decode = context.recipe.decode
    prompts = [*decode.prompts, long_prompt(context)]
    scalars = {"prompts": prompts, "expected": decode.expected}
    return Trace(scalars=scalars).with_group("adapter", adapter)


def long_prompt(context: Context) -> str:
    """As many repeats of the first prompt and its completion as make `LONG`, and the start of one more.

    It ends inside the completion: after a bare prompt an untrained adapter ends at once.
    """
    decode = context.recipe.decode
    unit = f"{decode.prompts[0]}{decode.expected} "
    texts = Trace(scalars={"texts": [unit], "conversations": []})
    tokens = max(1, len(context.given("tokenization", texts).arrays["text.0"]) - 2)  # BOS and EOS
    first = decode.expected.split()[0]
    start = decode.expected[: decode.expected.index(first) + len(first)]
    return unit * -(-LONG // tokens) + decode.prompts[0] + start
