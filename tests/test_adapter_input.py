"""What `parity adapter check` says of files and options that are none: one clear line each."""

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
from tests.adapter_checks import run
from tests.adapter_writers import MODEL, written


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
