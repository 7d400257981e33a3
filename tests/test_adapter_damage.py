"""`parity adapter check` on damaged files: one clear line or a finding, never a traceback, never green."""

from __future__ import annotations

import json
import shutil
import tracemalloc

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors import SafetensorError
from safetensors.numpy import load, load_file, save_file

from parity import resources
from parity.adapters.tensors import tensors_of
from parity.cli import main
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


def run(folder, *words):
    """Exit code and output; no exception but the exit itself."""
    words = ["adapter", "check", str(folder), "--files-only", *map(str, words)]
    done = CliRunner().invoke(main, words)
    assert done.exception is None or isinstance(done.exception, SystemExit), (words, done.exception)
    assert "Traceback" not in done.output
    if done.exit_code == 2:
        assert done.stderr.startswith("parity: ") and done.stderr.count("\n") == 1, done.stderr
        assert not done.stdout
    else:
        assert done.exit_code in (0, 1)
        assert done.stdout
    return done.exit_code, done.output


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


# Bad input, one line each ----------------------------------------------------------------------


def header(entries, length=None, data=b""):
    text = json.dumps(entries).encode() if not isinstance(entries, bytes) else entries
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(shape, offsets, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


DEEP = b'{"a":' + b"[" * 100_000
FILES = {
    "empty": (b"", "its header should have 0 bytes, the file has 0"),
    "cut in its length": (b"\x10\x00", "the file has 2"),
    "a length without end": (header({}, 2**63), "its header should have 9,223,372,036,854,775,808 bytes"),
    "no JSON": (header(b"{"), "its header is not JSON"),
    "nested without end": (header(DEEP), "its header is not JSON"),
    "a list": (header([]), "its header holds a list, not an object"),
    "no text": (header(b"\xff\xfe"), "its header is not JSON"),
    "half a character": (header(b'{"\\ud800": 1}'), "its header is not JSON"),
    "10 GB in 100 bytes": (header({"w": entry([50_000, 50_000], [0, 10_000_000_000])}), "need 10,000,000,"),
    "10 GB of nothing": (header({"w": entry([50_000, 50_000], [0, 4])}, data=b"1234"), "needs 10,000,000,000 bytes"),
    "astronomic": (header({"w": entry([10**300], [0, 4])}, data=b"1234"), "needs too many bytes"),
    "a dtype of its own": (header({"w": entry([1], [0, 4], "F31")}, data=b"1234"), 'tensor w has dtype "F31"'),
    "a negative shape": (header({"w": entry([-1, -1], [0, 4])}, data=b"1234"), "tensor w has shape [-1, -1]"),
    "true for a number": (header({"w": entry([True], [0, 4])}, data=b"1234"), "tensor w has shape [true]"),
    "not an entry": (header({"w": 5}), "tensor w is not described by"),
    "a hole": (header({"w": entry([1], [4, 8])}, data=b"12345678"), "tensor w starts at byte 4, not at 0"),
    "one over the other": (header({"v": entry([1], [0, 4]), "w": entry([1], [0, 4])}, data=b"1234"), "tensor w starts at byte 0, not at 4"),
    "more than it says": (header({"w": entry([1], [0, 4])}, data=b"12345"), "damaged or cut off"),
    "a name twice": (header(b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', data=b"1234"), "has the key w twice"),
}  # fmt: skip


@pytest.fixture
def adapter(tmp_path):
    shutil.copytree(written() / "mlx-lm", tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_one_line(name, adapter):
    data, words = FILES[name]
    (adapter / "adapters.safetensors").write_bytes(data)
    tracemalloc.start()
    code, output = run(adapter, "--base", MODEL)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert code == 2
    assert "adapters.safetensors: " in output and words in output
    assert peak < 30e6  # bytes
    if name != "a name twice":  # of which safetensors takes the last
        with pytest.raises((SafetensorError, ValueError)):
            load(data)


CONFIGS = {
    "no JSON": ("{", "adapter_config.json is not JSON"),
    "a list": ("[1]", "adapter_config.json holds a list, not an object"),
    "null": ("null", "adapter_config.json holds null, not an object"),
    "twice": ('{"num_layers": 1, "num_layers": 2}', "has the key num_layers twice"),
    "rank in words": ('{"lora_parameters": {"rank": "eight"}}', 'lora_parameters.rank: input should be a valid integer, got "eight"'),
    "no object": ('{"lora_parameters": 3}', "lora_parameters: "),
    "two at once": ('{"num_layers": "4", "lora_parameters": {"keys": "q"}}', "; "),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_settings_that_are_none_are_one_line(name, adapter):
    text, words = CONFIGS[name]
    (adapter / "adapter_config.json").write_text(text)
    code, output = run(adapter)
    assert code == 2 and words in output


def folders(tmp_path, saved):
    """Folders that are no artefact, and what is said of them."""

    def made(name, **files):
        (tmp_path / name).mkdir()
        for file, content in files.items():
            (tmp_path / name / file.replace("__", ".")).write_text(content)
        return tmp_path / name

    peft = shutil.copytree(saved / "peft", tmp_path / "peft")
    file = peft / "adapter_config.json"
    other = {**json.loads(file.read_text()), "peft_type": "IA3"}
    both = shutil.copytree(saved / "mlx-lm", tmp_path / "both")
    shutil.copy(saved / "peft" / "adapter_model.safetensors", both)
    file.write_text(json.dumps(other))
    pattern = shutil.copytree(saved / "peft", tmp_path / "pattern")
    (pattern / "adapter_config.json").write_text(
        json.dumps({**other, "peft_type": "LORA", "target_modules": "("})
    )
    untyped = shutil.copytree(saved / "peft", tmp_path / "untyped")
    (untyped / "adapter_config.json").write_text("{}")
    no_config = shutil.copytree(saved / "mlx-lm", tmp_path / "no-config")
    (no_config / "adapter_config.json").unlink()
    shards = made("shards", config__json="{}", model__safetensors="")
    (shards / "model.safetensors.index.json").write_text('{"weight_map": {"w": "../x"}}')
    return {
        tmp_path / "nowhere": "no such folder",
        saved / "mlx-lm" / "adapter_config.json": "no such folder",
        made("empty"): "it holds nothing",
        made("other", **{"notes__txt": "x"}): "it holds notes.txt",
        resources.data_dir("hello"): "is no adapter",
        made("weights-lost", adapter_config__json="{}"): "holds adapter_config.json, but neither",
        made("pickle", adapter_config__json="{}", adapter_model__bin=""): "save it as safetensors",
        no_config: "holds no adapter_config.json",
        both: "no loader reads both",
        peft: "peft_type is 'IA3'",
        untyped: "peft_type: field required",
        pattern: "target_modules: ( is no regular expression",
        shards: "../x is no file of this folder",
    }


def test_every_shape_and_half_precision_are_read(tmp_path):
    values = np.float32([1.5, -2.0, 3.0e38, np.inf])
    halves = (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    entries = {
        "a": entry([2, 2], [0, 8], "BF16"),
        "b": entry([], [8, 12]),
        "c": entry([0, 3], [12, 12]),
    }
    file = tmp_path / "x.safetensors"
    file.write_bytes(header(entries, data=halves + np.float32(7).tobytes()))
    found = {name: tensor.read() for name, tensor in tensors_of(file).items()}
    expected = np.float32([1.5, -2.0, 2.99e38, np.inf]).reshape(2, 2)
    assert np.allclose(found["a"], expected, rtol=4e-3) and found["a"][0, 0] == 1.5
    assert found["b"].shape == () and found["b"] == 7
    assert found["c"].shape == (0, 3)


def test_folders_of_another_kind_are_one_line(tmp_path):
    for folder, words in folders(tmp_path, written()).items():
        code, output = run(folder)
        assert code == 2 and words in output, output


def test_a_base_that_does_not_fit_is_one_line(tmp_path):
    saved = written()
    for base, words in (
        ("nowhere", "no model 'nowhere'"),
        ("tiny-llama", "a gemma3_text, but --base is a llama"),
        (str(saved / "peft"), "no model"),
        ("nobody/has-this", "no model 'nobody/has-this' from the hub: LocalEntryNotFoundError"),
    ):
        code, output = run(saved / "mlx-lm", "--base", base)
        assert code in (1, 2) and words in output, output
    narrow = shutil.copytree(resources.model_dir(MODEL), tmp_path / "narrow")
    tensors = load_file(narrow / "model.safetensors")
    save_file({k: np.ascontiguousarray(v[..., : v.shape[-1] // 2]) for k, v in tensors.items()}, narrow / "model.safetensors")  # fmt: skip
    code, output = run(saved / "mlx-lm", "--base", narrow)
    assert code == 2 and "none of the 28 modules" in output and "fits it" in output
    save_file({k.replace("proj", "projection"): v for k, v in tensors.items()}, narrow / "model.safetensors")  # fmt: skip
    code, output = run(saved / "mlx-lm", "--base", narrow)
    assert code == 2 and "it has none of the 28 modules" in output


def test_a_damaged_model_is_one_line(tmp_path):
    saved = written()
    fused = shutil.copytree(saved / "fused", tmp_path / "fused")
    data = (fused / "model.safetensors").read_bytes()
    for end in (5, 1000, len(data) - 1):
        (fused / "model.safetensors").write_bytes(data[:end])
        for words in (
            [fused],
            [saved / "mlx-lm", "--base", fused],
            [saved / "peft", "--against", fused],
        ):
            code, output = run(*words)
            assert code == 2 and f"{fused / 'model.safetensors'}: " in output
    for file in (fused / "model.safetensors.index.json", fused / "config.json"):
        file.write_text("[")
        code, output = run(fused)
        assert code == 2 and f"{file} is not JSON" in output


def test_an_option_that_cannot_be_had_is_one_line():
    for words, says in (
        (["--loader", "mlx"], "--loader needs --base"),
        (["--loader", "nope", "--base", MODEL], "unknown path 'nope'"),
    ):
        done = CliRunner().invoke(main, ["adapter", "check", str(written() / "peft"), *words])
        assert done.exit_code == 2 and says in done.stderr
