"""A part is swapped only where it is what the path trains with."""

from __future__ import annotations

import pytest

from parity.bisect.causes import CauseSearch
from parity.cells.cell import Cell
from parity.cells.run import run_cell
from parity.errors import UsageError
from parity.paths import parts
from parity.paths.measured import known
from parity.paths.registry import resolve
from parity.record import Verdict
from parity.stages import find
from parity.trace import Trace

SETUP, TRAIN = "tests.inherited_paths:OwnSetup", "tests.inherited_paths:OwnTrain"


@pytest.mark.parametrize("name", ["mlx", "mlx-lm", "unsloth"])
def test_the_parts_of_the_built_in_paths_are_their_own(name):
    assert resolve(name).own_parts == parts.ALL


def test_a_part_is_own_where_its_method_is():
    assert resolve(SETUP).own_parts == ("loss", *parts.FILES, "loop")
    assert resolve("tests.planted_paths:LouderLoss").own_parts == parts.ALL
    assert set(resolve(TRAIN).own_parts) == {"loader", "wiring", "batching", *parts.FILES}


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            f"mlx-lm+optimizer={SETUP}",
            "has no optimizer of its own.*own parts are loss, saver, reader, fuse, loop",
        ),
        (f"mlx-lm+optimizer={TRAIN}", "has no optimizer of its own"),
        (f"{SETUP}+optimizer=mlx-lm", "another optimizer would be left out"),
        (f"mlx-lm+clip={SETUP}", "has no clip of its own"),
    ],
)
def test_an_inherited_part_cannot_be_swapped(name, says):
    """Else `mlx-lm+optimizer=PATH` compares mlx-lm with itself."""
    with pytest.raises(UsageError, match=says):
        resolve(name)


def test_an_own_part_still_can():
    assert resolve(f"mlx-lm+loss={SETUP}").name == f"mlx-lm+loss={SETUP}"


def test_a_search_leaves_such_parts_with_their_loop(engine, small):
    search = CauseSearch(engine, SETUP, "mlx-lm", small, {})
    assert search.parts == {"loss", "loop", *parts.FILES}
    stage = search.stages[0]
    assert search.cell(stage, ()).subject == SETUP
    assert search.cell(stage, (), {"loop"}).subject == f"{SETUP}+loss=mlx-lm"
    assert search.cell(stage, (), {"loss"}).subject == f"mlx-lm+loss={SETUP}"
    assert search.cell(stage, (), ()).subject == "mlx-lm"


@pytest.mark.long
def test_settings_of_a_loss_that_it_does_not_train_with_are_unknown(engine, small):
    """They were read from the loss and the recipe that it inherits, and said to be in effect."""
    recipe = small.override({"train.accumulation": 2, "train.batch_size": 3})
    found = engine.capture(TRAIN, "config", recipe, Trace()).scalars
    assert found["accumulation.steps"] == 1
    for name in ("accumulation.weighting", "loss.denominator"):
        assert not known(found[name]), name
    record = run_cell(engine, Cell(find("00"), TRAIN, "mlx-lm", recipe))
    assert record.verdict is Verdict.DIVERGE
    assert "subject: the recipe has train.accumulation=2, 1 is in effect" in record.findings
