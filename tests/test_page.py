"""The report's page in a real browser: no request, no error, links and filter work, on a phone as well."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from urllib.parse import quote

import pytest

from parity.record import MODULE, Verdict
from parity.report import html, view
from parity.results.aggregate import aggregate
from parity.results.changes import changes
from tests.made_records import curve, matrix, put, record

STYLE = Path(html.__file__).parent
OWN_HOSTS = re.compile(r"https?://([\w-]+\.)*(google|googleapis|gvt1)\.com[/:]")
"""What Chromium itself asks for, whatever the page: the time, its updates."""


def floored(seed: int, far: float = 0.0):
    """A training record with a floor at each step, and step 2 `far` from the reference."""
    one = curve(seed, [0.0, far, 1e-7, 5e-5], step=2 if far else None, reference="hf")
    metric = one.metrics[0].model_copy(update={"floor": 1e-4, "tolerance": 9e-4})
    one.metrics[0] = metric
    one.series["dloss floor"] = [1e-5, 1e-5, 1e-4, 1e-4]
    return one


def off_by_a_module(seed: int = 0):
    found = record(2, seed, "diverge", reference="hf", reason="logits at logits.0",
                   findings=["first bad module: layers.7.mlp.up_proj"], detail="<b>& more")  # fmt: skip
    names = [f"layers.{i}.{part}" for i in range(12) for part in ("attn", "mlp.up_proj", "mlp")]
    values = {n: [1e-6 if i < 22 else 0.5, 6e-6] for i, n in enumerate(names)}
    found.series = {MODULE + name: pair for name, pair in values.items()}
    return found


def a_run():
    passes = {side: {"<hello>": side == "subject"} for side in ("subject", "reference")}
    decode = [record(8, s, "diverge", reference="hf", passes=passes) for s in (0, 1)]
    return aggregate(put(matrix(), off_by_a_module(), floored(0, 0.2), floored(1), *decode))


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    file = tmp_path_factory.mktemp("page") / "report.html"
    now = a_run()
    object.__setattr__(now, "changes", changes(now, aggregate(matrix())))
    file.write_text(html.render(now))
    return file


class Browser:
    """Headless Chromium: the DOM of a page after its scripts ran, what it logged and asked for."""

    def __init__(self, program: str, folder: Path) -> None:
        self.program, self.folder = program, folder

    def open(self, file: Path, fragment: str = "", width: int = 1280, script: str = "") -> str:
        """The DOM; `script` runs in a copy of the page and its answers are in `self.answers`."""
        if script:
            run = f"<script>document.body.dataset.answer = JSON.stringify((() => {{{script}}})());</script>"
            copy = self.folder / "with-script.html"
            copy.write_text(file.read_text().replace("</body>", f"{run}</body>"))
            file = copy
        log = self.folder / "net.json"
        options = (
            "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking "
            "--disable-component-update --disable-sync --enable-logging=stderr "
            f"--virtual-time-budget=3000 --window-size={width},844 --log-net-log={log} "
            f"--user-data-dir={self.folder / 'profile'} --dump-dom"
        )
        address = file.as_uri() + (f"#{quote(fragment)}" if fragment else "")
        done = subprocess.run(
            [self.program, *options.split(), address], capture_output=True, text=True, timeout=120
        )
        assert "<html" in done.stdout, done.stderr[-2000:]
        self.console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
        events = json.loads(log.read_text())
        start = events["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
        urls = [e.get("params", {}).get("url", "") for e in events["events"] if e["type"] == start]
        self.requests = [url for url in urls if url and not OWN_HOSTS.match(url)]
        found = re.search(r'data-answer="([^"]*)"', done.stdout)
        self.answer = json.loads(found[1].replace("&quot;", '"')) if found else None
        return done.stdout


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if not program:
        pytest.skip("Chromium is not installed")
    return Browser(program, tmp_path_factory.mktemp("browser"))


def cells_of(dom: str) -> dict[str, str]:
    """Name of each cell to the attributes of its element."""
    return dict(re.findall(r'<details class="record" id="([^"]+)"([^>]*)>', dom))


def test_a_page_loads_without_a_request_or_an_error(browser, page):
    browser.open(page)
    assert browser.console == []
    assert browser.requests == []


def test_a_request_and_an_error_would_be_seen(browser, page, tmp_path):
    """The test above can fail: a page with a picture from outside, which its policy forbids or not."""
    text = page.read_text().replace("</main>", '<img src="http://127.0.0.1:9/x.png"></main>')
    file = tmp_path / "other.html"
    file.write_text(text)
    browser.open(file)
    assert any("Content Security Policy" in line for line in browser.console)
    file.write_text(re.sub(r"<meta http-equiv[^>]*>", "", text))
    browser.open(file)
    assert any("127.0.0.1:9" in url for url in browser.requests)


def test_the_filter_and_its_link(browser, page):
    every = cells_of(browser.open(page))
    dom = browser.open(page, "filter=diverge seed 0")
    shown = {name for name, attributes in cells_of(dom).items() if "hidden" not in attributes}
    wanted = {r.name for r in (off_by_a_module(), floored(0, 0.2))}
    assert wanted <= shown < every.keys()
    assert all("seed0" in name for name in shown)
    assert f"{len(shown)} of {len(every)} cells" in dom
    typed = """
      const box = document.getElementById("filter");
      box.value = "hf loss seed 1"; box.dispatchEvent(new Event("input"));
      return [[...document.querySelectorAll(".record:not([hidden])")].map(r => r.id), location.hash];
    """
    browser.open(page, script=typed)
    assert browser.answer == [[floored(1).name], "#filter=hf%20loss%20seed%201"]


def test_a_link_opens_its_cell(browser, page):
    name = floored(1).name
    before, after = cells_of(browser.open(page)), cells_of(browser.open(page, name))
    assert "open" not in before[name] and "open" in after[name]
    script = "const a = document.activeElement; return [a.tagName, a.parentElement.id];"
    later = f"setTimeout(() => {{ document.body.dataset.answer = JSON.stringify((() => {{{script}}})()) }}, 300);"
    browser.open(page, name, script=later + "return null;")
    assert browser.answer == ["SUMMARY", name]
    listed = view.pairs(a_run(), {})
    dom = browser.open(page, listed[-1].anchor)
    assert re.search(rf'<details class="pair" id="{re.escape(listed[-1].anchor)}" open', dom)


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_window(browser, page, width):
    script = """
      for (const d of document.querySelectorAll("details")) d.open = true;
      const w = document.documentElement.clientWidth;
      const wide = [...document.querySelectorAll("main *")].filter(
        e => e.getBoundingClientRect().right > w + 1 && !e.closest(".scroll") && !e.closest("svg") && !e.matches(".sr"));
      return [w, document.documentElement.scrollWidth, wide.map(e => e.outerHTML.slice(0, 90))];
    """
    browser.open(page, width=width, script=script)
    seen, scroll, wide = browser.answer
    assert seen <= max(width, 500) and scroll <= seen and wide == []


def test_the_keyboard_reaches_everything_in_order(browser, page):
    script = """
      const focusable = [...document.querySelectorAll("a[href], button, input, summary, [tabindex]")];
      const named = e => (e.getAttribute("aria-label") || e.textContent || e.placeholder || e.title).trim();
      document.dispatchEvent(new KeyboardEvent("keydown", {key: "/", bubbles: true}));
      return [focusable.length, focusable.filter(e => e.id != "filter" && !named(e)).map(e => e.outerHTML),
              focusable.filter(e => e.tabIndex > 0).length, document.activeElement.id];
    """
    browser.open(page, script=script)
    count, nameless, reordered, focus = browser.answer
    assert count > 100 and nameless == [] and reordered == 0 and focus == "filter"


class Outline(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


def test_a_screen_reader_finds_headings_tables_and_pictures_by_name(page):
    outline = Outline()
    outline.feed(page.read_text())
    tags = outline.tags
    levels = [int(tag[1]) for tag, _ in tags if re.fullmatch("h[1-6]", tag)]
    assert levels.count(1) == 1 and levels[0] == 1
    assert all(b <= a + 1 for a, b in pairwise(levels))
    assert ("html", {"lang": "en"}) in tags
    assert all(a.get("scope") in ("col", "row") for t, a in tags if t == "th")
    pictures = [a for t, a in tags if t == "svg"]
    assert pictures and all(a["role"] == "img" and a["aria-label"] for a in pictures)
    regions = [a for _, a in tags if a.get("role") == "region"]
    assert regions and all(a["tabindex"] == "0" and a["aria-label"] for a in regions)
    labels = {a["for"] for t, a in tags if t == "label"}
    assert {a["id"] for t, a in tags if t == "input"} <= labels
    ids = [a["id"] for _, a in tags if "id" in a]
    assert len(ids) == len(set(ids))
    links = {a["href"][1:] for t, a in tags if t == "a"}
    assert links <= set(ids), links - set(ids)


def contrast(one: str, other: str) -> float:
    """The ratio of WCAG 2.2, from 1 to 21."""

    def luminance(colour: str) -> float:
        digits = colour if len(colour) == 6 else "".join(2 * c for c in colour)
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_text_stands_out_from_what_is_behind_it(theme):
    blocks = re.findall(r":root \{(.*?)\}", (STYLE / "style.css").read_text(), re.DOTALL)
    colours = dict(re.findall(r"--([\w-]+): #(\w+)", blocks[theme]))
    pairs = [(f"{n}", f"{n}-back") for n in ("good", "fair", "bad", "warn", "odd")]
    pairs += [(n, back) for n in ("ink", "dim") for back in ("paper", "raised", "off-back")]
    pairs += [("warn", "raised"), ("subject", "paper"), ("reference", "paper")]
    low = {p: round(contrast(*(colours[n] for n in p)), 2) for p in pairs}
    assert {p: c for p, c in low.items() if c < 4.5} == {}


def test_settings_become_a_table_and_other_sentences_stay():
    config = record(0, 0, findings=["as shipped: padding id: 0 in the subject, None in the reference",
                                    "as shipped: the subject supervises 1 more"])  # fmt: skip
    note = "LoRA scale (alpha / rank): 20 in the subject, 2 in the reference"
    wrong = config.metrics[0].model_copy(update={"verdict": Verdict.DIVERGE, "note": note})
    config = config.model_copy(update={"metrics": [wrong]})
    found, others = view.settings(config)
    assert found[0] == ("LoRA scale (alpha / rank)", "20", "2", True)
    assert found[1] == ("padding id (as shipped)", "0", "None", False)
    assert others == ["as shipped: the subject supervises 1 more"]


def test_a_page_of_many_records_stays_small_and_says_what_it_leaves_out():
    long = "off by much " * 40
    records = [
        record(p, s, "diverge" if p % 3 == 0 else "identical", reference=f"r{r:02d}", reason=long)
        for p in range(11)
        for s in range(60)
        for r in range(30)
    ]
    result = aggregate(records)
    text = html.render(result)
    assert len(text.encode()) < 5_000_000
    assert "The 24 worst of 30 pairs" in text
    assert "40 of 60 seeds of each probe are listed, the worst" in text
    assert re.search(r"shows \d+ of 19,800 records, failures first", text)
    assert {*re.findall(r'href="#([^"]+)"', text)} <= {*re.findall(r'\bid="([^"]+)"', text)}
