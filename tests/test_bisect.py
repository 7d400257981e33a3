"""From "they differ" to the one cause, on real paths."""

from __future__ import annotations

import pytest

from parity.bisect.answer import answer
from parity.bisect.causes import CauseSearch
from parity.recipe import Recipe
from parity.stages import find
from tests.cost import long

HARMLESS = {
    "train.compile": True,
    "data.max_length": 1024,
    "optim.clip_value": 7.0,
    "decode.max_completion_loss": 0.4,
    "seed.data": 3407,
}


def search(engine, recipe, changes, subject="mlx", reference="mlx-lm", probes=(), **named):
    stages = {"stages": tuple(map(find, ("00", *probes)))} if probes else {}
    return CauseSearch(engine, subject, reference, recipe, changes, **stages, **named).search()


@pytest.mark.parametrize(
    ("factor", "value", "stage"),
    [
        long("data.append_eos", False, "tokenization"),
        long("model.weights", "bfloat16", "logits"),
        long("mask.end_shift", 0, "supervised_positions"),
        long("lora.rank", 4, "lora_init"),
        long("optim.eps", 1e-4, "optimizer_step"),
        long("data.pad_multiple", 8, "loss_curve"),
    ],
)
def test_a_flipped_factor_is_found_alone(factor, value, stage, engine, small):
    report = search(engine, small, {**HARMLESS, factor: value})
    assert report.verdict == "found", report.reason
    assert [(c.stage, list(c.factors)) for c in report.causes] == [(stage, [factor])]
    assert factor in answer(report)
    assert f"--set-subject {factor}=" in answer(report)


@pytest.mark.parametrize("probes", [("06",), long(())], ids=["one", "all"])
def test_two_factors_that_matter_only_together(probes, engine, small):
    recipe = small.override({"optim.clip_value": 1e6})
    changes = {"optim.clip": "value", "optim.clip_value": 0.5, "train.compile": True}
    said = []
    report = search(engine, recipe, changes, probes=probes, notice=said.append)
    assert [set(c.factors) for c in report.causes] == [{"optim.clip", "optim.clip_value"}]
    found = [text for text in said if text.startswith("found: ")]
    assert found == [f"found: {report.causes[0].sentence}"]
    assert said.index(found[0]) > said.index("probe 06 optimizer_step: diverge")


@pytest.mark.long
@pytest.mark.parametrize("probes", [("04", "06"), long(())], ids=["two", "all"])
def test_causes_at_two_stages_are_both_found(probes, engine, small):
    changes = {**HARMLESS, "lora.scale": 4.0, "optim.weight_decay": 0.01}
    report = search(engine, small, changes, probes=probes)
    assert [list(c.factors) for c in report.causes] == [["lora.scale"], ["optim.weight_decay"]]


@pytest.mark.long
@pytest.mark.parametrize("probes", [("04", "06"), long(())], ids=["two", "all"])
def test_harmless_changes_are_no_cause(probes, engine, small):
    report = search(engine, small, HARMLESS, probes=probes)
    assert report.verdict == "agree"
    assert not report.causes


@pytest.mark.parametrize(
    ("planted", "stage", "says"),
    [
        (
            "BadModule",
            "logits",
            ["first bad module layers.7.mlp.up_proj", "confirmed", "1 of 18 layers (7)"],
        ),
        long("BadRope", "logits", ["layers.5.self_attn", "1 of 18 layers (5)"]),
        long("BadBackward", "gradient", ["first bad module layers.9.mlp.down_proj"]),
        long("BadThirdStep", "optimizer_step", ["step 3"]),
    ],
)
@pytest.mark.parametrize("reference", [long("mlx-lm"), "hf"])
def test_a_planted_fault_is_placed(planted, stage, says, reference, engine, small):
    subject = f"tests.planted_paths:{planted}"
    report = search(engine, small, {}, subject, reference)
    assert report.causes, report.reason
    assert report.causes[0].stage == stage
    for words in says:
        assert words in answer(report)


def test_any_command_is_an_oracle(tmp_path):
    from parity.bisect.check import search as check
    from parity.bisect.check import to_toml
    from parity.errors import UsageError
    from parity.recipe import load

    recipe = Recipe().override({"seed.data": 5, "decode.prompts": ['a "b"', "ü\n"]})
    file = tmp_path / "r.toml"
    file.write_text(to_toml(recipe))
    assert load(file) == recipe
    found = check('! grep -q "rank = 4" "$PARITY_RECIPE"', Recipe(), {**HARMLESS, "lora.rank": 4})
    assert found.causes == [("lora.rank",)]
    assert check("exit 125", Recipe(), HARMLESS).verdict == "inconclusive"
    assert check("exit 0", Recipe(), HARMLESS).verdict == "agree"
    with pytest.raises(UsageError, match="cannot run it"):
        check("no-such-command", Recipe(), HARMLESS)
    with pytest.raises(UsageError, match="--set-subject"):
        check("exit 0", Recipe(), {})


@pytest.mark.long
@pytest.mark.parametrize("model", ["tiny-llama", "tiny-qwen3"])
def test_a_bad_module_is_named_on_the_other_models(model, engine, small):
    recipe = small.override({"model.source": model})
    report = search(engine, recipe, {}, "tests.planted_paths:BadModule", "hf")
    assert "first bad module layers.7.mlp.up_proj" in answer(report)
    report = search(engine, recipe, {}, "tests.planted_paths:BadBackward", "hf")
    assert "first bad module layers.9.mlp.down_proj" in answer(report)
