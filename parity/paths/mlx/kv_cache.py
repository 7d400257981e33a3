"""A conversation through a live MLX model, with its KV cache and without one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from parity.names import each
from parity.paths.describe import single
from parity.paths.mlx.live import dtype_name, to_numpy
from parity.trace import Array, Trace


def kv_cache_trace(model: Any, make: Callable[[Any], list[Any]], inputs: Trace) -> Trace:
    """See `parity contract kv_cache`.

    Args:
        model: In evaluation mode, its adapter in place.
        make: Makes a fresh cache for it.
        inputs: `turn.N` (n,) int32; scalar `trim`.
    """
    import mlx.core as mx

    turns = list(each(inputs.arrays, "turn"))
    whole = np.concatenate(turns)
    ends = np.cumsum([len(turn) for turn in turns])

    dtypes: set[str] = set()

    def forward(ids: Array, cache: list[Any] | None = None) -> Array:
        logits = model(mx.array(ids)[None], **({} if cache is None else {"cache": cache}))
        dtypes.add(dtype_name(logits.dtype))
        return to_numpy(logits[0].astype(mx.float32))

    prefixes = [
        forward(whole[:end])[end - len(turn) :] for turn, end in zip(turns, ends, strict=True)
    ]
    uncached = np.concatenate(prefixes)
    cache = make(model)
    trace = Trace(
        {
            "uncached": uncached,
            "lengthened": np.abs(forward(whole) - uncached).max(axis=-1),
            "prefill": np.concatenate([forward(turn, cache) for turn in turns]),
        }
    )
    trace.arrays["positions"], trace.arrays["steps"] = generated(model, make(model), turns)
    trace.scalars = {
        "dtype": single(dtypes),
        "window": getattr(getattr(model, "args", None), "sliding_window", None),
        "caches": sorted({type(entry).__name__ for entry in cache}),
        "untrimmed": trimmed(trace, forward, make(model), turns[: inputs.scalars["trim"] + 1]),
    }
    return trace


def generated(model: Any, cache: list[Any], turns: list[Array]) -> tuple[Array, Array]:
    """Positions (K,) and logits (K, V) of `generate_step`, whose sampler is forced to the replies.

    Each reply is fed back token by token; the last logits before it come from the prompt.
    """
    import mlx.core as mx
    from mlx_lm.generate import generate_step

    positions: list[int] = []
    seen: list[Array] = []

    def keep(_: Any, logits: Any) -> Any:
        seen.append(to_numpy(logits[0].astype(mx.float32)))
        return logits

    start = 0
    for prompt, reply in zip(turns[::2], turns[1::2], strict=True):
        # One step more than is yielded is under way; what it samples goes nowhere.
        forced = iter([*reply.tolist(), 0])
        start += len(prompt)
        count = len(seen)
        for _ in generate_step(
            mx.array(prompt),
            model,
            max_tokens=len(reply),
            sampler=lambda _, forced=forced: mx.array([next(forced)]),
            logits_processors=[keep],
            prompt_cache=cache,
        ):
            pass
        del seen[count + len(reply) :]
        positions += range(start - 1, start - 1 + len(reply))
        start += len(reply)
    return np.array(positions), np.stack(seen)


def trimmed(
    trace: Trace, forward: Callable[..., Array], cache: list[Any], turns: list[Array]
) -> str:
    """Adds `trimmed` (n, V) of the last turn, or returns why the cache cannot be trimmed."""
    from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache

    for turn in turns:
        forward(turn, cache)
    if not can_trim_prompt_cache(cache):
        return "mlx-lm cannot trim it"
    trim_prompt_cache(cache, len(turns[-1]))
    trace.arrays["trimmed"] = forward(turns[-1], cache)
    return ""
