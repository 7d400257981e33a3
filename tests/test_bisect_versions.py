"""Releases and commits: ranges, real environments of a small package, who moved."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest

from parity.bisect.search import ChangePoint, SameEnds
from parity.bisect.versions import Change, VersionEngine, VersionSearch
from parity.capture import environments
from parity.capture.engine import Engine
from parity.capture.environments import (
    Range,
    UnavailableVersion,
    commits,
    environment,
    parse_range,
    releases,
)
from parity.cells.cell import Cell
from parity.errors import UsageError
from parity.judge.compare import compare_exact
from parity.recipe import Recipe
from parity.stages.context import Comparison
from parity.trace import Trace
from tests.cost import long

PATHS = """
import sys
from parity.paths.protocol import TrainingPath
from parity.trace import Trace

class Fixed(TrainingPath):
    name, framework = "fixed", "numpy"
    honours = ("model.", "data.", "seed.", "lora.", "mask.", "optim.", "train.", "decode.")

    def config(self, recipe, inputs):
        return Trace(scalars={"legacy": [0]})

class Packaging(Fixed):
    "Says whether a version that is none is taken, as before 22.0."

    def config(self, recipe, inputs):
        from packaging.version import InvalidVersion, parse
        assert not any(m.startswith(("torch", "mlx")) for m in sys.modules)
        try:
            parse("no version")
        except InvalidVersion:
            return Trace(scalars={"legacy": [0]})
        return Trace(scalars={"legacy": [1]})

class Toy(Fixed):
    def config(self, recipe, inputs):
        import toy
        return Trace(scalars={"legacy": [toy.legacy]})
"""


def legacy(context):
    pair = context.pair("config", Trace())
    return [np.array(trace.scalars["legacy"]) for trace in (pair.subject, pair.reference)]


class Legacy:
    """A stage of one number."""

    number, name, question = 0, "config", "Are they equal?"

    def run(self, context):
        ours, theirs = legacy(context)
        return Comparison([compare_exact("legacy", ours, theirs)])


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with paths of its own, and an engine that works there."""
    (tmp_path / "toy_paths.py").write_text(PATHS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with Engine(cache=tmp_path / "cache", timeout=120) as engine:
        yield engine


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mlx-lm==0.30.0..0.32.2", Range("mlx-lm", "0.30.0", "0.32.2")),
        (" MLX_LM == 0.30..0.32rc1 ", Range("mlx-lm", "0.30", "0.32rc1")),
    ],
)
def test_a_range_is_read(text, expected):
    assert parse_range(text) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("mlx-lm", "write PACKAGE==LOW..HIGH"),
        ("mlx-lm==0.30", "write PACKAGE==LOW..HIGH"),
        ("==1..2", "write PACKAGE==LOW..HIGH"),
        ("mlx==a..b", "Invalid version: 'a'"),
        ("mlx==2..1", "2 must be lower than 1"),
        ("mlx==1.0..1", "1.0 must be lower than 1"),
    ],
)
def test_what_is_no_range_is_refused(text, words):
    with pytest.raises(UsageError, match=words):
        parse_range(text)


def test_releases_are_sorted_and_final_unless_an_end_is_not(monkeypatch):
    text = "toy (2.0)\nAvailable versions: 2.0, 2.0rc1, 1.10, 1.9, 1.9rc1, 1.8\n  INSTALLED: 1.8\n"
    asked = []
    monkeypatch.setattr(environments, "_run", lambda *words: asked.append(words) or text)
    assert releases(Range("toy", "1.9", "2")) == ["1.9", "1.10", "2.0"]
    assert "--pre" not in asked[-1]
    assert releases(Range("toy", "1.9", "2.0rc1")) == ["1.9", "1.10", "2.0rc1"]
    assert "--pre" in asked[-1]
    with pytest.raises(UsageError, match=r"toy: 1 releases in 2\.\.3, the index has 1\.8 to 2\.0"):
        releases(Range("toy", "2", "3"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mlx", "mlx[cpu]"),
        ("mlx==0.31", "mlx[cpu]==0.31"),
        ("mlx-lm==0.31", "mlx-lm==0.31"),
        ("mlx[cuda]==0.31", "mlx[cuda]==0.31"),
    ],
)
def test_mlx_has_its_backend_on_linux(text, expected, monkeypatch):
    monkeypatch.setattr(environments.sys, "platform", "linux")
    assert environments._requirement(text) == expected


def test_the_sentence_says_who_moved():
    found = ChangePoint("1.0", "1.3", ("1.1", "1.2"))
    change = Change("toy", "reference", found, ("agree: a", "diverge: b"), ("x 1 → 2",))
    assert change.sentence() == (
        "the reference moved with toy in 1.3 (or in 1.1, 1.2, which cannot be run), after 1.0 "
        "(changed with it: x 1 → 2): agree: a → diverge: b"
    )


@pytest.mark.long
def test_the_release_is_found_in_real_environments(here, uv, tmp_path):
    cell = Cell(Legacy(), "toy_paths:Packaging", "toy_paths:Fixed", Recipe())
    # What lies in the working directory must not hide the release.
    (tmp_path / "packaging").mkdir()
    (tmp_path / "packaging" / "__init__.py").write_text("raise ImportError('the wrong one')")
    told = []
    search = VersionSearch(here, cell, progress=lambda *words: told.append(words))
    change = search.release(parse_range("packaging==21.3..23.1"))
    assert (change.found.last_good, change.found.first_bad) == ("21.3", "22.0")
    assert change.verdicts[0].startswith("diverge: legacy")
    assert change.verdicts[1].startswith("agree:")
    assert change.sentence().startswith("the subject moved with packaging in 22.0, after 21.3")
    assert any(name.startswith("pyparsing") for name in change.also)  # 22.0 dropped it
    assert change.runs == change.found.checks == len(told)
    # Again: everything is known, nothing is run, no environment is made.
    again = search.release(parse_range("packaging==21.3..23.1"))
    assert again.runs == 0
    assert again.found == change.found
    # Between releases that do the same there is nothing to find.
    with pytest.raises(
        SameEnds, match=r"packaging: both ends, 22\.0 and 23\.1, .* widen the range"
    ):
        search.release(parse_range("packaging==22.0..23.1"))
    [first, second] = search.each(
        parse_range("packaging==21.3..22.0"), parse_range("filelock==3.16.0..3.16.1")
    )
    assert first.found.first_bad == "22.0"
    assert "filelock: both ends" in second.found.inconclusive
    with pytest.raises(UnavailableVersion, match=r"packaging==0\.0\.99"):
        environment("packaging", "0.0.99", tmp_path / "cache")


def test_a_package_that_asks_for_too_much_comes_without_it(tmp_path, monkeypatch):
    told = []

    def run(*words, **_):
        words = [str(word) for word in words]
        told.append(words)
        if "venv" in words:
            (Path(words[-1]) / "lib" / "python3" / "site-packages").mkdir(parents=True)
        return "[]"

    monkeypatch.setattr(environments, "_run", run)
    monkeypatch.setattr(environments, "_uv", lambda: "uv")
    environment("my-zoo", "1.0", tmp_path, ("numpy", "My_Zoo-extra"), alone={"my-zoo"})
    whole, bare = (words for words in told if "install" in words)
    assert "--no-deps" not in whole
    assert not any(word.startswith("my-zoo") for word in whole)
    assert {"numpy", "My_Zoo-extra"} < set(whole)
    assert bare[-2:] == ["--no-deps", "my-zoo==1.0"]
    assert not any("-c" in words for words in told), "it is not imported"


def git(repo, *words):
    done = subprocess.run(
        ["git", "-C", repo, "-c", "user.name=t", "-c", "user.email=t@t", *words],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.strip()


@pytest.fixture
def repo(tmp_path):
    """Ten commits: `legacy` becomes 1 in the seventh; the fifth cannot be imported."""
    repo = tmp_path / "toy"
    (repo / "src").mkdir(parents=True)
    git(repo, "init", "-q")
    made = []
    for number in range(10):
        text = "syntax error" if number == 4 else f"legacy = {int(number >= 6)}  # {number}"
        (repo / "src" / "toy.py").write_text(text)
        git(repo, "add", ".")
        git(repo, "commit", "-qm", str(number))
        made.append(git(repo, "rev-parse", "HEAD"))
    return repo, made


@pytest.mark.parametrize("side", ["subject", long("reference")])
def test_the_commit_is_found_and_the_checkout_left_alone(here, repo, side):
    repo, made = repo
    (repo / "src" / "toy.py").write_text("work in progress")
    paths = {"subject": "toy_paths:Fixed", "reference": "toy_paths:Fixed", side: "toy_paths:Toy"}
    cell = Cell(Legacy(), paths["subject"], paths["reference"], Recipe())
    change = VersionSearch(here, cell, side).commit(repo, "HEAD~9", "HEAD")
    assert (change.found.last_good, change.found.first_bad) == (made[5], made[6])
    assert set(change.found.gaps) <= {made[4]}
    assert change.sentence().startswith(f"the {side} moved with toy in {made[6]}")
    assert (repo / "src" / "toy.py").read_text() == "work in progress"
    assert git(repo, "status", "--short") == "M src/toy.py"
    assert "prunable" not in git(repo, "worktree", "list")


class Two:
    """A stage of two numbers, each of which diverges by itself."""

    number, name, question = 0, "config", "Are they equal?"

    def run(self, context):
        ours, theirs = legacy(context)
        return Comparison([
            compare_exact("first", ours[:4], theirs[:4]), compare_exact("rest", ours[4:], theirs[4:])
        ])  # fmt: skip


def moving(tmp_path, values):
    """A checkout with a commit for each value of `legacy`."""
    repo = tmp_path / "toy"
    (repo / "src").mkdir(parents=True)
    git(repo, "init", "-q")
    made = []
    for number, value in enumerate(values):
        (repo / "src" / "toy.py").write_text(f"legacy = {value!r}  # {number}")
        git(repo, "add", ".")
        git(repo, "commit", "-qm", str(number))
        made.append(git(repo, "rev-parse", "HEAD"))
    return repo, made


WIDE = """
from parity.paths.protocol import TrainingPath
from parity.trace import Trace

class Fixed(TrainingPath):
    name, framework = "fixed", "numpy"
    honours = ("model.", "data.", "seed.", "lora.", "mask.", "optim.", "train.", "decode.")

    def config(self, recipe, inputs):
        return Trace(scalars={"legacy": [0] * 12})

class Toy(Fixed):
    def config(self, recipe, inputs):
        import toy
        return Trace(scalars={"legacy": toy.legacy})
"""
BOTH, ONE, FEW = [1] * 12, [0] * 4 + [1] * 8, [0] * 4 + [1] + [0] * 7


@pytest.mark.parametrize(
    ("values", "at", "quantity"),
    [
        # One cause is fixed while another is left; then one that shrinks; then one that grows.
        ([BOTH] * 3 + [ONE] * 4, 3, "first"),
        long([ONE] * 2 + [FEW] * 5, 2, "rest"),
        long([FEW] * 5 + [ONE] * 2, 5, "rest"),
        # Colours alone: neither end is called good where the low one diverges.
        long([BOTH] * 4 + [[0] * 12] * 3, 4, ""),
    ],
)
def test_a_change_between_two_red_ends_is_found(here, tmp_path, values, at, quantity):
    (tmp_path / "toy_paths.py").write_text(WIDE)
    repo, made = moving(tmp_path, values)
    told = []
    cell = Cell(Two(), "toy_paths:Toy", "toy_paths:Fixed", Recipe())
    search = VersionSearch(here, cell, progress=lambda name, answer, left: told.append(answer))
    change = search.commit(repo, f"HEAD~{len(values) - 1}", "HEAD")
    assert (change.found.last_good, change.found.first_bad) == (made[at - 1], made[at])
    assert change.quantity == quantity
    said = " ".join([change.sentence(), *(f"{a.outcome} {a.reason}" for a in told)])
    assert "good" not in said and "bad" not in said
    if quantity:
        assert change.sentence().count(f"({quantity}: ") == 2
        assert change.verdicts[0] != change.verdicts[1]


def test_two_red_ends_where_nothing_moved_are_not_called_good(here, tmp_path):
    (tmp_path / "toy_paths.py").write_text(WIDE)
    repo, _ = moving(tmp_path, [BOTH] * 3)
    cell = Cell(Two(), "toy_paths:Toy", "toy_paths:Fixed", Recipe())
    with pytest.raises(SameEnds, match=r"are alike: widen the range \(diverge: ") as raised:
        VersionSearch(here, cell).commit(repo, "HEAD~2", "HEAD")
    assert "good" not in str(raised.value)


def test_commits_that_do_not_follow_each_other_are_refused(repo, tmp_path):
    repo, made = repo
    assert commits(repo, "HEAD~2", "HEAD") == made[-3:]
    with pytest.raises(UsageError, match="'HEAD~1' does not come after 'HEAD'"):
        commits(repo, "HEAD", "HEAD~1")
    with pytest.raises(UsageError, match="does not come after"):
        commits(tmp_path, "HEAD~1", "HEAD")


def test_a_release_of_the_other_side_stays_where_a_repeat_captures_afresh(
    uv, tmp_path, monkeypatch
):
    place = environments.Interpreter(tmp_path / "python", "key", {})
    monkeypatch.setattr("parity.capture.engine.pinned", lambda spec, cache: place)
    with Engine(tmp_path) as base, VersionEngine(base, {}, attempt=1) as afresh:
        assert afresh._interpreter("unsloth@2026.5.3") == base._interpreter("unsloth@2026.5.3")
        assert afresh._interpreter("unsloth@2026.5.3")[1] == str(place.python)


@pytest.mark.long
def test_a_finished_check_is_run_again_once_a_module_that_the_path_imports_was_edited(here, repo):
    repo, made = repo
    Path("toy_helper.py").write_text("def legacy(value):\n    return value\n")
    Path("toy_paths.py").write_text(
        PATHS.replace("return Trace(scalars={\"legacy\": [toy.legacy]})",
                      "import toy_helper\n        "
                      "return Trace(scalars={\"legacy\": [toy_helper.legacy(toy.legacy)]})")
    )  # fmt: skip
    cell = Cell(Legacy(), "toy_paths:Toy", "toy_paths:Fixed", Recipe())
    search = VersionSearch(here, cell, "subject")
    assert search.commit(repo, "HEAD~9", "HEAD").found.first_bad == made[6]
    assert search.commit(repo, "HEAD~9", "HEAD").runs == 0
    Path("toy_helper.py").write_text("def legacy(value):\n    return 0\n")
    with Engine(cache=here.cache, timeout=120) as later, pytest.raises(SameEnds):
        VersionSearch(later, cell, "subject").commit(repo, "HEAD~9", "HEAD")
