"""`parity adapter check` on damaged files: one clear line or a finding, never a traceback, never green."""

from __future__ import annotations

import json
import shutil

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, load_file, save_file

from parity.adapters.tensors import tensors_of
from tests.adapter_checks import run
from tests.adapter_writers import MODEL, written

COUNT = 500
WRITERS = ("mlx-lm", "peft", "mlx-lm-dora", "peft-patterns", "trl")
READ = {
    "mlx": ("rank", "scale", "dropout", "num_layers"),
    "peft": ("r", "lora_alpha", "target_modules", "layers_to_transform", "peft_type"),
}
"""Settings without which an adapter means something else, or cannot be loaded."""
DECIDING = {
    "mlx": ("rank", "scale", "num_layers", "fine_tune_type"),
    "peft": ("r", "lora_alpha", "target_modules", "layers_to_transform", "peft_type", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern"),
}  # fmt: skip


class Artefact:
    """A copy of an adapter, whole again for each damage."""

    def __init__(self, saved, writer, folder):
        self.whole, self.folder = saved / writer, folder / writer
        shutil.copytree(self.whole, self.folder)
        self.stack = "peft" if (self.folder / "adapter_model.safetensors").exists() else "mlx"
        [self.weights] = self.folder.glob("*.safetensors")
        self.config = self.folder / "adapter_config.json"
        self.bytes = self.weights.read_bytes()
        self.text = self.config.read_bytes()
        self.header = int.from_bytes(self.bytes[:8], "little")
        self.tensors = list(tensors_of(self.weights).values())

    def restore(self):
        self.weights.write_bytes(self.bytes)
        self.config.write_bytes(self.text)

    def settings(self):
        found = json.loads(self.text)
        return found, found.get("lora_parameters", found)

    def write(self, found):
        self.config.write_text(json.dumps(found))

    def place(self, found, inner, key):
        return inner if key in inner else found


# Each damage returns how it must be found: "alone" with the base, "against" the whole one as well,
# or "free" where it changes nothing that the adapter means.


def header_byte(it, rng):
    data = bytearray(it.bytes)
    data[rng.integers(8 + it.header)] ^= int(rng.integers(1, 256))
    it.weights.write_bytes(data)
    try:
        found = load(bytes(data))
    except (SafetensorError, ValueError, KeyError, TypeError):
        return "alone"
    whole = load(it.bytes)
    same = found.keys() == whole.keys() and all(
        v.dtype == whole[k].dtype
        and v.shape == whole[k].shape
        and v.tobytes() == whole[k].tobytes()
        for k, v in found.items()
    )
    return "free" if same else "against"


def cut_off(it, rng):
    it.weights.write_bytes(it.bytes[: rng.integers(len(it.bytes))])
    return "alone"


def grown(it, rng):
    it.weights.write_bytes(it.bytes + rng.bytes(int(rng.integers(1, 5000))))
    return "alone"


def key_removed(it, rng):
    found, inner = it.settings()
    key = rng.choice(READ[it.stack])
    del it.place(found, inner, key)[key]
    it.write(found)
    return "alone"


def other_type(it, rng):
    found, inner = it.settings()
    key = rng.choice(READ[it.stack])
    wrong = [{"a": 1}, True, None, [[1]], 1.5 + rng.random() * 1e300, [None]]
    numbers = ("scale", "dropout", "lora_alpha")
    wrong = ["8", *wrong] if key not in ("target_modules", "peft_type") else wrong
    wrong = [value for value in wrong if not (key in numbers and isinstance(value, float))]
    it.place(found, inner, key)[key] = wrong[rng.integers(len(wrong))]
    it.write(found)
    return "alone"


def config_byte(it, rng):
    data = bytearray(it.text)
    data[rng.integers(len(data))] ^= int(rng.integers(1, 256))
    it.config.write_bytes(data)
    try:
        found = json.loads(bytes(data).decode())
        inner = found.get("lora_parameters", found)
        before, within = it.settings()
        changed = [
            key for key in DECIDING[it.stack]
            if inner.get(key, found.get(key)) != within.get(key, before.get(key))
            and not (key == "fine_tune_type" and before[key] == "lora" and key not in found)
            and not (key.endswith("_pattern") and not within.get(key) and not inner.get(key))
            and not (key.startswith("use_") and not within.get(key) and not inner.get(key))
        ]  # fmt: skip
    except (ValueError, AttributeError, TypeError):
        return "alone"
    return "against" if changed else "free"


def not_a_number(it, rng):
    tensor = it.tensors[rng.integers(len(it.tensors))]
    data, at = bytearray(it.bytes), tensor.offset + 4 * int(rng.integers(tensor.size))
    data[at : at + 4] = np.float32([np.nan, np.inf, -np.inf][rng.integers(3)]).tobytes()
    it.weights.write_bytes(data)
    return "alone"


def zeros(it, rng):
    some = [t for t in it.tensors if "lora_" in t.name and "magnitude" not in t.name]
    tensor = some[rng.integers(len(some))]
    data = bytearray(it.bytes)
    data[tensor.offset : tensor.offset + 4 * tensor.size] = bytes(4 * tensor.size)
    it.weights.write_bytes(data)
    return "alone"


def weight_doubled(it, rng):
    found = load_file(it.weights)
    tensor = found[sorted(found)[rng.integers(len(found))]]
    tensor.flat[rng.integers(tensor.size)] *= 2
    save_file(found, it.weights)
    return "against"


def other_name(it, rng):
    found = load_file(it.weights)
    name = sorted(found)[rng.integers(len(found))]
    parts = name.split(".")
    parts[rng.integers(len(parts))] += "x"
    found[".".join(parts)] = found.pop(name)
    save_file(found, it.weights)
    return "alone"


def missing(it, rng):
    found = load_file(it.weights)
    del found[sorted(found)[rng.integers(len(found))]]
    save_file(found, it.weights)
    return "alone"


def other_shape(it, rng):
    found = load_file(it.weights)
    name = sorted(found)[rng.integers(len(found))]
    value = found[name]
    found[name] = [value[None], value.reshape(-1, 1, 1), value[:-1], value[..., :0]][
        rng.integers(4)
    ]
    save_file({k: np.ascontiguousarray(v) for k, v in found.items()}, it.weights)
    return "alone"


def other_number(it, rng):
    found, inner = it.settings()
    key = rng.choice(
        {"mlx": ("rank", "scale", "num_layers"), "peft": ("r", "lora_alpha")}[it.stack]
    )
    place = it.place(found, inner, key)
    place[key] = [place[key] + 1, -place[key], 0, 10**30][rng.integers(4)]
    if key == "num_layers" and place[key] == 10**30:
        place[key] = 5
    it.write(found)
    return "against"


def no_file(it, rng):
    file = [it.weights, it.config][rng.integers(2)]
    file.write_bytes(
        [b"", b"[]", b"null", b"{}", b"\x00" * 8, b"PK\x03\x04", rng.bytes(64)][rng.integers(7)]
    )
    return "alone"


DAMAGES = [
    header_byte, cut_off, grown, key_removed, other_type, config_byte, not_a_number, zeros,
    weight_doubled, other_name, missing, other_shape, other_number, no_file,
]  # fmt: skip


def test_no_damage_is_green_and_none_ends_in_a_traceback(tmp_path):
    saved, seen = written(), {damage.__name__: [0, 0, 0] for damage in DAMAGES}
    artefacts = [Artefact(saved, writer, tmp_path) for writer in WRITERS]
    for seed in range(COUNT):
        rng = np.random.default_rng(seed)
        it, damage = artefacts[seed % len(artefacts)], DAMAGES[seed % len(DAMAGES)]
        how = damage(it, rng)
        words = ["--against", it.whole] if how == "against" else []
        code, output = run(it.folder, "--base", MODEL, *words)
        assert how == "free" or code, (seed, damage.__name__, output)
        seen[damage.__name__][code] += 1
        it.restore()
    # Both kinds of answers occur, and few damages are without meaning.
    assert sum(count[0] for count in seen.values()) < COUNT / 15, seen
    assert all(sum(counts[i] for counts in seen.values()) > COUNT / 10 for i in (1, 2)), seen
    for artefact in artefacts:
        assert run(artefact.folder, "--base", MODEL, "--against", artefact.whole)[0] == 0
