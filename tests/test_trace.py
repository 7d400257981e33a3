import math

import numpy as np
import pytest

from parity.errors import UsageError
from parity.files import dumps, loads
from parity.names import canonical, layer_of
from parity.trace import Trace


def test_a_trace_survives_the_disk(tmp_path):
    trace = Trace(
        {"loss": np.array([1.0, np.nan, np.inf], np.float32), "b/x": np.arange(6).reshape(2, 3)},
        {"nan": math.nan, "inf": -math.inf, "names": ["ä", "float"], "nested": {"n": 1}},
        {"device": "cpu"},
    )
    trace.save(tmp_path / "t.safetensors")
    back = Trace.load(tmp_path / "t.safetensors")
    np.testing.assert_array_equal(back.arrays["loss"], trace.arrays["loss"])
    np.testing.assert_array_equal(back.group("b")["x"], trace.arrays["b/x"])
    assert math.isnan(back.scalars["nan"])
    assert back.scalars["inf"] == -math.inf
    assert back.scalars["names"] == ["ä", "float"]
    assert back.environment == {"device": "cpu"}
    assert [f.name for f in tmp_path.iterdir()] == ["t.safetensors"], "no temporary file is left"


def test_other_files_are_refused(tmp_path):
    from safetensors.numpy import save_file

    file = tmp_path / "x.safetensors"
    file.write_bytes(b"nonsense")
    with pytest.raises(UsageError, match="not a trace"):
        Trace.load(file)
    save_file({"a": np.zeros(1)}, file)
    with pytest.raises(UsageError, match="but not a trace"):
        Trace.load(file)
    save_file({"a": np.zeros(1)}, file, metadata={"schema": "99"})
    with pytest.raises(UsageError, match="newer than this tool"):
        Trace.load(file)


def test_the_digest_sees_content_and_only_content():
    a = Trace({"x": np.zeros(3, np.float32)}, {"k": 1})
    assert a.digest() == Trace({"x": np.zeros(3, np.float32)}, {"k": 1}, {"host": "b"}).digest()
    for other in (
        Trace({"x": np.ones(3, np.float32)}, {"k": 1}),
        Trace({"y": np.zeros(3, np.float32)}, {"k": 1}),
        Trace({"x": np.zeros((3, 1), np.float32)}, {"k": 1}),
        Trace({"x": np.zeros(3, np.float64)}, {"k": 1}),
        Trace({"x": np.zeros(3, np.float32)}, {"k": 2}),
    ):
        assert other.digest() != a.digest()


def test_json_keeps_what_json_lacks():
    value = {"a": [math.nan, math.inf, 1.5], "b": "float:x", "c": np.float32(2)}
    back = loads(dumps(value))
    assert math.isnan(back["a"][0])
    assert back["a"][1:] == [math.inf, 1.5]
    assert back["b"] == "float:x"
    assert back["c"] == 2.0


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "base_model.model.model.layers.3.self_attn.q_proj.lora_A.default.weight",
            "layers.3.self_attn.q_proj.lora_a",
        ),
        ("model.layers.3.mlp.up_proj.lora_b", "layers.3.mlp.up_proj.lora_b"),
        ("language_model.model.layers.0.input_layernorm", "layers.0.input_layernorm"),
        (
            "base_model.model.model.layers.0.mlp.up_proj.base_layer.weight",
            "layers.0.mlp.up_proj.weight",
        ),
        ("model.embed_tokens.weight", "embed_tokens.weight"),
        ("lm_head.weight", "lm_head.weight"),
    ],
)
def test_one_name_whatever_the_framework(name, expected):
    assert canonical(name) == expected


def test_layers_are_found_in_names():
    assert layer_of("layers.12.mlp.up_proj.lora_a") == 12
    assert layer_of("embed_tokens.weight") is None
