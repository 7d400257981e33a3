"""Whether a path is fit to be judged: every check that can fail fails on a path that is not."""

from __future__ import annotations

import re

import pytest
from click.testing import CliRunner

from parity.audit.fitness import Examiner, State
from parity.cli import main
from tests.cost import long


def checks(engine, path):
    found = Examiner(engine, path).examine()
    return found, [f"{check.title}: {check.text}" for check in found.wrong()]


@pytest.mark.parametrize("path", ["mlx", long("mlx-lm"), long("hf"), long("trl"), long("unsloth")])
def test_a_path_of_the_package_is_fit(path, engine):
    found, wrong = checks(engine, path)
    assert not wrong
    assert len(found.stages) >= 10
    good = [check.text for check in found.checks if check.state is State.GOOD]
    assert any("same bytes" in text for text in good)
    assert any(re.match(r"(\d+) of \1 are known", text) for text in good)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        long(
            "tests.fitness_paths:SetsUpByItself", "parts: optimizer: that of MlxPath, and not used"
        ),
        ("tests.fitness_paths:BreaksTheContract", "contract: path"),
        long(
            "tests.fitness_paths:WatchedOtherwise",
            "watched: watched and bare training end in other",
        ),
        long("tests.search_faults:NoSeed", "seed: seeds 3407 and 5 give one adapter"),
        long(
            "tests.settings_paths:SeedsNowhere",
            "repeats: two runs of lora_init differ in 126 arrays",
        ),
        long("tests.audit_paths:NeverTheSame", "repeats: two runs of train differ in"),
    ],
)
def test_what_makes_a_path_unfit_is_named(path, words, engine):
    found, wrong = checks(engine, path)
    assert any(text.startswith(words) for text in wrong), [c.text for c in found.checks]


@pytest.mark.long
def test_whose_parts_they_are(engine):
    found, wrong = checks(engine, "tests.settings_paths:AveragesOverPadding")
    parts = [check.text for check in found.checks if check.title == "parts"]
    assert "loss: its own, and used in training" in parts
    assert "clip: that of MlxPath, and used in training" in parts
    assert not wrong


def test_a_path_with_one_method_is_told_what_it_lacks(engine):
    found, wrong = checks(engine, "tests.third_party:NumpyAdamW")
    assert not wrong
    assert found.stages == ["optimizer_step"]
    unknown = [check.text for check in found.checks if check.state is State.UNKNOWN]
    assert any("does not run tokenization" in text for text in unknown)
    assert any("no bare training" in text for text in unknown)


@pytest.mark.long
def test_settings_of_its_own_are_its_word_alone(engine):
    found, _ = checks(engine, "tests.settings_paths:SilentConfig")
    [counted, *_] = [check for check in found.checks if check.title == "settings"]
    assert counted.state is State.UNKNOWN
    assert re.match(r"1 of \d+ are known, by `config` of tests.settings_paths", counted.text)


@pytest.mark.long
def test_the_command(engine):
    done = CliRunner().invoke(main, ["check-path", "tests.third_party:NumpyAdamW"])
    assert done.exit_code == 0, done.output
    assert "fit to be judged at 1 stages" in done.stdout.splitlines()[-1]
    done = CliRunner().invoke(main, ["check-path", "tests.fitness_paths:BreaksTheContract"])
    assert done.exit_code == 1
    assert "not fit to be judged yet" in done.stdout.splitlines()[-1]
