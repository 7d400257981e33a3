"""Two runs side by side: what fails now, what was fixed, what is gone, and which package moved."""

from __future__ import annotations

import numpy as np
import pytest

from parity.results.aggregate import aggregate
from parity.results.changes import KINDS, changes
from tests.test_merge import record

BEFORE = ["agree", "diverge", "diverge", "identical", "agree", "error", None, "agree", "skip"]
AFTER = ["diverge", "agree", "error", "agree", "agree", None, "diverge", None, "diverge"]
KIND = [
    "newly failing", "newly fixed", "still failing", "otherwise green", None, "no longer run",
    "not run before", "no longer run", "newly failing",
]  # fmt: skip


def run(verdicts: list[str | None], **versions: str):
    records = [record(seed, v) for seed, v in enumerate(verdicts) if v]
    for one in records:
        one.subject.environment["versions"] = versions
    return aggregate(records)


def test_each_cell_is_of_one_kind():
    found = changes(run(AFTER), run(BEFORE))
    kinds = dict(zip(found.cells["seed"], found.cells["kind"], strict=True))
    assert kinds == {seed: kind for seed, kind in enumerate(KIND) if kind}
    states = found.cells.set_index("seed").loc[[0, 5, 6], ["before", "after"]].to_numpy().tolist()
    assert states == [["agree", "diverge"], ["error", ""], ["", "diverge"]]
    assert found.counts == {k: KIND.count(k) for k in KINDS if k in KIND}
    (row,) = found.rows.to_dict("records")
    assert (row["probe"], row["newly failing"], row["not run before"], row["failing"]) == (
        5,
        2,
        1,
        1,
    )
    assert found.sentence.startswith("2 newly failing, 1 newly fixed, 1 still failing")


def test_nothing_changed():
    found = changes(run(["agree", "skip"]), run(["agree", "skip"]))
    assert found.sentence == "every cell is as before"
    assert found.cells.empty and found.rows.empty and not found.versions


def test_a_cell_that_went_missing_fails_newly():
    found = changes(
        aggregate([record(0), record(1), record(0, probe=2)]),
        aggregate([record(0), record(1), record(0, probe=2), record(1, probe=2)]),
    )
    assert found.cells[["probe", "after", "kind"]].to_numpy().tolist() == [
        [2, "missing", "newly failing"]
    ]


def test_the_package_that_moved_is_named():
    before = run(["agree"], mlx="0.32.1", torch="2.13")
    found = changes(run(["agree"], mlx="0.32.2", numpy="2.4", torch="2.13"), before)
    assert found.versions == (
        "mlx of mlx: 0.32.1 before, 0.32.2 now",
        "numpy of mlx: none before, 2.4 now",
    )


@pytest.mark.parametrize("seed", range(3))
def test_cells_are_as_if_compared_one_by_one(seed):
    rng = np.random.default_rng(seed)
    states = ["agree", "identical", "diverge", "error", "skip", "inconclusive", None]
    one, other = (rng.choice(np.array(states, object), 60).tolist() for _ in range(2))
    found = changes(run(other), run(one))
    kinds = dict(zip(found.cells["seed"], found.cells["kind"], strict=True))
    red = ("diverge", "error", "inconclusive")
    for seed, (before, now) in enumerate(zip(one, other, strict=True)):
        if before is None or now is None:
            expected = {(True, False): "not run before", (False, True): "no longer run"}.get(
                (before is None, now is None)
            )
        elif now in red:
            expected = "still failing" if before in red else "newly failing"
        elif before in red:
            expected = "newly fixed"
        else:
            expected = None if before == now else "otherwise green"
        assert kinds.get(seed) == expected, (seed, before, now)
