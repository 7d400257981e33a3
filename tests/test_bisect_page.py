"""The page of a bisection: the path of the search, and nothing that needs a network."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest
from click.testing import CliRunner

from parity.bisect.check import report as check
from parity.bisect.minimize import Answer, minimize
from parity.bisect.place import Mark, Place
from parity.bisect.result import Cause, SearchReport, StageVisit
from parity.bisect.search import CheckResult as Said
from parity.bisect.search import search
from parity.bisect.versions import Change
from parity.commands.bisect import bisect
from parity.files import loads
from parity.recipe import Recipe
from parity.report.search_files import save, save_versions
from parity.report.search_page import axis, grid, render, render_versions, strip, together
from parity.report.search_progress import Lines, Screen, shown

NAMES = tuple(f"factor{i}" for i in range(8))
VOID = {"meta", "input", "br", "link"}
OPTIONAL = {"tr", "td", "th", "li", "p", "thead", "tbody", "html", "body"}


class Well(HTMLParser):
    """Collects tags; an element that must be closed and is not fails the test."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID | OPTIONAL:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID | OPTIONAL:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def parsed(page):
    parser = Well()
    parser.feed(page)
    assert parser.open == []
    for tag, attrs in parser.tags:
        assert tag not in {"link", "img", "iframe"}, "everything is in the file"
        assert "src" not in attrs
        assert not attrs.get("href", "#").startswith("http")
    assert "url(" not in page and "@import" not in page
    return parser


def searched(*causes):
    sets = [frozenset(cause) for cause in causes]
    answers = {True: Answer.DIVERGES, False: Answer.AGREES}
    return minimize(NAMES, lambda asked: answers[any(s <= asked for s in sets)])


def a_report():
    found = searched({"factor5"})
    walk = [
        Mark("logits", 1e-9, 1e-8, False),
        Mark("layers.1.mlp", 1e-9, 1e-8, False),
        Mark("layers.1.mlp.up_proj", 2e-9, 1e-8, False, True),
        Mark("layers.0.mlp", 3e-4, 1e-8, True),
    ]
    return SearchReport(
        "mlx",
        "hf",
        "found",
        causes=[
            Cause(
                "gradient",
                {"factor5": ("<script>", 'a "b"')},
                "factor5 makes it diverge; with the reference's value it agrees",
                hints=["a <hint>"],
                reproduce="parity run --probes 05 --set-subject 'x=\"y\"'",
            )
        ],
        settings=["rank 4 & 8"],
        ledger=found.ledger,
        path=[
            StageVisit(2, "logits", "agree", "all within", 1.5),
            StageVisit(5, "gradient", "diverge", "norm", 2.0, NAMES, found.questions),
            StageVisit(
                7, "loss_curve", "error", "died", place=Place("there", "x", "backward", walk)
            ),
        ],
        differing=8,
        runs=6,
        seconds=12.3,
    )


def test_the_page_holds_the_answer_the_path_and_the_evidence():
    page = render(a_report())
    parser = parsed(page)
    text = re.sub(r"\s+", " ", " ".join(parser.text))
    for words in (
        "factor5 makes it diverge",
        "with the reference's value it agrees",
        "Hint: a <hint>",
        "parity run --probes 05 --set-subject 'x=\"y\"'",
        "02 logits",
        "07 loss curve",
        "by itself it makes the runs differ",
        "rank 4 & 8",
        "8 factors differ · 6 recipes of the subject run · 12 s",
    ):
        assert words in text, words
    assert "<script>" not in page.split("<script>", 1)[0]
    assert page.count("<script>") == 1
    # The command can be copied with the keyboard, and scrolled tables reached with it.
    assert any(
        tag == "button" and "--probes 05" in attrs["data-text"] for tag, attrs in parser.tags
    )
    regions = [attrs for _, attrs in parser.tags if attrs.get("role") == "region"]
    assert regions and all(attrs["tabindex"] == "0" for attrs in regions)
    assert "prefers-color-scheme: dark" in page
    assert "max-width: 40rem" in page


def test_the_strip_shows_the_halving():
    found = searched({"factor5"})
    visit = StageVisit(5, "gradient", "diverge", "", 0.0, NAMES, found.questions)
    shown = strip(visit, {"factor5"})
    assert len(shown.questions) == found.runs
    assert {name for name, _, _ in shown.rows} == set(NAMES)
    assert [name for name, _, cause in shown.rows if cause] == ["factor5"]
    for column, question in enumerate(found.questions):
        taken = [name for name, took, _ in shown.rows if took[column]]
        assert sorted(taken) == sorted(question.changes)
    # The rows of the first half that was run stand together.
    half = [took[2] for _, took, _ in shown.rows]
    assert half == sorted(half, reverse=True)


def test_questions_are_kept_even_where_repeats_disagree():
    answers = iter([Answer.DIVERGES, Answer.DIVERGES, Answer.AGREES, Answer.DIVERGES])
    found = minimize(NAMES, lambda _: next(answers), repeats=2)
    assert found.verdict == "inconclusive"
    assert [q.answer for q in found.questions] == [Answer.DIVERGES, Answer.UNKNOWN]
    assert found.questions[0].why == "everything from the subject"


def test_the_grid_lays_the_walk_out_by_layer():
    laid = grid(a_report().path[2].place)
    assert laid.layers == [0, 1]
    assert [mark.name for mark in laid.others] == ["logits"]
    rows = dict(laid.rows)
    assert rows["mlp.up_proj"][0] is None and rows["mlp.up_proj"][1].off
    assert rows["mlp"][0].differs and not rows["mlp"][1].differs


def test_three_files_are_written_and_json_keeps_the_path(tmp_path):
    files = save(tmp_path, a_report())
    assert [file.name for file in files] == ["bisect.json", "bisect.md", "bisect.html"]
    data = loads(files[0].read_text())
    assert [visit["stage"] for visit in data["path"]] == ["logits", "gradient", "loss_curve"]
    assert data["path"][1]["questions"][0]["answer"] == "diverges"
    assert data["path"][2]["place"]["walk"][2]["off"] is True


@pytest.mark.parametrize("verdict", ["agree", "inconclusive"])
def test_a_search_without_a_cause_has_a_page(verdict):
    page = render(SearchReport("mlx", "hf", verdict, "this <is> why"))
    assert "this &lt;is&gt; why" in page
    parsed(page)


def a_change():
    names = [f"0.{n}" for n in range(12)]

    def check(name, attempt):
        at = names.index(name)
        if at == 6:
            return Said("gap", "no | wheel")
        return Said("like the low end" if at < 7 else "like the high end", f"{name} <said>")

    found = search(names, check)
    return Change("mlx-lm", "subject", found, ("agree: a", "diverge: b"), ("x 1 → 2",), 9, 4.0)


def test_versions_stand_on_an_axis_with_all_checks(tmp_path):
    change = a_change()
    laid = axis(change)
    assert [version.name for version in laid] == list(change.found.candidates)
    by_name = {version.name: version for version in laid}
    assert by_name["0.7"].first_bad and by_name["0.7"].state == "diverge"
    assert by_name["0.0"].state == "agree"
    assert by_name["0.6"].state == "skip"
    assert {v.state for v in laid} >= {"unchecked"}
    steps = sorted(step for version in laid for step in version.order)
    assert steps == list(range(1, change.found.checks + 1))
    short = together(laid)
    assert sum(version.count for version in short) == len(laid) > len(short)
    files = save_versions(tmp_path, [change], "parity bisect --package 'mlx-lm==0.0..0.11'")
    page = files[2].read_text()
    assert "0.7 &lt;said&gt;" in page and "the subject moved with mlx-lm in 0.7" in page
    assert "no \\| wheel" in files[1].read_text()
    assert json.loads(files[0].read_text())["changes"][0]["found"]["finished"][0][0] == "0.0"
    parsed(page)
    unclear = Change("x", "subject", type(change.found)(inconclusive="flaky"))
    assert "inconclusive" in parsed(render_versions([unclear], "x", "c")).text


def test_any_command_as_oracle_has_a_page(tmp_path):
    changes = {"lora.rank": 4, "seed.data": 5}
    report = check('! grep -q "rank = 4" "$PARITY_RECIPE"', Recipe(), changes)
    assert report.verdict == "found"
    assert report.causes[0].reproduce.startswith("parity bisect --set-subject lora.rank=4 --check")
    parsed(render(report))
    words = ["--check", "exit 0", "--set-subject", "lora.rank=4", "--out", str(tmp_path)]
    done = CliRunner().invoke(bisect, words)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "bisect.html").exists()


class Drawn:
    """Stands for rich's Live."""

    def __init__(self):
        self.last = None
        self.console = self

    def update(self, drawn, refresh):
        self.last = drawn

    def print(self, *words, **options):
        pass


def test_the_display_shows_what_is_known(capsys):
    from rich.console import Console

    with shown() as display:
        assert isinstance(display, Lines), "no terminal, no redrawing"
        display.watch("✗✓… factor1; a cause is among factor1, factor2", 2, 3)
    said = "  run 3, about 3 left  ✗✓… factor1; a cause is among factor1, factor2\n"
    assert capsys.readouterr().err == said
    live = Drawn()
    screen = Screen(live)
    console = Console(width=100, file=open("/dev/null", "w"), record=True)  # noqa: PTH123, SIM115
    screen.watch("✗✓… factor1; a cause is among factor1, factor2", 2, 3)
    console.print(live.last)
    screen.progress("0.30", Said("gap", "no wheel"), 4)
    console.print(live.last)
    screen.notice("probe 05 gradient: agree")
    console.print(live.last)
    text = console.export_text()
    for words in ("✗✓", "about 3 left", "a cause is among factor1", "0.30: no wheel", "about 4"):
        assert words in text
    console.file.close()


def test_the_search_says_what_it_knows():
    told = []
    oracle = {True: Answer.DIVERGES, False: Answer.AGREES}
    minimize(NAMES, lambda asked: oracle["factor6" in asked], watch=lambda *w: told.append(w[0]))
    assert "a cause is among" not in told[1]
    assert any("; factor6 is a cause" in words for words in told)
