"""What `parity audit` and `parity check-path` say, each on a path on which the opposite would be false."""

from __future__ import annotations

import pytest

from parity.audit.audit import Auditor, Status
from parity.audit.fitness import Examiner, State
from parity.paths.documentation import ABSENT, default_in
from tests.cost import long

PATHS = "tests.audit_paths"


@pytest.mark.parametrize(
    ("path", "factor", "status", "words"),
    [
        ("FailsWhenMoved", "optim.clip", Status.FAILED, "no clip was ever tried"),
        long("RefusesClip", "optim.clip", Status.REFUSED, "there is no clip in this trainer"),
        ("ReadsBackMore", "seed.placement", Status.SWALLOWED, "before_everything is read back all"),
        ("ReadsBackMore", "train.compile", Status.NOT_SEEN, "it does not report"),
        ("WithoutSettings", "train.compile", Status.REFUSED, "nothing is kept"),
        ("WithoutSettings", "lora.num_layers", Status.SWALLOWED,
         f"the settings of {PATHS}:WithoutSettings are not known: nothing is kept"),
    ],
)  # fmt: skip
def test_what_a_move_did(path, factor, status, words, engine):
    found = Auditor(engine, f"{PATHS}:{path}").audit([factor]).findings
    sentences = [f.sentence() for f in found if f.status is status]
    assert any(words in sentence for sentence in sentences), [f.sentence() for f in found]


def test_defaults_that_cannot_be_read_are_not_known(engine):
    wrong, unknown = Auditor(engine, f"{PATHS}:WithoutSettings").defaults()
    assert not wrong
    assert unknown == [
        f"the defaults of {PATHS}:WithoutSettings are not known: its defaults are on a server"
    ]


def test_a_docstring_that_names_another_default_is_named(engine):
    auditor = Auditor(engine, f"{PATHS}:DocumentsOtherwise")
    wrong, _ = auditor.defaults()
    assert wrong == ["lora.rank is documented as 64, the library has 8"]
    assert auditor.documented == ["lora.rank"]


@pytest.mark.parametrize(
    ("path", "factors"),
    [
        ("mlx-lm", {"lora.num_layers", "optim.betas", "optim.eps", "optim.bias_correction"}),
        long("hf", {"optim.betas", "optim.eps", "optim.weight_decay"}),
        long("trl", {"optim.clip_value", "optim.schedule", "train.autocast", "data.max_length"}),
    ],
)
def test_documented_defaults_are_read_from_the_library(path, factors, engine):
    auditor = Auditor(engine, path)
    wrong, _ = auditor.defaults()
    assert factors <= {*auditor.documented}
    assert not [sentence for sentence in wrong if "documented" in sentence]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("    rate (`float`, *optional*, defaults to 5e-5):\n        The rate.", 5e-5),
        ("> - `rate`: Defaults to `2e-5` instead of `5e-5`.", 2e-5),
        ("  rate (float, optional): the\n    rate. Default: ``0.01``.", 0.01),
        ("rate: Number of it. Default is 16, use -1 for all.", 16),
        ("  rate (tuple[float, float]): both (default: (0.9, 0.999))", (0.9, 0.999)),
        ('  rate (`str`, defaults to `"linear"`):', "linear"),
        ("  rate (float): the rate.\n  other (`int`, *optional*, defaults to 3):", ABSENT),
        ("  rates (`int`, defaults to 3):", ABSENT),
        (None, ABSENT),
    ],
)
def test_how_documentation_names_a_default(text, value):
    assert default_in(text, "rate") == value


# check-path --------------------------------------------------------------------------------------


def lines(engine, path):
    found = Examiner(engine, path).examine()
    return found, [f"{check.state} {check.title}: {check.text}" for check in found.checks]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("tests.fitness_paths:Nothing", [
            f"{State.WRONG} contract: stages that it can be judged at: none",
            f"{State.UNKNOWN} seed: of the adapter nothing is known: path",
            f"{State.UNKNOWN} settings: none is reported: path",
            f"{State.UNKNOWN} parts: loader, wiring, batching, loss, clip, optimizer, saver, reader, fuse cannot be "
            "swapped",
        ]),
        long("tests.fitness_paths:OneOrder", [
            f"{State.WRONG} seed: seeds 3407 and 5 give one order of the data",
            f"{State.GOOD} seed: another seed gives another adapter",
        ]),
        long("tests.fitness_paths:DrawsAnew", [
            f"{State.UNKNOWN} seed: one seed gives another adapter each time",
        ]),
        long("tests.fitness_paths:FailingSettings", [
            f"{State.WRONG} settings: path",
            f"{State.UNKNOWN} parts: loss: its own, whether it is used could not be seen: ",
        ]),
        long("tests.settings_paths:SilentConfig", [f"{State.UNKNOWN} settings: not reported: "]),
        long("tests.inherited_paths:OwnTrain", [f"{State.UNKNOWN} settings: the loss is divided by: unknown"]),
    ],
)  # fmt: skip
def test_what_a_path_is_told(path, expected, engine):
    _, said = lines(engine, path)
    for words in expected:
        assert any(line.startswith(words) for line in said), said
