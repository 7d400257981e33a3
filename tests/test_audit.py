"""The audit names the knobs that are swallowed or do something else, and no others."""

from __future__ import annotations

import importlib.util
import json

import pytest
from click.testing import CliRunner

from parity.audit.audit import WRONG, Auditor, Status
from parity.cli import main
from tests.cost import long

PATHS = "tests.audit_paths"


def audited(engine, path, *factors):
    return Auditor(engine, f"{PATHS}:{path}").audit(factors)


@pytest.mark.parametrize(
    ("path", "factor", "status", "words"),
    [
        ("SwallowsLayers", "lora.num_layers", Status.SWALLOWED, "no effect, where hf changes 231"),
        long("LoopWithoutClip", "optim.clip", Status.SWALLOWED, "train: no effect, where hf"),
        long("ClipsByValue", "optim.clip", Status.OTHER, "gradient clip: none → value"),
        ("DecayIsRate", "optim.weight_decay", Status.OTHER, "learning rate: [0.01,"),
        ("NeverCompiles", "train.compile", Status.SWALLOWED, "False is read back all the same"),
        long(
            "EchoesDecay", "optim.weight_decay", Status.SWALLOWED,
            "weight decay follows the recipe all the same",
        ),
    ],
)  # fmt: skip
def test_a_knob_that_does_not_do_what_it_says_is_named(path, factor, status, words, engine):
    found = audited(engine, path, factor)
    worst = [finding for finding in found.findings if finding.status is status]
    assert worst, [finding.sentence() for finding in found.findings]
    assert words in worst[0].sentence()
    assert f"{PATHS}:{path}" in worst[0].sentence() or status is Status.SWALLOWED


@pytest.mark.long
def test_what_a_clip_swallowed_by_the_loop_does_elsewhere_is_said(engine):
    [norm, *_] = audited(engine, "LoopWithoutClip", "optim.clip").findings
    assert norm.methods["optimizer_step"].endswith("like hf")


@pytest.mark.long
def test_a_knob_of_its_own_has_an_effect_or_none(engine):
    found = audited(engine, "HasKnobs", "own")
    by_name = {finding.factor: finding for finding in found.findings}
    assert by_name["own.doubled"].status is Status.HONOURED
    assert by_name["own.nothing"].status is Status.NO_EFFECT
    assert "own.label" not in by_name


def test_defaults_are_compared_with_what_is_documented_and_in_effect(engine):
    auditor = Auditor(engine, f"{PATHS}:HasKnobs")
    assert auditor.defaults() == (["train.accumulation is documented as 4, the library has 1"], [])
    [clip], _ = Auditor(engine, f"{PATHS}:SaysNoClip").defaults()
    assert clip == "as shipped optim.clip is none, and norm is in effect"


def test_of_what_does_not_repeat_itself_nothing_is_claimed(engine):
    found = audited(engine, "NeverTheSame", "train.accumulation_weighting")
    assert found.findings[0].status is Status.NOT_SEEN
    assert "do not repeat themselves" in found.findings[0].sentence()


@pytest.mark.parametrize(
    ("path", "factors"),
    [
        ("mlx", ("lora.num_layers", "train.compile")),
        long("mlx", ("optim.eps", "optim.clip_value")),
        long("mlx", ()), long("mlx-lm", ()), long("hf", ()), long("trl", ()),
    ],
)  # fmt: skip
def test_no_knob_of_a_reference_is_named_wrongly(path, factors, engine):
    found = Auditor(engine, path).audit(factors)
    assert found.findings
    wrong = [f.sentence() for f in found.findings if f.status in (*WRONG, Status.FAILED)]
    assert not wrong
    assert not found.defaults
    assert not found.named(Status.NOT_SEEN, Status.NO_EFFECT), found


def test_the_command(engine):
    words = ["audit", f"{PATHS}:SwallowsLayers", "--factors", "lora.num_layers,lora.rank"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 1, done.output
    assert "Swallowed" in done.stdout
    assert "Honoured: 1 factors\n  lora.rank" in done.stdout
    assert done.stdout.splitlines()[-1].startswith(
        f"PARITY audit · {PATHS}:SwallowsLayers · 1 swallowed"
    )


@pytest.mark.long
def test_exit_codes_of_the_command(engine):
    done = CliRunner().invoke(main, ["audit", "mlx", "--factors", "lora.rank", "--json"])
    assert done.exit_code == 0
    assert json.loads(done.stdout)["findings"][0]["status"] == "honoured"
    done = CliRunner().invoke(main, ["audit", "mlx", "--factors", "lora.rnak"])
    assert done.exit_code == 2
    done = CliRunner().invoke(main, ["audit", f"{PATHS}:HasKnobs", "--factors", "own.nothing"])
    assert done.exit_code == 3


@pytest.mark.long
def test_knobs_that_releases_of_unsloth_swallowed_are_named(engine, uv):
    """finetune_last_n_layers and max_grad_norm by itself; 2026.5.5 honours both."""
    for release, expected in (
        ("2026.5.2", {"lora.num_layers", "optim.clip", "optim.clip_value"}),
        ("2026.5.5", set()),
    ):
        auditor = Auditor(engine, f"unsloth@{release}")
        found = auditor.audit(
            ["lora.num_layers", "optim.clip", "optim.clip_value", "unsloth.explicit_clip"]
        )
        assert {*found.named(Status.SWALLOWED)} == expected, release
        clips = [f for f in found.findings if f.status is Status.SWALLOWED and "clip" in f.factor]
        assert all("beside unsloth.explicit_clip=False" in f.notes for f in clips)


@pytest.mark.long
def test_a_default_that_is_not_what_is_in_effect(engine):
    """Left open, the clip of unsloth-zoo is none in its options and on in its steps."""
    if not importlib.util.find_spec("unsloth_zoo"):
        pytest.skip("unsloth-zoo is not installed")
    wrong, _ = Auditor(engine, "unsloth").defaults()
    assert wrong == ["as shipped optim.clip is none, and leaf_norm is in effect"]
