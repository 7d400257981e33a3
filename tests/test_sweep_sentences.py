"""The sentences of a sweep say what a run has shown, and no more: on toy sides that answer at once."""

from __future__ import annotations

import sys

import pytest

from parity.errors import CaptureError
from parity.paths.mlx.loading import explained
from parity.sweep import candidates, examine
from parity.sweep.answers import Cause
from parity.sweep.bench import Bench, Column
from parity.sweep.examine import Examiner
from parity.sweep.explain import Explainer
from parity.sweep.filling import Whole, lacking, options, resolved, ways
from parity.sweep.models import Architecture
from parity.sweep.sources import Field, Sources, of_python
from parity.sweep.traps import Configuration, Configurations, Trap, changed
from parity.sweep.wording import as_saved, module_named, named_in, without_keys
from tests.toy_sweep import CONFIG, Folders, Toy


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Makes a bench of a model file and two functions."""
    monkeypatch.setattr(Explainer, "_place", lambda self, model: "")

    def make(fields, subject, reference):
        (tmp_path / "models").mkdir(exist_ok=True)
        body = "\n".join(f"    {line}" for line in fields)
        text = f"class ModelArgs:\n    model_type: str\n{body}\nclass Model: ...\n"
        (tmp_path / "models" / "toy.py").write_text(text)
        column = Column("1", "mlx", None, Sources(tmp_path))
        return Toy("toy", column, Folders(), sides={"subject": subject, "reference": reference})

    return make


def plain(bench, config=CONFIG, full=None):
    model = Folders().model("", config)
    answer, _ = bench.ask("logits", "plain", model)
    explainer = Explainer(bench)
    return explainer, *explainer.plain(model, answer, full or {})


def needing(*names):
    """A side that does not load without these keys."""

    def side(config):
        missing = [repr(name) for name in names if config.get(name) is None]
        if missing:
            raise ValueError(f"missing {len(missing)} required positional argument: {missing[0]}")
        return 1.0

    return side


# Values that are filled in -----------------------------------------------------------------------


def test_a_guess_has_the_type_and_the_meaning_of_what_is_demanded():
    def of(name, kind, constants=()):
        found = options(Field(name, required=True, kind=kind), CONFIG, {}, list(constants))
        return list(resolved(dict(enumerate(found)), CONFIG).values())

    assert of("block_dim", "int")[-2:] == [64, 256] and 5e6 not in of("block_dim", "int")
    assert of("rotary_dim", "int")[0] == 16  # the width of a head, all of it
    assert of("first_k_dense_replace", "int") == [0, 1]
    assert of("partial_rotary_factor", "float") == [1.0]
    assert of("rope_theta", "float") == [5e6]
    assert of("num_experts", "int")[0] == 4
    assert of("mla_scale", "bool") == [False, True]
    assert of("is_moe_layer", "List[bool]") == [[True, False], [False, True]]
    assert of("zero_expert_type", "str") == [] and of("topk_method", "str", ["aux"]) == ["aux"]
    assert of("linear_attn_config", "Dict[str, Any]") == []
    alike = {"rope_head_theta": 1000, "block_size_ratio": 0.5, "block_sizes": True, "block_size_2": 7.5}  # fmt: skip
    for name in ("rope_head_dim", "block_size"):
        found = options(Field(name, required=True, kind="int"), {**CONFIG, **alike}, {}, [])
        values = resolved(dict(enumerate(found)), {**CONFIG, **alike}).values()
        assert not any(v in (1000, 0.5, 7.5) or v is True for v in values), name


def test_a_setting_is_written_under_names_of_its_own_type_and_meaning_alone():
    fields = [
        Field("rope_theta", 1e4, kind="float"), Field("rope_scaling", kind="Optional[Dict]"),
        Field("rope_local_base_freq", 1e4, kind="float"), Field("model_type", kind="str"),
    ]  # fmt: skip
    tried = candidates.readable({"rope_parameters": CONFIG["rope_parameters"]}, CONFIG, fields, set())  # fmt: skip
    assert {"rope_theta": 5e6} in tried and {"rope_local_base_freq": 5e6} in tried
    assert not any("model_type" in edits or edits.get("rope_theta") == "default" for edits in tried)
    assert not any("rope_scaling" in edits for edits in tried)


def test_nothing_is_filled_in_where_one_setting_has_no_value():
    fields = [Field("rope_theta", required=True, kind="float"), Field("linear", required=True, kind="dict")]  # fmt: skip
    assert ways(CONFIG, lacking(CONFIG, fields), {}, {}) == []
    assert len(ways(CONFIG, lacking(CONFIG, fields[:1]), {}, {})) == 1


def test_a_guess_that_makes_both_agree_is_claimed(toy):
    bench = toy(["block_dim: int"], needing("block_dim"), lambda config: 1.0)
    _, cause, edits = plain(bench)
    assert "with block_dim=64 in config.json as well it loads and agrees" in cause.fix
    assert resolved(edits, {**CONFIG, "hidden_size": 48}) == {"block_dim": 48}


def test_what_fails_after_a_guess_is_no_cause(toy):
    def subject(config):
        needing("block_dim")(config)
        raise ValueError(f"cannot use block_dim={config['block_dim']}")

    explainer, cause, edits = plain(toy(["block_dim: int"], subject, lambda config: 1.0))
    assert (cause.fix, edits, explainer.other) == ("", {}, {})
    assert cause.name == "block_dim" and "cannot use" not in cause.sentence
    assert "no value that was tried made both agree (block_dim=64: it does not load" in cause.sentence  # fmt: skip


def test_what_differs_after_a_guess_is_no_cause_unless_the_value_does_not_matter(toy):
    def reading(config):
        return needing("block_dim")(config) * config["block_dim"]

    _, cause, edits = plain(toy(["block_dim: int"], reading, lambda config: 0.5))
    assert not edits and "once it loads" not in cause.sentence
    assert "block_dim=64: it loads and differs" in cause.sentence
    _, cause, edits = plain(toy(["block_dim: int"], needing("block_dim"), lambda config: 0.5))
    assert edits and "once it loads" in cause.sentence
    assert "the value does not matter, with block_dim=129" in cause.fix


def test_texts_are_those_that_a_file_compares_a_setting_with():
    found = of_python(sys.executable).compared("glm_moe_dsa")
    assert "noaux_tc" in found["topk_method"] and found["scoring_func"] == [""]


def test_a_setting_that_has_no_value_is_named(toy):
    bench = toy(["linear_attn_config: dict"], needing("linear_attn_config"), lambda config: 1.0)
    _, cause, edits = plain(bench)
    assert not edits and "no value to try for linear_attn_config" in cause.sentence
    assert "(not there)" not in cause.sentence and "null" not in cause.sentence


def test_two_causes_are_claimed_where_both_sides_agree_without_them(toy):
    def subject(config):
        return needing("block_dim")(config) * config.get("rope_theta", 10000)

    bench = toy(["block_dim: int", "rope_theta: float = 10000"], subject, lambda config: 5e6)
    _, cause, edits = plain(bench)
    assert resolved(edits, CONFIG) == {"block_dim": 64, "rope_theta": 5e6}
    assert "loads and agrees" in cause.fix or "then with rope_theta" in cause.fix


def test_what_an_edit_put_there_is_not_said_to_be_there():
    class Fails:
        def capture(self, *_):
            raise CaptureError("mlx-lm does not load the model: x; named there, the configuration has width=3")  # fmt: skip

    column = Column("1", "mlx", Fails(), of_python(sys.executable))
    model = Folders().model("", CONFIG)
    bench = Bench("llama", column, Folders())
    assert "has width=3" in bench.logits("subject", model).error
    assert bench.patched({"width": 3}).logits("subject", model).error.endswith(": x")
    error = "x; named there, the configuration has hybrid_layer_pattern=null"
    assert without_keys(error, ["hybrid_layer_pattern"]) == "x"
    assert without_keys(error, ["rope_theta"]) == error


# Edits that follow the configuration -------------------------------------------------------------


def test_an_edit_sets_single_keys_or_follows_the_configuration(toy):
    bench = toy([], needing(), needing())
    with pytest.raises(TypeError, match="the edit of text_config is a whole mapping"):
        bench.patched({"text_config": CONFIG})
    patched = bench.patched({"model_type": "toy", "text_config": Whole()})
    moved = Folders().model("", {**CONFIG, "hidden_size": 48})
    assert patched.model_of("subject", moved).config["text_config"]["hidden_size"] == 48
    assert "from the whole configuration" in patched.patches()


def test_a_trap_inside_a_text_model_is_found_where_it_was_saved():
    after = {**CONFIG, "hidden_act": "gelu", "architectures": ["Other"]}
    more = {**after, "hidden_size": 48}
    assert as_saved(["text_config.hidden_act"], CONFIG, more)[1] == {"hidden_act": "gelu"}
    assert as_saved(["text_config.other"], CONFIG, after) == ({"hidden_act": "silu"}, {"hidden_act": "gelu"})  # fmt: skip
    assert as_saved(["text_config.other"], CONFIG, CONFIG) == ({}, {})


def test_an_empty_name_is_never_a_setting(toy):
    with pytest.raises(ValueError, match="without a name"):
        Cause("setting", "", "mlx-lm takes no notice of ")
    bench = toy([], lambda config: 1.0, lambda config: 2.0)
    model = Folders().model("", CONFIG)
    trap = Trap("activation", {"text_config.hidden_act": "gelu"})
    answer, _ = bench.ask("logits", "traps", model)
    cause, edits = Explainer(bench).setting(trap, model, model, answer)
    assert cause.kind == "unknown" and not edits
    assert "transformers saves the same config.json without it" in cause.sentence


# Names in errors ---------------------------------------------------------------------------------


def loading(error, config, tmp_path):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(RuntimeError) as caught, explained(str(tmp_path)):
        raise error
    return str(caught.value)


def test_names_of_tensors_are_whole(tmp_path):
    names = [f"model.layers.{n}.self_attn.{k}_proj.bias" for n in range(12) for k in "qkvo"]
    message = f"Received {len(names) + 1} parameters not in model: \n" + ",\n".join([*names, "lm_head.weight."])  # fmt: skip
    error = loading(ValueError(message), "{}", tmp_path)
    assert "model.layers.N.self_attn.o_proj.bias (12)" in error and "lm_head.weight" in error
    assert named_in(error) == "q_proj.bias, k_proj.bias, v_proj.bias, o_proj.bias, lm_head.weight"


def test_names_of_arguments_are_whole_and_a_cut_text_has_none(tmp_path):
    names = ", ".join(f"'swa_number_{n}'" for n in range(40))
    error = loading(TypeError(f"missing 40 required positional arguments: {names}"), "{}", tmp_path)
    assert named_in(error).split(", ")[-1] == "swa_number_39"
    assert named_in("Missing 2 parameters: model.embed.weight, model.lay …") == ""
    assert named_in("Missing 1 parameters: model.layers.N.A_log.") == "layers.N.A_log"


def test_a_word_of_prose_names_no_key(tmp_path):
    config = '{"dtype": "float32", "low": 3, "n_heads": 5, "head_dim": 4}'
    text = "uniform(): incompatible arguments: low: scalar = 0, dtype: Dtype | None = float32"
    assert "named there" not in loading(TypeError(text), config, tmp_path)
    for text in ("no 'head_dim'", "head_dim=4 is wrong", "`head_dim` is 4"):
        assert "has head_dim=4" in loading(ValueError(text), config, tmp_path)


# Sentences that rest on edits --------------------------------------------------------------------


def factor(config):
    return config["rope_parameters"].get("partial_rotary_factor", 1.0)


def test_a_sentence_names_the_edit_that_it_rests_on_and_what_was_handed_over(toy):
    config = changed(CONFIG, {"rope_parameters.partial_rotary_factor": 0.5})
    scaled = {"rope_parameters": {**config["rope_parameters"], "rope_type": "linear", "factor": 3.0}}  # fmt: skip
    reference = lambda c: factor(c) * c["rope_parameters"].get("factor", 1.0)  # noqa: E731
    bench = toy([], lambda c: 1.0, reference)
    bench = bench.patched({}, {"rope_parameters.partial_rotary_factor": 1.0})
    before, after = Folders().model("", config), Folders().model("", changed(config, scaled))
    answer, _ = bench.ask("logits", "rope linear", after)
    cause, _ = Explainer(bench).setting(Trap("rope linear", scaled), before, after, answer)
    assert cause.sentence.startswith("with rope_parameters.partial_rotary_factor=1.0 in the config.json of transformers: ")  # fmt: skip
    assert '"partial_rotary_factor": 1.0' in cause.sentence
    assert '"partial_rotary_factor": 0.5' not in cause.sentence


def examined(toy, monkeypatch, subject, reference, *others):
    bench = toy(["rope_theta: float = 10000"], subject, reference)
    monkeypatch.setattr(
        examine, "Bench", lambda *args, **named: Toy(*args, **named, sides=bench.sides)
    )
    monkeypatch.setattr(Examiner, "_attributes", lambda self, model: {})
    config = changed(CONFIG, {"rope_parameters.partial_rotary_factor": 0.5})
    made = [Configuration("plain", config), *(c(config) for c in others)]
    architecture = Architecture("toy", "Toy", Configurations(made, [], {}))
    return Examiner(architecture, bench.column, Folders(), ("loads", "logits")).examine()


def rope(config):
    trap = Trap("rope longrope", {"rope_parameters": {**config["rope_parameters"], "rope_type": "longrope"}})  # fmt: skip
    return Configuration("rope longrope", changed(config, trap.changes), [trap])


def test_what_cannot_be_asked_with_an_edit_is_said_so(toy, monkeypatch):
    def reference(config):
        if config["rope_parameters"]["rope_type"] == "longrope":
            if factor(config) == 1.0:
                raise ValueError("4 factors for 8 frequencies")
            return 7.0
        return factor(config)

    cell = examined(toy, monkeypatch, lambda config: 1.0, reference, rope)
    causes = [c for a in cell.answers for c in a.causes if a.configuration == "rope longrope"]
    words = " ".join(cause.sentence for cause in causes)
    assert "no setting alone" not in words and "they differ still" not in words
    assert "takes no notice of rope_parameters.rope_type" in words
    assert "transformers with its edited config.json cannot be asked" in words


def test_ties_agree_without_an_edit_only_where_they_do(toy, monkeypatch):
    def subject(config):
        return 10000 if "rope_theta" not in config else config["rope_theta"] - config.get("tied", 0)

    def ties(config):
        return Configuration("router ties", {**config, "tied": 1}, ties=True)

    cell = examined(toy, monkeypatch, subject, lambda c: 5e6, ties)
    sentence = cell.answers[-1].causes[-1].sentence
    assert "the plain configuration, with rope_theta (from rope_parameters.rope_theta) in" in sentence  # fmt: skip
    cell = examined(toy, monkeypatch, lambda c: 5e6 - c.get("tied", 0), lambda c: 5e6, ties)
    assert "(the plain configuration) both sides agree" in cell.answers[-1].causes[-1].sentence


@pytest.mark.parametrize("least", [("hidden_size",), ("num_attention_heads", "hidden_size")])
def test_of_settings_that_are_moved_together_those_that_matter_are_named(toy, monkeypatch, least):
    moved = {"num_attention_heads": 3, "hidden_size": 48, "qk_rope_head_dim": 4}

    def subject(config):
        return float(all(config[key] == moved[key] for key in least))

    def traps(config):
        return Configuration("traps", changed(config, moved), [Trap("odd head count", moved)])

    cell = examined(toy, monkeypatch, subject, lambda config: 0.0, traps)
    (cause,) = cell.answers[-1].causes
    assert cause.name.split(", ") == list(least)
    assert all(f"{key}={moved[key]}" in cause.sentence for key in least)


def test_each_of_several_that_matter_alone_is_a_cause(toy, monkeypatch):
    moved = {"num_attention_heads": 3, "hidden_size": 48, "qk_rope_head_dim": 4}

    def subject(config):
        two = all(config[key] == moved[key] for key in ("num_attention_heads", "qk_rope_head_dim"))
        return 2.0 * (config["hidden_size"] == 48) + two

    def traps(config):
        return Configuration("traps", changed(config, moved), [Trap("odd head count", moved)])

    cell = examined(toy, monkeypatch, subject, lambda config: 0.0, traps)
    names = {cause.name for cause in cell.answers[-1].causes}
    assert names == {"hidden_size", "num_attention_heads, qk_rope_head_dim"}


def test_a_value_is_told_or_not_told(toy, monkeypatch):
    monkeypatch.setattr(Explainer, "_place", lambda self, model: "with theta 7 it agrees")
    bench = toy([], lambda c: factor(c) + 1, factor)
    before = Folders().model("", changed(CONFIG, {"rope_parameters.partial_rotary_factor": 0.5}))
    trap = Trap("partial", {"rope_parameters.partial_rotary_factor": 0.75})
    after = Folders().model("", changed(before.config, trap.changes))
    answer, _ = bench.ask("logits", "traps", after)
    cause, _ = Explainer(bench).setting(trap, before, after, answer)
    assert "with theta 7 it agrees" in cause.sentence
    assert "could not be told" not in cause.sentence and "read otherwise" not in cause.sentence


def test_a_module_whose_input_differs_is_not_at_fault():
    start = "between the output of layers.0.v_proj (agrees) and the "
    assert module_named(f"{start}input of layers.0.o_proj (differs): 3") == "before layers.0.o_proj"
    assert module_named(f"{start}output of layers.0.o_proj (differs): 3") == "layers.0.o_proj"
    assert module_named("first bad module layers.1.mlp: its input agrees") == "layers.1.mlp"
