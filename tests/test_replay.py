"""Scenarios: every file is valid, and the replay can say no."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from parity.cli import main
from parity.errors import UsageError
from parity.record import Verdict
from parity.replay import scenario
from parity.replay.play import ScenarioStatus, play
from parity.report.replay import table

CASE = """
title = "Four ranks fewer"
source = "https://example.org/issue/1"
about = "A smaller adapter."
probes = ["04"]
[set]
"train.steps" = 3
"train.compile" = false
[set-subject]
"lora.rank" = 4
[expect]
stage = "lora_init"
cause = ["lora.rank"]
"""


@pytest.fixture
def case(tmp_path):
    def write(text=CASE, name="case"):
        file = tmp_path / f"{name}.toml"
        file.write_text(text)
        return scenario.load(str(file))

    return write


@pytest.mark.parametrize("name", scenario.names())
def test_every_scenario_is_valid(name):
    found = scenario.load(name)
    assert found.title
    assert found.about
    assert list(found.recipes())


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('"lora.rank" = 4', '"lora.ranc" = 4', "unknown factor 'lora.ranc'"),
        ("lora_init", "lora_start", "unknown probe 'lora_start'"),
        ('cause = ["lora.rank"]', 'cause = ["rank"]', "'rank' is neither a factor nor a part"),
        ('cause = ["lora.rank"]', "", "needs stage and cause"),
        ("https://", "http//", "source"),
        ("about", "abuot", "abuot"),
        ("[expect]", '[expect.gates]\n"HI" = "all"\n[expect]', "no gate 'HI': there are"),
        ('stage = "lora_init"', 'stage = "lora_init', "not valid TOML"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(old, new, says, case):
    with pytest.raises(UsageError, match=says):
        case(CASE.replace(old, new))


def test_an_unknown_scenario_is_named():
    with pytest.raises(UsageError, match="no scenario 'nothing': give a file"):
        scenario.load("nothing")


def test_a_case_comes_out_as_expected(case, engine):
    outcome = play(case(), engine)
    assert (outcome.status, outcome.found) == (ScenarioStatus.AS_EXPECTED, "lora_init: lora.rank")
    assert "lora.rank = 4 against 8" in outcome.answer


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('stage = "lora_init"', 'stage = "logits"'),
        ('cause = ["lora.rank"]', 'cause = ["lora.scale"]'),
        ('stage = "lora_init"\ncause = ["lora.rank"]', 'verdict = "agree"'),
    ],
)
def test_a_case_that_comes_out_otherwise_is_not_green(old, new, case, engine):
    outcome = play(case(CASE.replace(old, new)), engine)
    assert outcome.status is ScenarioStatus.OTHERWISE
    assert outcome.found == "lora_init: lora.rank"


def test_a_suspicion_that_is_none(case, engine):
    text = CASE.replace('"lora.rank" = 4', '"train.gradient_checkpointing" = true')
    text = text.replace('stage = "lora_init"\ncause = ["lora.rank"]', 'verdict = "agree"')
    outcome = play(case(text), engine)
    assert (outcome.status, outcome.found) == (ScenarioStatus.AS_EXPECTED, "no cause")


def test_what_was_not_compared_is_no_agreement(case, engine):
    """mlx-lm cannot set the seed early: a skipped stage must not pass for one that agrees."""
    text = CASE.replace('"train.steps" = 3', '"seed.placement" = "before_load"')
    text = text.replace('"lora.rank" = 4', "").replace(
        'stage = "lora_init"\ncause = ["lora.rank"]', 'verdict = "agree"'
    )
    outcome = play(case(text), engine)
    assert outcome.status is not ScenarioStatus.AS_EXPECTED
    assert "seed.placement" in outcome.answer


def test_a_path_that_is_not_there_is_not_run(case, engine):
    outcome = play(case(CASE.replace("about", 'subject = "tests.nowhere:Path"\nabout')), engine)
    assert outcome.status is ScenarioStatus.NOT_RUN
    assert "tests.nowhere" in outcome.found


@pytest.mark.long
def test_every_point_of_a_sweep_is_searched(case, engine):
    text = CASE.replace(
        "[set]\n", '[sweep]\n"lora.scale" = [1.0, 2.0]\n"train.steps" = [2]\n[set]\n'
    )
    outcome = play(case(text), engine)
    assert (outcome.status, outcome.points) == (ScenarioStatus.AS_EXPECTED, 2)


@pytest.mark.long
def test_a_gate_is_counted_over_the_seeds(case, engine, small):
    text = """
title = "Untrained"
source = "https://example.org/issue/2"
about = "Nothing is memorised in two steps."
probes = ["04"]
seeds = [3407, 1]
[set]
"train.steps" = 2
"decode.max_tokens" = 4
[expect]
verdict = "agree"
[expect.gates]
"teacher-forced" = "{share}"
"""
    assert play(case(text.format(share="none")), engine).status is ScenarioStatus.AS_EXPECTED
    wrong = play(case(text.format(share="all")), engine)
    assert wrong.status is ScenarioStatus.OTHERWISE
    assert wrong.found == "no cause; of the seeds none pass 'teacher-forced'"
    assert "teacher-forced: 0 of 4" in wrong.answer


def test_the_command_writes_a_table_and_says_no(tmp_path, case):
    case(CASE.replace('cause = ["lora.rank"]', 'cause = ["lora.scale"]'))
    command = ["replay", str(tmp_path / "case.toml"), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 1, result.output
    assert "0 of 1 scenarios came out as expected" in result.output
    [outcome] = json.loads((tmp_path / "out" / "replay.json").read_text())
    assert outcome["found"] == "lora_init: lora.rank"
    assert "not as expected" in (tmp_path / "out" / "replay.md").read_text()


def test_a_table_holds_every_outcome(case, engine):
    text = table([play(case(), engine)])
    assert text.count("\n") == 3
    assert Verdict.DIVERGE not in text
