"""Pages, tables and the terminal hold every record, and nothing in a record breaks them."""

from __future__ import annotations

import re

import pytest
from markupsafe import escape

from parity.report import html, markdown
from parity.results.aggregate import aggregate
from tests.made_records import REFERENCES, curve, matrix, put, record, screen


def test_the_page_holds_each_record_and_loads_nothing() -> None:
    text = '<script src="https://example.org/x.js"></script>'
    wrong = record(6, 0, "diverge", findings=[text], detail=text, hints=[text])
    found = aggregate(put(matrix(), wrong, curve(1, [0.0, 0.2, 0.0, 0.0], step=2)))
    page = html.render(found)
    for r in found.records(found.cells["position"]):
        assert f'id="{r.name}"' in page and f'href="#{r.name}"' in page
    assert text not in page
    outside = r"""\b(src|srcset|href|action|poster)\s*=\s*["']?(?!["'#])|url\((?!#)|@import|<link"""
    assert not re.search(outside, page.replace(str(escape(text)), ""))
    ids = re.findall(r'\sid="(?!m\w|p\w)([^"]+)"', page)  # but for what figures share
    assert len(ids) == len(set(ids))
    assert page.index(f'id="{wrong.name}"') < page.index(f'id="{record(0, 0).name}"')


def test_the_job_summary_stays_below_a_mebibyte() -> None:
    noise = [f"finding {'x' * 900} {i}" for i in range(10)]
    records = [
        record(p, s, "diverge", reference=r, findings=noise, reason="off " * 50)
        for p in range(8)
        for s in range(15)
        for r in REFERENCES
    ]
    found = aggregate(records)
    text = markdown.render(found)
    assert 500_000 < len(text.encode()) < 2**20
    shown = text.count("<details>")
    assert 0 < shown < 240
    assert f"and {240 - shown} more" in text


def test_markdown_cells_cannot_be_broken() -> None:
    passes = {side: {"a|b\n<c>": True} for side in ("subject", "reference")}
    text = markdown.render(aggregate([record(8, 0, passes=passes)]))
    assert "a\\|b &lt;c&gt;" in text


@pytest.mark.parametrize(
    "cell",
    ["a|b", "a\\|b", "a\nb", "<b>", "`x`", "\001", "\x1b[31m", "007", "1e5", "", "- | -", "~~~"],
)
def test_a_table_has_one_line_a_row_and_one_bar_a_cell(cell: str) -> None:
    lines = markdown.table(["name", cell], [[cell, "1"], ["2", cell]]).splitlines()
    assert len(lines) == 4
    bars = [len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in lines]
    assert bars == [3, 3, 3, 3], lines
    assert set(lines[1]) == {"|", "-"}
    assert cell not in ("007", "1e5") or cell in lines[2]


def test_a_failure_cannot_end_its_block() -> None:
    wrong = record(6, 0, "diverge", findings=["~" * 12 + "\n</details>"])
    assert "~" * 13 + "text" in markdown.render(aggregate([wrong]))


def test_the_terminal_fits_80_columns_and_plain_ascii() -> None:
    wrong = [record(6, s, "diverge", reason="the subject is off") for s in range(15)]
    records = put(matrix(range(15)), *wrong, record(8, 14, "agree"))
    text = screen(records)
    grid = text[: text.index("identical")].splitlines()
    assert max(map(len, grid)) <= 80
    assert re.search(r"06 optimizer step +={15} +✗{15}", text)
    assert "and 12 more" in text
    assert "PARITY diverge" in text.splitlines()[-1]
    plain = screen(records, encoding="ascii")
    assert re.search(r"06 optimizer step +={15} +x{15}", plain)


def test_more_seeds_than_columns_are_counted() -> None:
    records = [record(0, s, "diverge" if s == 3 else "identical") for s in range(200)]
    assert re.search(r"00 config +199= 1✗", screen(records))
