"""A conversation through a live transformers model, with its KV cache and without one."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

from parity.names import each
from parity.paths.hf.live import ids_tensor, to_numpy, without_adapter
from parity.paths.hf.readback import dtype_name
from parity.trace import Array, Trace


def kv_cache_trace(model: Any, make: Callable[[Any], Any], inputs: Trace) -> Trace:
    """See `parity contract kv_cache`.

    Args:
        model: A PeftModel in evaluation mode.
        make: Makes a fresh cache for it, or None for the one that transformers makes by itself.
        inputs: `turn.N` (n,) int32; scalar `trim`.
    """
    import torch

    turns = list(each(inputs.arrays, "turn"))
    whole = np.concatenate(turns)
    ends = np.cumsum([len(turn) for turn in turns])

    def forward(ids: Array) -> Array:
        return _logits(model(input_ids=ids_tensor(ids[None]), use_cache=False).logits)

    with torch.no_grad():
        prefixes = [
            forward(whole[:end])[end - len(turn) :] for turn, end in zip(turns, ends, strict=True)
        ]
        uncached = np.concatenate(prefixes)
        prefill, cache = fed(model, turns, make(model))
        trace = Trace(
            {
                "uncached": uncached,
                "lengthened": np.abs(forward(whole) - uncached).max(axis=-1),
                "prefill": prefill,
            }
        )
        trace.arrays["positions"], trace.arrays["steps"] = generated(model, make(model), turns)
        layers = list(getattr(cache, "layers", ()))
        trace.scalars = {
            "dtype": dtype_name(forward_dtype(model, whole)),
            "window": getattr(model.config.get_text_config(), "sliding_window", None),
            "caches": sorted({type(part).__name__ for part in layers or [cache]}),
            "untrimmed": trimmed(trace, model, make(model), turns[: inputs.scalars["trim"] + 1]),
        }
    return trace


def forward_dtype(model: Any, ids: Array) -> Any:
    """The dtype of the model's own logits."""
    return model(input_ids=ids_tensor(ids[None, :1]), use_cache=False).logits.dtype


def _cache_name(model: Any) -> str:
    """What the model calls its cache: models that are nothing but a state space call it by another name."""
    forward = inspect.signature(without_adapter(model).forward)
    return "cache_params" if "cache_params" in forward.parameters else "past_key_values"


def _logits(values: Any) -> Array:
    return to_numpy(values[0].float())


def fed(model: Any, turns: list[Array], cache: Any) -> tuple[Array, Any]:
    """Logits (T, V) of turns fed one after the other, and the cache they went through."""
    logits, name = [], _cache_name(model)
    for turn in turns:
        output = model(input_ids=ids_tensor(turn[None]), use_cache=True, **{name: cache})
        cache = getattr(output, name)
        logits.append(_logits(output.logits))
    return np.concatenate(logits), cache


def generated(model: Any, cache: Any, turns: list[Array]) -> tuple[Array, Array]:
    """Positions (K,) and logits (K, V) of `generate`, which is forced to the replies."""
    import torch
    from transformers import GenerationConfig

    positions: list[int] = []
    seen: list[Array] = []
    whole = np.concatenate(turns)
    start = 0
    for prompt, reply in zip(turns[::2], turns[1::2], strict=True):
        start += len(prompt)
        end = start + len(reply)

        def force(ids: Any, scores: Any) -> Any:
            only = torch.full_like(scores, -torch.inf)
            only[:, int(whole[ids.shape[1]])] = 0
            return only

        # No reply ends early: -1 is no token. Whatever is left open comes from the model's config.
        config = GenerationConfig(
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            max_new_tokens=len(reply),
            eos_token_id=-1,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
        ids = ids_tensor(whole[None, :start])
        output = model.generate(
            input_ids=ids,
            attention_mask=ids.new_ones(ids.shape),
            generation_config=config,
            logits_processor=[force],
            **({} if cache is None else {_cache_name(model): cache}),
        )
        cache = output.past_key_values
        seen += [_logits(logits) for logits in output.logits]
        positions += range(start - 1, end - 1)
        start = end
    return np.array(positions), np.stack(seen)


def trimmed(trace: Trace, model: Any, cache: Any, turns: list[Array]) -> str:
    """Adds `trimmed` (n, V) of the last turn, or returns why the cache cannot be trimmed."""
    _, cache = fed(model, turns, cache)
    try:
        cache.crop(-len(turns[-1]))
    except (RuntimeError, ValueError, AttributeError, NotImplementedError) as error:
        return f"transformers cannot crop it: {error}"
    trace.arrays["trimmed"], _ = fed(model, [turns[-1]], cache)
    return ""
