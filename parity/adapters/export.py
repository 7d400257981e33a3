"""A GGUF export against the model that it was made from: names, settings, values, and what a reader makes of it.

Which values a file has to hold is a convention of its architecture, in llama.cpp's
convert_hf_to_gguf.py. It is claimed here of architectures for which a test holds it against a real reader,
whose logits are then those of the model bit for bit; of others no layout is claimed. What a file really
holds is found by trying.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from parity.adapters import gguf_file
from parity.adapters.artefact import Finding
from parity.adapters.base import Base, read_base
from parity.adapters.gguf_file import Exported
from parity.adapters.loading import logits
from parity.adapters.outcome import Outcome
from parity.capture.engine import Engine
from parity.errors import UsageError
from parity.judge.updates import named
from parity.trace import Array

READER = "hf"
"""The path whose GGUF reader is asked: transformers'."""
NO_MODEL = "needs --against, the folder of the model that was exported"
KEYS = "Has it the tensors of the model, and no others?"
SETTINGS = "Are its settings those of the model's config.json?"
VALUES = "Does each tensor hold the model's values, as its architecture wants them?"
LOGITS = "Do its values give the same logits under its settings and under the model's config.json?"
_SETTINGS = {
    "block_count": "num_hidden_layers", "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size", "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps", "rope.freq_base": "rope_theta",
    "context_length": "max_position_embeddings",
}  # fmt: skip
AS_IT_IS, PERMUTED, RAISED = "as it is", "with the rows of each head permuted", "with 1 added"
_BACK = {PERMUTED: "with the rows of each head permuted back", RAISED: "with 1 subtracted"}
_LAYOUTS: dict[str, Callable[[Array, int], Array]] = {
    AS_IT_IS: lambda value, _: value,
    PERMUTED: lambda value, heads: _permuted(value, heads, 2),
    _BACK[PERMUTED]: lambda value, heads: _permuted(value, heads, 0),
    RAISED: lambda value, _: value + 1,
    # By two tools after each other, each of which rounds.
    "with 1 added twice": lambda value, _: (value + 1) + 1,
    _BACK[RAISED]: lambda value, _: value - 1,
    "transposed": lambda value, _: value.T,
}
CONVENTIONS: Mapping[str, Mapping[str, str]] = {
    "llama": {"q_proj.weight": PERMUTED, "k_proj.weight": PERMUTED},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {"norm.weight": RAISED},
    "gemma3": {"norm.weight": RAISED},
}
"""Architecture → ends of the names of tensors that it has in another layout than the model."""
_NOT_HELD: Mapping[str, tuple[str, ...]] = {
    "gemma2": (
        "query_pre_attn_scalar", "layer_types", "attn_logit_softcapping", "final_logit_softcapping",
    ),
    "gemma3": (
        "query_pre_attn_scalar", "layer_types", "sliding_window_pattern", "rope_local_base_freq",
        "rope_parameters",
    ),
}  # fmt: skip
"""Architecture → what its reader takes from no setting of the file but fills in by itself."""


def check_export(
    file: Path, against: Path | None, engine: Engine | None
) -> tuple[dict[str, str], list[Outcome]]:
    """What a GGUF file is, and what is wrong with it.

    Args:
        file: The export.
        against: Folder of the model that was exported.
        engine: Runs the reader; None compares files alone.

    Raises:
        UsageError: A file is missing or damaged, or the model is quantized.
    """  # fmt: skip
    found = gguf_file.read(file)
    model = read_base(str(against)) if against else None
    if model is None:
        questions = {"keys": KEYS, "settings": SETTINGS, "values": VALUES, "logits": LOGITS}
        return describe(found), [Outcome(check, q, [], NO_MODEL) for check, q in questions.items()]
    if any(name.endswith(".scales") for name in model.tensors):
        raise UsageError(f"{against}: its weights are quantized: give the model before that")
    names, keys = _names(found, model)
    outcomes = [keys, _settings(found, model), _values(found, model, names)]
    if engine is None:
        outcomes.append(Outcome("logits", LOGITS, [], "--files-only: no reader was started"))
    else:
        outcomes.append(_logits(engine, found, model, names))
    return describe(found), outcomes


def describe(found: Exported) -> dict[str, str]:
    """What it is, in words."""
    types = sorted({tensor.tensor_type.name for tensor in found.tensors.values()})
    return {
        "kind": "a GGUF export",
        "architecture": found.architecture or "not named",
        "layers": str(found.setting("block_count") or "not named"),
        "tensors": str(len(found.tensors)),
        "types": ", ".join(types),
    }


def _names(found: Exported, model: Base) -> tuple[dict[str, str], Outcome]:
    """The model's name of each tensor of the export; what stands on one side alone."""
    import gguf

    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    if found.architecture not in kinds:
        text = f"{found.architecture!r} is no architecture that the package gguf knows"
        return {}, Outcome("keys", KEYS, [Finding("keys", "general.architecture", text)])
    table = gguf.get_tensor_name_map(kinds[found.architecture], model.layers)
    wanted = {
        f"{stem}.{name.rpartition('.')[2]}" if stem else name: name
        for name in model.tensors
        for stem in [table.get_name(name.rpartition(".")[0])]
    }
    tied = model.config.get("tie_word_embeddings", True) and "output.weight" not in wanted
    more = [n for n in found.tensors if n not in wanted and not (tied and n == "output.weight")]
    lacking = [n for n in wanted if n not in found.tensors]
    findings = []
    for names, text in ((lacking, "is not in the file"), (more, "stands in the file alone")):
        if names:
            rest = (
                f", nor are {len(names) - 1} others" if len(names) > 1 and names is lacking else ""
            )
            rest = rest or (f", as {len(names) - 1} others do" if len(names) > 1 else "")
            findings.append(Finding("keys", names[0], text + rest))
    both = {name: wanted[name] for name in found.tensors if name in wanted}
    note = f"{len(both)} of {len(wanted)} tensors of the model have a name in the file"
    return both, Outcome("keys", KEYS, findings, "", note)


def _settings(found: Exported, model: Base) -> Outcome:
    config = dict(model.config)
    config |= {k: v for k, v in config.get("rope_parameters", {}).items() if k == "rope_theta"}
    config.setdefault("num_key_value_heads", config.get("num_attention_heads"))
    findings, compared = [], 0
    for key, name in _SETTINGS.items():
        if (theirs := config.get(name)) is None:
            continue
        ours, compared = found.setting(key), compared + 1
        where = f"{found.architecture}.{key}"
        if ours is None:
            findings.append(
                Finding("settings", where, f"missing; the model has {name} = {theirs:g}")
            )
        elif not np.isclose(float(ours), float(theirs), rtol=1e-6, atol=0):
            text = f"{ours:g}, the model has {name} = {theirs:g}"
            findings.append(Finding("settings", where, text))
    tokens = found.settings.get("tokenizer.ggml.tokens")
    if tokens is not None and model.vocabulary and len(tokens) != model.vocabulary:
        text = f"{len(tokens):,} tokens, the model's vocabulary has {model.vocabulary:,}"
        findings.append(Finding("settings", "tokenizer.ggml.tokens", text))
    return Outcome("settings", SETTINGS, findings, "", f"{compared} settings were compared")


def _values(found: Exported, model: Base, names: Mapping[str, str]) -> Outcome:
    kinds, unknown = defaultdict[str, list[str]](list), list[str]()
    layouts = Counter[str]()
    for name, theirs in names.items():
        ours, value = found.values(name), model.tensors[theirs].read().astype(np.float32)
        if not np.isfinite(ours).all():
            kinds[f"{int((~np.isfinite(ours)).sum())} values are NaN or infinite"].append(name)
        elif ours.shape != value.shape:
            kinds[f"shape {ours.shape}, the model's is {value.shape}"].append(name)
        else:
            try:
                held = _layouts(found, name, value, _heads(model, theirs))
            except NotImplementedError:
                unknown.append(name)
                continue
            wanted = _wanted(found.architecture, theirs)
            if not held:
                kinds["not the model's values, in no layout that was tried"].append(name)
            elif wanted is None:
                layouts[held[0]] += 1
            elif wanted not in held:
                text = f"the model's values {held[0]}; {found.architecture} wants them {wanted}"
                kinds[text].append(name)
    findings = [
        Finding(
            "values", min(off), f"{len(off)} of {len(names)} tensors ({named(sorted(off))}): {text}"
        )
        for text, off in kinds.items()
    ]
    left = ""
    if layouts:
        seen = ", ".join(f"{count} {layout}" for layout, count in sorted(layouts.items()))
        left = f"which layout readers of {found.architecture} expect; the file has {seen}"
    if unknown:
        types = sorted({found.tensors[name].tensor_type.name for name in unknown})
        left = f"{len(unknown)} tensors of type {', '.join(types)}: gguf cannot make these"
    return Outcome("values", VALUES, findings, left)


def _layouts(found: Exported, name: str, value: Array, heads: int) -> list[str]:
    """How the file holds a tensor's values: each layout that gives its values to the bit."""
    from gguf.quants import dequantize, quantize

    tensor, ours = found.tensors[name], found.values(name)
    held = []
    for layout, change in _LAYOUTS.items():
        with np.errstate(over="ignore"):
            changed = np.ascontiguousarray(change(value, heads))
            if changed.shape != ours.shape:
                continue
            stored = dequantize(quantize(changed, tensor.tensor_type), tensor.tensor_type)
        if np.array_equal(stored, ours):
            held.append(layout)
    return held


def _wanted(architecture: str, name: str) -> str | None:
    """The layout that readers of an architecture expect of a tensor; None where that is not known."""
    if architecture not in CONVENTIONS:
        return None
    ends = CONVENTIONS[architecture].items()
    return next((layout for end, layout in ends if name.endswith(end)), AS_IT_IS)


def _heads(model: Base, name: str) -> int:
    key = "num_key_value_heads" if ".k_proj." in name else "num_attention_heads"
    return int(model.config.get(key) or model.config.get("num_attention_heads") or 1)


def _permuted(value: Array, heads: int, halves: int) -> Array:
    """The two halves of each head's rows interleaved (2), or taken apart again (0)."""
    if value.shape[0] % (2 * heads):
        return value
    pairs = value.shape[0] // heads // 2
    shape = (heads, 2, pairs) if halves else (heads, pairs, 2)
    return value.reshape(*shape, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)


def _logits(engine: Engine, found: Exported, model: Base, names: Mapping[str, str]) -> Outcome:
    """What a reader computes from the file, against its own values under the model's config.json."""
    if found.architecture not in CONVENTIONS:
        return Outcome(
            "logits", LOGITS, [], f"the layout of {found.architecture} is not known here"
        )
    if len(names) < len(model.tensors):
        return Outcome("logits", LOGITS, [], "not all tensors of the model have a name in the file")
    with tempfile.TemporaryDirectory() as made:
        as_file, as_model = Path(made, "file"), Path(made, "model")
        as_file.mkdir()
        (as_file / f"model{gguf_file.SUFFIX}").symlink_to(found.file.resolve())
        _write_model(as_model, found, model, names)
        computed = []
        for folder in (as_file, as_model):
            values, reason = logits(engine, READER, str(folder), model)
            if values is None:
                return Outcome("logits", LOGITS, [], f"{READER} does not run it: {reason}")
            computed.append(values)
    ours, theirs = computed
    if ours.shape != theirs.shape:
        text = f"the logits have shape {ours.shape}, those of the model {theirs.shape}"
        return Outcome("logits", LOGITS, [Finding("logits", found.file.name, text)])
    gap = float(np.abs(ours.astype(np.float64) - theirs).max())
    if gap == 0:
        if left := ", ".join(_not_held(found, model)):
            left = f"{READER} reads no setting for {left}: its defaults stand on both sides"
        note = f"equal bit for bit (read by {READER})"
        return Outcome("logits", LOGITS, [], left, note)
    text = (
        f"read by {READER} they are {gap:.3g} off, of up to {np.abs(theirs).max():.3g}: its settings are "
        "not the model's, or its layout is none that the reader expects"
    )
    return Outcome("logits", LOGITS, [Finding("logits", found.file.name, text)])


def _write_model(folder: Path, found: Exported, model: Base, names: Mapping[str, str]) -> None:
    """The model with the values that the file holds, laid out as its architecture has them."""
    from safetensors.numpy import save_file

    folder.mkdir()
    tensors = {}
    for name, theirs in names.items():
        undo = _LAYOUTS[_BACK.get(_wanted(found.architecture, theirs) or "", AS_IT_IS)]
        tensors[theirs] = np.ascontiguousarray(undo(found.values(name), _heads(model, theirs)))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config: dict[str, Any] = {**model.config, "dtype": "float32", "torch_dtype": "float32"}
    for key in _not_held(found, model):
        del config[key]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def _not_held(found: Exported, model: Base) -> list[str]:
    """Keys of the model's config.json that a reader of the file fills in by itself."""
    return [key for key in _NOT_HELD.get(found.architecture, ()) if key in model.config]
