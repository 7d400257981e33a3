"""A GGUF export of the real mlx-lm against the model that it was made from; planted faults; damage."""

from __future__ import annotations

import contextlib
import json
import shutil
import struct
import subprocess
import sys

import numpy as np
import pytest

from parity.adapters.check import check
from parity.adapters.export import CONVENTIONS
from parity.adapters.gguf_file import read
from parity.errors import UsageError
from parity.resources import fixtures
from tests.cost import long

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
MODEL = fixtures() / "models" / "tiny-llama"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """What `mlx_lm fuse --export-gguf` leaves of an adapter that has an effect."""
    from safetensors.numpy import load_file, save_file

    folder = tmp_path_factory.mktemp("export")
    adapter, fused = folder / "adapter", folder / "fused"
    adapter.mkdir()
    keys, rng = ["self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"], np.random.default_rng(0)
    base, tensors = load_file(MODEL / "model.safetensors"), {}
    for key in (f"model.layers.{n}.{name}" for n in (16, 17) for name in keys):
        outputs, inputs = base[f"{key}.weight"].shape
        tensors[f"{key}.lora_a"] = rng.normal(size=(inputs, 4)).astype(np.float32) * 0.1
        tensors[f"{key}.lora_b"] = rng.normal(size=(4, outputs)).astype(np.float32) * 0.1
    save_file(tensors, adapter / "adapters.safetensors")
    lora = {"rank": 4, "scale": 4.0, "dropout": 0.0, "keys": keys}
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": lora}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    words = ["--model", MODEL, "--adapter-path", adapter, "--save-path", fused, "--export-gguf"]
    done = subprocess.run(
        [sys.executable, "-m", "mlx_lm", "fuse", *words],
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.returncode, done.stderr
    return fused / "ggml-model-f16.gguf", fused


def rewritten(source, target, tensors=None, settings=None, architecture="llama"):
    """A copy of a file with other tensors (None: left out) and settings (None: left out)."""
    reader, tensors, settings = gguf.GGUFReader(source), tensors or {}, settings or {}
    writer = gguf.GGUFWriter(target, architecture)
    for name, field in reader.fields.items():
        value = settings.get(name, field.contents())
        if name.startswith("GGUF.") or name == "general.architecture" or value is None:
            continue
        inner = field.types[1] if len(field.types) > 1 else None
        writer.add_key_value(name, value, field.types[0], inner)
    for tensor in reader.tensors:
        shape = tuple(int(n) for n in reversed(tensor.shape))
        value = np.array(tensor.data).reshape(shape)
        change = tensors.get(tensor.name, lambda v: v)
        if change is not None:
            changed = np.ascontiguousarray(change(value))
            kind = getattr(change, "kind", None)
            writer.add_tensor(tensor.name, changed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def interleaved(value, heads):
    shape = value.shape
    return value.reshape(heads, 2, shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(shape)


def apart(value, heads):
    shape = value.shape
    return value.reshape(heads, shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(shape)


def on(names, change):
    return {f"blk.{n}.{name}.weight": change for n in range(18) for name in names}


def nan(value):
    value[0, 0] = np.nan
    return value


FAULTS = {
    "q and k not permuted": (
        on(["attn_q"], lambda v: apart(v, 4)) | on(["attn_k"], lambda v: apart(v, 2)), {},
        "values", "the model's values as it is; llama wants them with the rows of each head permuted",
    ),
    "k permuted by the heads of q": (
        on(["attn_k"], lambda v: interleaved(apart(v, 2), 4)), {},
        "values", "18 of 164 tensors (blk.0.attn_k.weight",
    ),
    "norms with 1 added": (
        on(["attn_norm", "ffn_norm"], lambda v: v + 1), {},
        "values", "the model's values with 1 added; llama wants them as it is",
    ),
    "o transposed": (
        on(["attn_output"], lambda v: v.T), {}, "values", "the model's values transposed",
    ),
    "a weight of another model": (
        {"blk.17.ffn_down.weight": lambda v: v + 0.01}, {}, "values", "not the model's values",
    ),
    "NaN": ({"blk.3.attn_v.weight": nan}, {}, "values", "1 values are NaN or infinite"),
    "a layer is missing": (
        {f"blk.17.{n}.weight": None for n in ("attn_q", "attn_k")}, {},
        "keys", "is not in the file, nor are 1 others",
    ),
    "rope base lost": (
        {}, {"llama.rope.freq_base": None}, "settings", "missing; the model has rope_theta = 50000",
    ),
    "another eps": (
        {}, {"llama.attention.layer_norm_rms_epsilon": 1e-3},
        "settings", "0.001, the model has rms_norm_eps = 1e-06",
    ),
}  # fmt: skip


def findings(result):
    return {(found.check, f"{found.where}: {found.text}") for found in result.findings}


def test_a_real_export_is_the_fused_model(exported, engine):
    file, fused = exported
    result = check(file, against=fused, engine=lambda: contextlib.nullcontext(engine))
    assert result.verdict == "clean", result.findings
    assert result.described["architecture"] == "llama"
    assert "equal bit for bit (read by hf)" in [outcome.note for outcome in result.outcomes]


def test_an_export_from_which_the_adapter_was_lost_is_named(exported):
    file, _ = exported
    found = findings(check(file, against=MODEL))
    assert any(
        c == "values" and "6 of 164 tensors" in t and "not the model's" in t for c, t in found
    )


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_named(exported, tmp_path, fault):
    tensors, settings, kind, words = FAULTS[fault]
    file = rewritten(exported[0], tmp_path / "x.gguf", tensors, settings)
    found = findings(check(file, against=exported[1]))
    assert {check for check, _ in found} == {kind}
    assert any(words in text for _, text in found), found


def test_a_reader_sees_lost_settings_in_the_logits(exported, engine, tmp_path):
    tensors, settings, *_ = FAULTS["rope base lost"]
    file = rewritten(exported[0], tmp_path / "x.gguf", tensors, settings)
    result = check(file, against=exported[1], engine=lambda: contextlib.nullcontext(engine))
    assert any(
        check == "logits" and "read by hf they are" in text for check, text in findings(result)
    )


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0"])
def test_what_the_type_rounds_is_no_finding(exported, tmp_path, kind):
    kind = gguf.GGMLQuantizationType[kind]

    def rounded(value):
        return gguf.quants.quantize(value, kind)

    rounded.kind = kind
    reader = read(exported[0])
    both = [n for n, t in reader.tensors.items() if len(t.shape) == 2]
    file = rewritten(exported[0], tmp_path / "x.gguf", dict.fromkeys(both, rounded))
    assert not findings(check(file, against=exported[1]))


def test_of_an_architecture_that_is_not_known_no_layout_is_claimed(exported, tmp_path, engine):
    norms = on(["attn_norm"], lambda v: v + 1)
    file = rewritten(exported[0], tmp_path / "x.gguf", norms, architecture="granite")
    result = check(file, against=exported[1], engine=lambda: contextlib.nullcontext(engine))
    assert not any(kind == "values" for kind, _ in findings(result))
    left = {outcome.check: outcome.unchecked for outcome in result.unchecked}
    assert "which layout readers of granite expect; the file has" in left["values"]
    assert "18 with 1 added" in left["values"]
    assert left["logits"] == "the layout of granite is not known here"


# Other architectures ----------------------------------------------------------------------------

WIDTHS = {"qwen3": 128}  # what transformers' reader takes, whatever the file says
NORMS = {"gemma2": 1, "gemma3": 1}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model of an architecture with random weights, made once."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("models")

    def model(architecture):
        if (folder / architecture).exists():
            return folder / architecture
        words = {"gemma3": "Gemma3Text"}.get(architecture, architecture.capitalize())
        widths = {} if architecture == "qwen2" else {"head_dim": WIDTHS.get(architecture, 16)}
        config = getattr(transformers, f"{words}Config")(
            vocab_size=512, hidden_size=64, intermediate_size=256, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
            tie_word_embeddings=True, **widths,
        )  # fmt: skip
        torch.manual_seed(0)
        made = transformers.AutoModelForCausalLM.from_config(config)
        for parameter in made.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        made.save_pretrained(folder / architecture)
        return folder / architecture

    return model


def export_of(model, target, architecture, change=lambda name, value: value, norms=None):
    """What llama.cpp's converter writes of a model, as far as the reader needs it."""
    from safetensors.numpy import load_file

    config = json.loads((model / "config.json").read_text())
    writer = gguf.GGUFWriter(target, architecture)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    rope = config["rope_parameters"]
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    if "head_dim" in config:
        writer.add_key_length(config["head_dim"])
    if config.get("sliding_window"):
        writer.add_sliding_window(config["sliding_window"])
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(kinds[architecture], config["num_hidden_layers"])
    for name, value in load_file(model / "model.safetensors").items():
        stem, _, end = name.rpartition(".")
        if name.endswith("norm.weight"):
            for _ in range(NORMS.get(architecture, 0) if norms is None else norms):
                value = value + np.float32(1)
        writer.add_tensor(
            f"{table.get_name(stem)}.{end}", np.ascontiguousarray(change(name, value))
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@pytest.mark.parametrize("architecture", ["gemma3", long("qwen3"), long("qwen2"), long("gemma2")])
def test_a_convention_is_that_of_a_real_reader(models, tmp_path, architecture, engine):
    """The reader's logits are those of the model, by the convention that is claimed and no other."""
    model = models(architecture)
    file = export_of(model, tmp_path / "x.gguf", architecture)
    result = check(file, against=model, engine=lambda: contextlib.nullcontext(engine))
    assert not result.findings
    assert "equal bit for bit (read by hf)" in [outcome.note for outcome in result.outcomes]
    left = {outcome.check: outcome.unchecked for outcome in result.unchecked}
    if architecture in NORMS:
        assert left.keys() == {"logits"}
        assert "hf reads no setting for query_pre_attn_scalar" in left["logits"]
    else:
        assert result.verdict == "clean"


def test_there_is_no_convention_that_no_reader_was_asked_about():
    assert {"llama", "qwen2", "qwen3", "gemma2", "gemma3"} == CONVENTIONS.keys()


@pytest.mark.parametrize(("times", "held"), [(0, "as it is"), (2, "with 1 added twice")])
def test_norms_of_gemma_that_were_raised_twice_or_not_at_all_are_named(
    models, tmp_path, times, held
):
    """unsloth-zoo#1095: 1 was added by the exporter and again by the converter."""
    file = export_of(models("gemma3"), tmp_path / "x.gguf", "gemma3", norms=times)
    [(kind, text)] = findings(check(file, against=models("gemma3")))
    assert kind == "values"
    assert "13 of 28 tensors" in text
    assert f"the model's values {held}; gemma3 wants them with 1 added" in text


def test_permuted_rows_are_wrong_where_the_architecture_has_none(models, tmp_path):
    def change(name, value):
        return interleaved(value, 4) if name.endswith("q_proj.weight") else value

    file = export_of(models("qwen3"), tmp_path / "x.gguf", "qwen3", change)
    [(kind, text)] = findings(check(file, against=models("qwen3")))
    assert kind == "values"
    assert "with the rows of each head permuted; qwen3 wants them as it is" in text


def test_without_the_model_nothing_is_green(exported):
    result = check(exported[0])
    assert result.verdict == "incomplete"
    assert all("needs --against" in outcome.unchecked for outcome in result.outcomes)
    with pytest.raises(UsageError, match="--base is of no use"):
        check(exported[0], str(MODEL))


def test_a_damaged_file_ends_in_one_line(exported, tmp_path):
    whole, file = exported[0].read_bytes(), tmp_path / "x.gguf"
    rng, refused = np.random.default_rng(0), 0
    huge = whole[:8] + struct.pack("<QQ", 2**60, 2**60) + whole[24:]
    cut = [whole[:n] for n in (0, 3, 10, 100, 5_000, len(whole) // 2)]
    flipped = []
    for _ in range(30):
        data = bytearray(whole)
        data[int(rng.integers(0, 2_000))] ^= 1 << int(rng.integers(8))
        flipped.append(bytes(data))
    for data in [huge, *cut, *flipped]:
        file.write_bytes(data)
        try:
            result = check(file, against=exported[1])
        except UsageError as error:
            refused += 1
            assert "\n" not in str(error)
            assert str(file) in str(error) or "quantized" in str(error)
        else:
            assert result.verdict != "clean" or data in flipped
    assert refused > 7
    shutil.rmtree(tmp_path / "missing", ignore_errors=True)
    with pytest.raises(UsageError, match="No such file"):
        check(tmp_path / "missing.gguf")


# What else is wrong with a file -------------------------------------------------------------------


def test_an_architecture_that_nobody_knows_is_named(exported, tmp_path):
    file = rewritten(exported[0], tmp_path / "x.gguf", architecture="nobody")
    words = "general.architecture: 'nobody' is no architecture that the package gguf knows"
    assert ("keys", words) in findings(check(file, against=exported[1]))


def test_a_tensor_that_the_model_has_not_is_named(models, tmp_path):
    file = tmp_path / "x.gguf"
    model = shutil.copytree(models("qwen3"), tmp_path / "less")
    export_of(model, file, "qwen3")
    from safetensors.numpy import load_file, save_file

    weights = model / "model.safetensors"
    kept = {k: v for k, v in load_file(weights).items() if "layers.1.mlp" not in k}
    save_file(kept, weights)
    [(kind, text)] = findings(check(file, against=model))
    assert kind == "keys"
    assert "stands in the file alone, as 2 others do" in text


def test_a_tensor_of_another_shape_is_named(models, tmp_path):
    def change(name, value):
        return value[:-1] if name.endswith("layers.1.mlp.up_proj.weight") else value

    file = export_of(models("qwen3"), tmp_path / "x.gguf", "qwen3", change)
    [(kind, text)] = findings(check(file, against=models("qwen3")))
    assert kind == "values"
    assert "shape (255, 64), the model's is (256, 64)" in text


def test_another_number_of_tokens_is_named(exported, tmp_path):
    tokens = [f"t{n}" for n in range(500)]
    file = rewritten(exported[0], tmp_path / "x.gguf", settings={"tokenizer.ggml.tokens": tokens})
    words = "tokenizer.ggml.tokens: 500 tokens, the model's vocabulary has 512"
    assert ("settings", words) in findings(check(file, against=exported[1]))


def test_types_that_cannot_be_made_again_are_no_pass(models, tmp_path):
    """gguf reads them and cannot write them: which layout they hold is not found by trying."""
    kind = gguf.GGMLQuantizationType.Q2_K
    block, size = gguf.GGML_QUANT_SIZES[kind]

    def packed(value):
        return np.zeros((value.shape[0], size * value.shape[1] // block), np.uint8)

    packed.kind = kind
    plain = export_of(models("qwen3"), tmp_path / "plain.gguf", "qwen3")
    changed = {"blk.0.ffn_down.weight": packed}
    file = rewritten(plain, tmp_path / "x.gguf", changed, architecture="qwen3")
    result = check(file, against=models("qwen3"))
    left = {outcome.check: outcome.unchecked for outcome in result.unchecked}
    assert left["values"] == "1 tensors of type Q2_K: gguf cannot make these"
