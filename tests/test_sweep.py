"""The sweep over architectures: what is made, what is set, what is asked, and causes that are planted."""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from click.testing import CliRunner

from parity.cli import main
from parity.report import sweep_files
from parity.sweep import candidates, filling
from parity.sweep.answers import Answer, Cause, Cell
from parity.sweep.columns import installed
from parity.sweep.maker import Maker, NotMade
from parity.sweep.models import Architecture, Store, text
from parity.sweep.questions import targets
from parity.sweep.run import Found, Sweep, common
from parity.sweep.shrink import completed, shrunk
from parity.sweep.sources import Field, of_python
from parity.sweep.traps import (
    Configuration,
    Configurations,
    Trap,
    changed,
    configurations,
    proposed,
    ropes,
)

LLAMA = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128,
    "hidden_act": "silu", "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "bos_token_id": 1,
    "tie_word_embeddings": False, "attention_bias": False, "id2label": {"0": "LABEL_0"},
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
}  # fmt: skip


@pytest.fixture(scope="module")
def maker(tmp_path_factory):
    with Maker(tmp_path_factory.mktemp("logs") / "maker.log") as made:
        yield made


@pytest.fixture(scope="module")
def store(engine, maker):
    return Store(engine.cache, maker)


def swept(engine, subject, *only, **named):
    sweep = Sweep(installed(engine, subject), engine.cache, 1, **named)
    try:
        return sweep.run(only)
    finally:
        sweep.close()


# What is made ------------------------------------------------------------------------------------


def test_sizes_shrink_by_what_they_are_called():
    tiny = shrunk(LLAMA)
    assert tiny["hidden_size"] == 64 and tiny["vocab_size"] == 512
    assert tiny["num_hidden_layers"] == 2
    assert tiny["rms_norm_eps"] == 1e-6 and tiny["rope_parameters"] == LLAMA["rope_parameters"]
    assert "id2label" not in tiny


def test_there_are_as_many_layers_as_kinds_of_layers_need():
    kinds = [*["sliding_attention"] * 5, "full_attention"] * 4
    tiny = shrunk({**LLAMA, "num_hidden_layers": 24, "layer_types": kinds})
    assert tiny["num_hidden_layers"] == 6
    assert tiny["layer_types"] == kinds[:6]


def test_what_a_default_leaves_open_is_completed():
    tiny = completed(
        {"num_hidden_layers": 2, "layer_types": None, "head_dim": None}, ["conv", "full_attention"]
    )
    assert tiny["layer_types"] == ["conv", "full_attention"] and tiny["head_dim"] == 16


def test_every_setting_is_moved():
    found = {key: value for trap in proposed(shrunk(LLAMA)) for key, value in trap.changes.items()}
    assert found["rope_parameters.rope_theta"] == 37_000.0
    assert found["attention_bias"] is True and found["tie_word_embeddings"] is True
    assert found["rms_norm_eps"] == 0.03 and found["hidden_act"] == "gelu_pytorch_tanh"
    assert found["num_attention_heads"] == 3


def test_a_kind_of_rope_keeps_its_theta_and_is_shorter_than_the_text():
    [yarn] = ropes(shrunk(LLAMA), ["default", "yarn"])
    made = yarn.changes["rope_parameters"]
    assert made["rope_type"] == "yarn" and made["rope_theta"] == 10_000.0
    assert made["original_max_position_embeddings"] < text().shape[1]


def test_what_has_no_effect_is_no_trap(maker):
    """Of the settings of a real architecture; a setting that nothing reads is one of them."""
    plain = shrunk(maker.ask("defaults", kind="llama")["config"])
    found = configurations(maker, {**plain, "nothing_reads_this": 0.7}, ["yarn"], text().tolist())
    names = [configuration.name for configuration in found.made]
    assert names == ["plain", "traps", "rope yarn"]
    kinds = {trap.kind for trap in found.made[1].traps}
    assert {"rope theta", "bias", "activation", "norm epsilon", "odd head count"} <= kinds
    assert "nothing_reads_this=1.0499999999999998" in found.idle
    assert any(name.startswith("attention_dropout") for name in found.idle)


def test_norms_and_biases_are_random(store):
    from safetensors.numpy import load_file

    architecture = store.architecture("llama")
    plain, traps = architecture.found.made[:2]
    model = store.model("llama", traps.config)
    tensors = load_file(model.folder / "model.safetensors")
    flat = {name: value for name, value in tensors.items() if value.ndim == 1}
    assert any("bias" in name for name in flat) and any("norm" in name for name in flat)
    assert all(value.std() > 0.05 for value in flat.values())
    # what both configurations have is the same: only the setting differs
    other = load_file(store.model("llama", plain.config).folder / "model.safetensors")
    norms = [name for name in other if "norm" in name and other[name].shape == tensors[name].shape]
    assert all(np.array_equal(other[name], tensors[name]) for name in norms)


def test_a_process_that_was_ended_is_not_started_again(tmp_path):
    """A thread that is still at work when a sweep is stopped asks once more."""
    maker = Maker(tmp_path / "maker.log")
    maker.ask("registry")
    maker.close()
    with pytest.raises(NotMade, match="was ended"):
        maker.ask("registry")
    assert maker._process is None


def test_an_architecture_that_cannot_be_built_says_why(maker):
    with pytest.raises(NotMade, match="KeyError"):
        maker.ask("defaults", kind="no-such-architecture")
    assert maker.ask("registry")["version"]  # the process lives on


def test_a_process_that_dies_is_started_again(tmp_path):
    with Maker(tmp_path / "log") as maker:
        maker.ask("registry")
        maker._process.kill()
        maker._process.wait()
        assert maker.ask("registry")["causal"]


# What is common ----------------------------------------------------------------------------------


def test_common_architectures_come_from_both_registries(maker):
    registry, sources = maker.ask("registry"), of_python(sys.executable)
    names, aside = common(registry, [sources])
    assert len(names) >= 50
    assert {"llama", "gemma2", "mistral"} <= set(names)  # mistral is served by llama's file
    assert sources.file("mistral").name == "llama.py"
    assert all(name in registry["known"] and sources.file(name) for name in [*names, *aside])
    without = {**registry, "known": [n for n in registry["known"] if n != "llama"]}
    assert "llama" not in common(without, [sources])[0]


def test_settings_are_read_from_the_text_of_a_file():
    fields = {field.name: field for field in of_python(sys.executable).fields("llama")}
    assert fields["rope_theta"].default == 10_000 and not fields["rope_theta"].required
    assert fields["hidden_size"].required


def test_files_can_be_read_in_threads():
    """Python 3.11 raises SystemError where two threads parse at once."""
    sources = of_python(sys.executable)
    names = list(sources.files)[:40]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda name: len(sources.fields(name)), names))
    assert all(found)


def test_only_modules_of_both_sides_are_trained():
    theirs = {
        "model.layers.0.self_attn.q_proj": "linear", "model.layers.0.mlp.gate": "linear",
        "model.layers.0.mlp.experts": "Experts", "model.layers.0.mlp.up": "Conv1D", "lm_head": "linear",
        "model.layers.0.self_attn.k_proj": "linear",
    }  # fmt: skip
    ours = ["layers.0.self_attn.q_proj", "layers.0.mlp.gate", "layers.0.mlp.up", "lm_head"]
    assert targets(theirs, ours) == ["q_proj"]


# Candidates --------------------------------------------------------------------------------------


def test_rope_settings_are_tried_in_the_older_spelling():
    config = changed(
        LLAMA, {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 5e5}}
    )
    fields = [Field("rope_theta", 1e4), Field("rope_scaling")]
    tried = candidates.readable(
        {"rope_parameters": config["rope_parameters"]}, config, fields, set()
    )
    assert {"rope_theta": 5e5} in tried
    scaling = {"rope_type": "yarn", "factor": 4.0, "type": "yarn"}
    assert {"rope_theta": 5e5, "rope_scaling": scaling} in tried


def test_what_a_file_demands_is_taken_from_what_is_there():
    fields = [
        Field("num_experts", required=True, kind="int"),
        Field("rope_theta", required=True, kind="float"),
    ]
    config = {**LLAMA, "num_local_experts": 4}
    found = filling.ways(config, filling.lacking(config, fields), {"num_experts": 4}, {})[0]
    assert filling.resolved(found, config) == {"num_experts": 4, "rope_theta": 10_000.0}
    moved = changed(config, {"rope_parameters.rope_theta": 5.0})
    assert filling.resolved(found, moved)["rope_theta"] == 5.0


def test_a_default_is_said_to_stand_where_it_stands():
    fields = of_python(sys.executable).fields("smollm3")
    config = {"rope_parameters": {"rope_theta": 2e6}}
    tried = list(candidates.by_default(["rope_parameters.rope_theta"], config, fields))
    assert tried == [(", the default of rope_theta in models/llama.py", {"rope_parameters.rope_theta": 10000})]  # fmt: skip


# Whole cells, with planted misreadings -----------------------------------------------------------


def test_an_ignored_theta_is_named_with_its_remedy(engine):
    found = swept(engine, "tests.misreading_paths:NoTheta", "qwen3", chosen=("traps",))
    [cell] = found.cells.values()
    causes = [cause for answer in cell.answers for cause in answer.causes]
    theta = next(cause for cause in causes if cause.name == "rope_parameters.rope_theta")
    assert "takes no notice of rope_parameters.rope_theta" in theta.sentence
    assert (
        "mlx-lm computes as transformers does with rope_parameters.rope_theta=10000.0"
        in theta.sentence
    )
    assert "transformers computes with rope_parameters.rope_theta=37000.0" in theta.sentence
    assert "rope_theta=37000.0 in config.json as well mlx-lm agrees" in theta.fix


@pytest.mark.long
def test_a_setting_without_another_name_has_no_remedy(engine):
    found = swept(engine, "tests.misreading_paths:OtherEpsilon", "qwen3", chosen=("traps",))
    [cell] = found.cells.values()
    causes = {cause.name: cause for answer in cell.answers for cause in answer.causes}
    assert "takes no notice of rms_norm_eps" in causes["rms_norm_eps"].sentence
    assert not causes["rms_norm_eps"].fix
    assert "rope_parameters.rope_theta" not in causes


@pytest.mark.long
def test_a_wrong_module_is_named_and_no_setting_is_blamed(engine):
    found = swept(
        engine, "tests.misreading_paths:WrongModule", "qwen3", chosen=("plain",), wanted=("logits",)
    )
    [cell] = found.cells.values()
    [cause] = [cause for answer in cell.answers for cause in answer.causes]
    assert cause.kind == "module" and "down_proj" in cause.name


@pytest.mark.long
def test_a_process_that_dies_is_one_red_cell(engine):
    found = swept(
        engine,
        "tests.misreading_paths:Dies",
        "gemma",
        "qwen3",
        chosen=("plain",),
        wanted=("logits",),
    )
    cells = {name: cell for (name, _), cell in found.cells.items()}
    assert cells["gemma"].verdict("logits") == "error"
    assert "died" in cells["gemma"].of("logits")[0].reason
    assert all(answer.causes for answer in cells["gemma"].answers if answer.red)
    assert cells["qwen3"].verdict("logits") == "agree"


@pytest.mark.long
def test_a_type_that_is_not_known_does_not_load(engine):
    found = swept(
        engine,
        "tests.misreading_paths:Unknown",
        "qwen3",
        chosen=("plain",),
        wanted=("loads", "logits"),
    )
    [cell] = found.cells.values()
    assert cell.verdict("loads") == "error"
    assert not any(answer.green for answer in cell.answers)
    assert all(answer.causes for answer in cell.answers if answer.red)


@pytest.mark.long
def test_what_is_finished_is_kept(engine):
    wanted, chosen = ("logits",), ("plain",)
    first = swept(engine, "mlx", "qwen3", wanted=wanted, chosen=chosen)
    kept = []
    sweep = Sweep(
        installed(engine, "mlx"),
        engine.cache,
        1,
        wanted,
        chosen,
        lambda cell, old: kept.append(old),
    )
    captured = engine.captured
    again = sweep.run(("qwen3",))
    sweep.close()
    assert kept == [True] and engine.captured == captured
    assert [c.to_json() for c in again.cells.values()] == [
        c.to_json() for c in first.cells.values()
    ]


# The report --------------------------------------------------------------------------------------


def found_of(*cells, why_not=""):
    columns = list(dict.fromkeys(cell.release for cell in cells))
    traps = [Trap("rope theta", {"rope_parameters.rope_theta": 37000.0})]
    made = Configurations(
        [Configuration("plain", {}), Configuration("traps", {}, traps)], ["use_cache=False"], {}
    )
    names = {cell.architecture for cell in cells}
    architectures = {name: Architecture(name, "ForCausalLM", made) for name in names}
    if why_not:
        architectures["odd"] = Architecture("odd", "OddForCausalLM", why_not=why_not)
    listed = {(cell.architecture, cell.release): cell for cell in cells}
    return Found(columns, architectures, listed, transformers="5.23.0")


def cell_of(release, verdict="agree", causes=(), note=""):
    answers = [
        Answer("loads", "traps", "agree"),
        Answer("logits", "traps", verdict, "logits: 3 of 1e-5", causes=list(causes), reproduce="parity sweep --only llama"),
    ]  # fmt: skip
    return Cell("llama", release, [] if note else answers, {"mlx": "0.32.4"}, "llama.py", note)


CAUSE = Cause(
    "setting",
    "rope_parameters.rope_theta",
    "mlx-lm does not read it <b>",
    "with rope_theta in config.json",
)


def test_files_have_the_cause_the_traps_the_versions_and_what_is_not_promised(tmp_path):
    found = found_of(cell_of("0.32.2", "diverge", [CAUSE]), why_not="it needs Pillow")
    files = sweep_files.write(tmp_path, found, [], complete=True)
    assert [file.suffix for file in files] == [".html", ".md", ".json"]
    page, plain, data = (file.read_text() for file in files)
    for shown in (page, plain):
        assert "rope_parameters.rope_theta" in shown and "with rope_theta in config.json" in shown
        assert "What a green cell does not promise" in shown and "it needs Pillow" in shown
        assert "parity sweep --only llama" in shown and "0.32.4" in shown
    assert "does not read it &lt;b&gt;" in page
    read = json.loads(data)
    assert read["architectures"]["llama"]["configurations"]["traps"][0]["kind"] == "rope theta"
    assert read["cells"][0]["answers"][1]["causes"][0]["name"] == "rope_parameters.rope_theta"


def test_a_red_answer_without_a_cause_is_counted(tmp_path):
    page = sweep_files.write(tmp_path, found_of(cell_of("1", "diverge")), [], True)[0].read_text()
    assert "1 red answers have no cause" in page


# Wrong use ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--package", "nonsense"], "cannot read 'nonsense'"),
        (["--package", "numpy==1.0..2.0"], "a sweep runs releases of mlx-lm"),
        (["--question", "logit"], "questions are loads, logits"),
        (["--subject", "hf"], "give a path on MLX"),
        (["--repo", ".", "--good", "HEAD"], "--repo needs --good and --bad"),
        (["--good", "HEAD"], "--repo, which is not given"),
        (["--out", "README.md/x"], "is a file: give another place"),
        (["--only", "lama"], "did you mean 'llama'"),
    ],
)
def test_wrong_use_is_one_line(words, line):
    result = CliRunner().invoke(main, ["sweep", *words])
    assert result.exit_code == 2, result.output
    assert line in result.stderr and result.stderr.count("\n") == 1
