"""The contract of a path: inputs and outputs of each method, and the factors that it reads.

This is the only place: the worker checks every call against it, `parity contract` and `parity new-path`
are made from it, and what a path does not implement raises `Unsupported` by it. All arrays are NumPy; names
of tensors are canonical (`layers.3.self_attn.q_proj.lora_a`) and in MLX's orientation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from parity.errors import UsageError
from parity.paths.method import Method
from parity.paths.schema import ArraySpec as array
from parity.paths.schema import ScalarSpec as scalar
from parity.paths.schema import Spec


def _adapter(group: str, meaning: str, together: str = "", rank: str = "r") -> tuple[Spec, ...]:
    """What is trained: LoRA's factors, DoRA's magnitudes, or weights as they are (`lora.kind`).

    Factors of mixtures of experts have one matrix an expert, stored (out, in).
    """
    a, b = (f"(in, {rank}) | (experts, {rank}, in)", f"({rank}, out) | (experts, out, {rank})")
    weights = f"{group}/<weight>"
    return (
        array(f"{group}/<name>.lora_a", a, "float", meaning, together, weights),
        array(f"{group}/<name>.lora_b", b, "float", meaning, together, weights),
        array(weights, "(*S)", "float", f"{meaning}: DoRA's `.m`, or a weight", f"{group} weights"),
    )


def _batches(
    letter: str, together: str = "", prefix: str = "", size: str = "B, W"
) -> tuple[Spec, ...]:
    rows = size.partition(",")[0]
    return (
        array(f"{prefix}ids.{letter}", f"({size})", "int", "token ids of a micro-batch", together),
        array(
            f"{prefix}lengths.{letter}", f"({rows}, 2)", "int",
            "(offset, tokens) of each row: targets before the offset are not supervised", together,
        ),
    )  # fmt: skip


_HANDED = _batches("N", "batches", "batches/")
_TENSORS = "the adapter to start from"
_MODEL = ("model.",)
_ADAPTED = ("model.", "lora.")
_ROWS = ("data.source", "data.max_length", "data.append_eos", "mask.prompt")
_BATCHING = ("data.", "seed.value", "seed.data", "mask.")
_STEP = ("train.compile", "train.gradient_checkpointing", "train.autocast")
_ONE_OR_MANY = "one value, or all where modules disagree"
_NAMES = list[str]
_Number = int | float

_ALL = (
    Method(
        "tokenization", "tokenization", "ids that are trained on, and ids of any text",
        inputs=(
            scalar("texts", _NAMES, "text to encode and decode", length="K"),
            scalar("conversations", list[list[dict[str, str]]], "messages of role and content", length="C"),
        ),
        outputs=(
            array("row.N", "(n)", "int", "a training row as it is trained on"),
            array("offset.N", "()", "int", "first supervised token of the row, 0 for all"),
            array("text.K", "(n)", "int", "a text encoded"),
            array("chat.C", "(n)", "int", "a conversation through the chat template"),
            scalar("decoded", _NAMES, "each text encoded and decoded", length="K"),
            scalar("bos", int | None, "id of the beginning of a sequence"),
            scalar("eos", int | None, "id of its end"),
            scalar("pad", int | None, "id of padding"),
            scalar("vocab_size", int, "size of the vocabulary"),
            scalar("embedded", int, "tokens that the model's configuration has", "embedded"),
        ),
        reads=("model.source", *_ROWS),
    ),
    Method(
        "batches", "", "micro-batches in the order they are trained on",
        outputs=_batches("N"),
        reads=("model.source", *_BATCHING, "train.steps", "train.batch_size", "train.accumulation"),
        ignores=("train.accumulation_weighting",),
    ),
    Method(
        "supervised_positions", "supervised_positions", "which targets the real loss depends on",
        inputs=(*_HANDED, scalar("count", int, "how many micro-batches of its own", "count")),
        outputs=(
            *_batches("N"),
            array(
                "supervised.N", "(K, 3)", "int",
                "(row, position, target id): the loss depends on the logits at input `position`, whose "
                "target is the row's token `position` + 1",
            ),
            scalar("pieces", dict[str, str], "text of each target id"),
        ),
        reads=("model.source", "mask."),
        ignores=("mask.prompt",),
        without={"batches": (*_BATCHING, "train.batch_size")},
    ),
    Method(
        "logits", "logits", "logits of the base model",
        inputs=(
            array("ids.N", "(B, T)", "int", "token ids"),
            scalar("modules", bool, "whether to emit the outputs of modules", "observed"),
            scalar("inputs", bool, "whether to emit their first arguments as well", "arguments"),
            array("replace/<name>", "(...)", "float", "takes the place of that module's output", "replaced"),
            array(
                "replace_input/<name>", "(...)", "float",
                "takes the place of that module's first argument", "replaced arguments",
            ),
        ),
        outputs=(
            array("logits.N", "(B, T, V)", "float", "float32, or float64 from a float64 run"),
            scalar("dtype", str, "dtype of the logits as they are computed"),
            array("module.N/<name>", "(...)", "float", "a module's output", "modules"),
            array("input.N/<name>", "(...)", "float", "a module's first argument", "arguments"),
            scalar("order", _NAMES, "modules in the order of calls", "modules"),
            scalar("events", list[tuple[str, str]], '("in" or "out", module) in their order', "events"),
            scalar("present", _NAMES, "modules that the model has", "events"),
            scalar("called", _NAMES, "modules that it calls", "events"),
        ),
        reads=_MODEL,
    ),
    Method(
        "cross_entropy", "cross_entropy", "the real loss on given logits",
        inputs=(
            array("logits", "(B, T, V)", "float", "logits at each input position"),
            array("ids", "(B, T + 1)", "int", "token ids: the target of position t is ids[t + 1]"),
            array("lengths", "(B, 2)", "int", "(offset, tokens) of each row"),
        ),
        outputs=(
            array("loss", "()", "float", "the reduced loss"),
            array("supervised", "(B, T)", "bool", "whether the loss depends on the logits there"),
            array("targets", "(B, T)", "int", "target id, -1 where nothing is supervised"),
            array("token_loss", "(B, T)", "float", "cross-entropy of each position by itself", "each"),
            scalar("no_token_loss", str, "why there is no `token_loss`", "without each"),
            scalar("tokens", _Number, "supervised tokens as the loss counts them"),
        ),
        reads=("model.source", "model.dtype", "mask."),
        ignores=("mask.prompt",),
    ),
    Method(
        "lora_init", "lora_init", "the adapter before the first step",
        outputs=(
            *_adapter("adapter", "the adapter"),
            scalar("trainable", _NAMES, "canonical names of the trainable tensors"),
            scalar("rank", int | list[int], f"LoRA rank: {_ONE_OR_MANY}"),
            scalar("scale", float | list[float], f"alpha / rank: {_ONE_OR_MANY}"),
            scalar("dropout", float | list[float], f"probability of dropping: {_ONE_OR_MANY}"),
            scalar("kind", str, "what is trained, as `lora.kind` names it", "kind"),
            scalar("layers", list[int], "layers that are trained"),
            scalar("modules", _NAMES, "last parts of the names of the modules", "modules"),
            scalar("dtype", str | _NAMES, f"dtype of the adapter: {_ONE_OR_MANY}"),
            scalar(
                "offsets", dict[str, float],
                "weight to what MLX's has more than the path's own, which was added", "offsets",
            ),
        ),
        reads=(*_ADAPTED, "seed.value", "seed.placement"),
    ),
    Method(
        "gradient", "gradient", "one gradient at a given adapter and batch, before any clip",
        inputs=(
            *_adapter("adapter", _TENSORS),
            *(array(spec.name.removesuffix(".N"), spec.shape, "int", spec.meaning)
              for spec in _batches("N") if isinstance(spec, array)),
            scalar("modules", bool, "whether to emit the gradients at modules", "observed"),
            array(
                "replace/<name>", "(...)", "float",
                "takes the place of the gradient that arrives at that module's output", "replaced",
            ),
        ),
        outputs=(
            array("loss", "()", "float", "the loss"),
            array("norm", "()", "float", "global L2 norm of the gradient"),
            *_adapter("gradient", "gradient of the loss"),
            scalar("tokens", _Number, "supervised tokens as the loss counts them"),
            array(
                "activation/<name>", "(...)", "float",
                "gradient with respect to a module's output; what the model returns is `logits`, a "
                "module's second call `<name>#2`", "modules",
            ),
            array(
                "input/<name>", "(...)", "float",
                "gradient with respect to a module's first argument as far as it goes through the "
                "module", "arguments",
            ),
            scalar("order", _NAMES, "modules in the order of calls", "modules"),
            scalar("own_dropout", float, "greatest dropout of the model's own, off here", "dropout"),
        ),
        reads=(*_ADAPTED, *_STEP, "mask."),
        ignores=("mask.prompt",),
    ),
    Method(
        "optimizer_step", "optimizer_step", "the real clip and optimizer on given weights",
        inputs=(
            array("weight/<name>", "(*S)", "float", "a weight before the first step"),
            array("gradient.N/<name>", "(*S)", "float", "its gradient at step N"),
        ),
        outputs=(array("weight.N/<name>", "(*S)", "float", "the weight after step N"),),
        reads=("optim.",),
    ),
    Method(
        "train", "loss_curve", "the training loop",
        inputs=(*_adapter("adapter", f"{_TENSORS}; else the path's own", "adapter"), *_HANDED),
        outputs=(
            array("loss", "(steps)", "float", "loss of each optimizer step"),
            array("gradient_norm", "(steps)", "float", "global L2 norm before any clip"),
            array("tokens", "(steps)", "number", "supervised tokens of each step"),
            *_adapter("adapter", "the adapter at the end"),
            *_batches("M", "batches", "batches/", "rows, width"),
        ),
        reads=(*_ADAPTED, "mask.", "optim.", "train.", "seed.value"),
        ignores=("mask.prompt",),
        without={"batches": _BATCHING, "adapter": ("seed.placement",)},
    ),
    Method(
        "round_trip", "round_trip", "an adapter saved from the live model, loaded into a fresh one",
        inputs=(
            *_adapter("adapter", "what the live model is given"),
            array("ids", "(B, T)", "int", "token ids"),
        ),
        outputs=(
            array("live", "(B, T, V)", "float", "logits of the live model, in evaluation mode"),
            array("loaded", "(B, T, V)", "float", "logits of the model with the adapter loaded back"),
            # A rank of its own: a loader may get it wrong.
            *_adapter("adapter", "the adapter that the loaded model has", "adapted", rank="s"),
            scalar("scales", dict[str, float], "module to the scale that the loaded model has"),
            scalar("files", _NAMES, "names of the files that were written"),
            scalar("dtype", str | _NAMES, "dtype of the logits as they are computed"),
            scalar(
                "operations", str, "what the live model computes otherwise than the loaded one",
                "operations",
            ),
        ),
        reads=_ADAPTED,
        ignores=("lora.dropout",),
    ),
    Method(
        "train_and_load", "", "an adapter as the trainer leaves it, loaded into a fresh model",
        inputs=(
            *_adapter("adapter", _TENSORS),
            array("ids", "(R, T)", "int", "token ids"),
            *_HANDED,
        ),
        outputs=(
            array("live", "(R, T, V)", "float", "logits of the live model after training"),
            array("loaded", "(R, T, V)", "float", "logits of the model with the adapter loaded back"),
            *_adapter("trained", "the adapter that the live model has", rank="t"),
            *_adapter("adapter", "the adapter that the loaded model has", "adapted", rank="s"),
            scalar("scales", dict[str, float], "module to the scale that the loaded model has"),
            scalar("live_scales", dict[str, float], "module to the scale that the live model has"),
            scalar("files", _NAMES, "names of the files that were written"),
            scalar("dtype", str | _NAMES, "dtype of the logits as they are computed"),
        ),
        reads=(*_ADAPTED, "mask.", "optim.", "train.", "seed.value"),
        ignores=("mask.prompt",),
        without={"batches": _BATCHING},
    ),
    Method(
        "save_adapter", "", "the files that the path's own saver leaves of an adapter",
        inputs=(
            *_adapter("adapter", "what the live model is given"),
            array("ids", "(B, T)", "int", "token ids"),
            scalar("layout", str, "`mlx` or `peft`: the files to write, else the path's own", "layout"),
        ),
        outputs=(
            array("live", "(B, T, V)", "float", "logits of the live model, in evaluation mode"),
            array("files/<name>", "(n)", "int", "bytes of a file"),
            scalar("dtype", str | _NAMES, "dtype of the logits as they are computed"),
        ),
        reads=_ADAPTED,
        ignores=("lora.dropout",),
    ),
    Method(
        "load_adapter", "", "a folder with an adapter, loaded by the path's own loader",
        inputs=(
            array("ids", "(B, T)", "int", "token ids"),
            scalar("folder", str, "where the adapter is"),
            scalar("content", str, "a digest of its files, so that a capture is of these alone"),
        ),
        outputs=(
            array("loaded", "(B, T, V)", "float", "logits with the adapter, in evaluation mode"),
            *_adapter("adapter", "the adapter that the model has", "adapted"),
            array("magnitude/<name>", "(m)", "float", "DoRA's magnitude of a module", "dora"),
            scalar("scales", dict[str, float], "module to the scale that the model has"),
            scalar("dtype", str | _NAMES, "dtype of the logits as they are computed"),
        ),
        reads=_MODEL,
    ),
    Method(
        "fuse", "", "an adapter fused into its base by the path's own fuse, and kept apart",
        inputs=(
            *_adapter("adapter", "what the live model is given", "adapter"),
            array("ids", "(B, T)", "int", "token ids"),
            scalar("folder", str, "in the place of `adapter`: where a saved one is", "saved"),
            scalar("content", str, "a digest of its files", "saved"),
        ),
        outputs=(
            array("base", "(B, T, V)", "float", "logits without an adapter, in evaluation mode"),
            array("apart", "(B, T, V)", "float", "logits with the saved adapter loaded beside its base"),
            array("fused", "(B, T, V)", "float", "logits of the fused model, saved and loaded anew"),
            array(
                "dequantized", "(B, T, V)", "float",
                "the same, fused onto weights that are not quantized again", "quantized",
            ),
            scalar("dtype", str | _NAMES, "dtype of the logits as they are computed"),
        ),
        reads=_ADAPTED,
        ignores=("lora.dropout",),
    ),
    Method(
        "kv_cache", "kv_cache", "a conversation of T tokens with a KV cache and without one",
        inputs=(
            *_adapter("adapter", f"{_TENSORS}; else the base alone", "adapter"),
            array("turn.N", "(n)", "int", "ids of a turn; every second one is a reply"),
            scalar("trim", int, "the turn that is taken back out of the cache"),
        ),
        outputs=(
            array("uncached", "(T, V)", "float", "logits, each turn from a forward over the prefix it ends"),
            array("lengthened", "(T)", "float", "how far these move when the forward goes on to the end"),
            array("prefill", "(T, V)", "float", "each turn at once through one cache"),
            array("steps", "(K, V)", "float", "the path's own generation, the replies forced on it"),
            array("positions", "(K)", "int", "where in the conversation `steps` stand"),
            array("trimmed", "(n, V)", "float", "turn `trim` taken back and fed again", "trimmed"),
            scalar("untrimmed", str, "why the cache cannot be trimmed", "untrimmed"),
            scalar("window", int | None, "sliding window"),
            scalar("caches", _NAMES, "kinds of cache entries"),
            scalar("dtype", str | _NAMES, "dtype of the logits as they are computed", "dtype"),
        ),
        reads=_ADAPTED,
        ignores=("lora.dropout",),
    ),
    Method(
        "decode", "greedy_decode", "greedy decoding with a given adapter",
        inputs=(
            *_adapter("adapter", _TENSORS),
            scalar("prompts", _NAMES, "text to continue", length="P"),
            scalar("expected", str, "the completion that should come"),
        ),
        outputs=(
            array("ids.P", "(n)", "int", "generated ids"),
            array("margin.P", "(n)", "float", "top-1 minus top-2 logit at each of them"),
            array("completion_loss", "(P)", "float", "teacher-forced loss on what is expected"),
            scalar("text", _NAMES, "generated text", length="P"),
            scalar("dtype", str | _NAMES, "dtype of the logits as they are computed", "dtype"),
        ),
        reads=(*_ADAPTED, "decode.max_tokens"),
        ignores=("lora.dropout",),
    ),
    Method(
        "config", "config", "what is really in effect, read back from live objects",
        outputs=(
            array("supervised", "(K, 3)", "int", "(row, position, target id) of the first batch", "mask"),
            scalar("<setting>", Any, "settings in the vocabulary of parity/stages/config.py"),
        ),
        reads=("",),
        ignores=("decode.",),
    ),
    Method(
        "defaults", "", "factors as the path sets them where the user leaves them open",
        inputs=(
            scalar("documented", bool, "whether to give what its documentation says instead", "documented"),
        ),
        outputs=(scalar("<factor>", Any, "value of a factor"),),
    ),
)  # fmt: skip

METHODS: Mapping[str, Method] = {method.name: method for method in _ALL}
"""By name, in the order in which data flows."""
STAGES = tuple(method.stage for method in _ALL if method.stage)
"""Stages that judge a method."""


def table(names: tuple[str, ...] = ()) -> str:
    """The contract as text: all methods, or those that are named.

    Raises:
        UsageError: There is no such method.
    """
    if unknown := [name for name in names if name not in METHODS]:
        raise UsageError(f"unknown method {unknown[0]!r}: give one of {', '.join(METHODS)}")
    return "\n\n".join("\n".join(described(METHODS[name])) for name in names or METHODS)


def described(method: Method) -> list[str]:
    """One method of the table, a line each."""
    lines = [f"{method.name}: {method.summary}", f"  reads {', '.join(_factors(method))}"]
    for what, specs in (("input", method.inputs), ("output", method.outputs)):
        for spec in specs:
            optional = "optional, " if spec.together else ""
            lines.append(f"  {what:6} {spec.described():44} {optional}{spec.meaning}")
    return lines


def _factors(method: Method) -> list[str]:
    own = [f"{name} (without {g})" for g, names in method.without.items() for name in names]
    left_out = [f"not {name}" for name in method.ignores]
    return [*(name or "all factors" for name in method.reads), *own, *left_out] or ["no factor"]
